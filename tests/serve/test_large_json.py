"""Large JSON is read as small JSON is: the same tensors, the same errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve import oip
from millrace.serve.large_json import read_large
from millrace.serve.oip import Codec

NUMBERS = st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)
TENSORS = st.fixed_dictionaries(
    {"name": st.text(max_size=2), "datatype": st.sampled_from(["FP32", "INT64", "UINT8", "BYTES", "odd"])},
    optional={"data": st.lists(NUMBERS | st.lists(NUMBERS, max_size=2), max_size=3) | ANYTHING, "shape": ANYTHING},
)


def flat(values: Any) -> list[Any]:
    return [one for value in values for one in flat(value)] if isinstance(values, list) else [values]


def as_small(found: Any, wanted: Any) -> Any:
    """Arrays as the lists that they stand for, where these are equal to them."""
    if isinstance(found, np.ndarray):
        return wanted if found.tolist() == flat(wanted) else found.tolist()
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {name: as_small(value, wanted.get(name)) for name, value in found.items()}
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [as_small(one, other) for one, other in zip(found, wanted, strict=True)]
    return found


@given(st.fixed_dictionaries({"inputs": st.lists(TENSORS | ANYTHING, max_size=2)}, optional={"id": ANYTHING}))
def test_it_reads_what_another_parser_reads(request: dict[str, Any]) -> None:
    data = json.dumps(request).encode()
    found = read_large(data)
    if found is not None:  # integers beyond 64 bits are left to the other parser
        wanted = orjson.loads(data)
        assert as_small(found, wanted) == wanted


@given(st.binary(max_size=40))
def test_rubbish_is_left_to_the_other_parser(data: bytes) -> None:
    assert read_large(data) is None or isinstance(orjson.loads(data), dict)


def test_a_name_that_stands_there_twice_is_left_to_the_other_parser() -> None:
    assert read_large(b'{"inputs": [], "inputs": []}') is None
    assert read_large(b'{"inputs": [{"data": [1], "data": [2]}]}') is None


def answer(codec: Codec, dtype: str, data: Any) -> Any:
    tensor = {"name": "x", "shape": [1, 2], "datatype": dtype, "data": data}
    try:
        request = codec.decode(json.dumps({"inputs": [tensor]}).encode(), None)
    except InputError as error:
        return error.message
    assert request.tensors is not None
    return request.tensors["x"].dtype, request.tensors["x"].tolist()


@pytest.mark.parametrize(("dtype", "datatype"), [
    ("float16", "FP16"), ("float32", "FP32"), ("float64", "FP64"), ("int8", "INT8"), ("int64", "INT64"),
    ("uint8", "UINT8"), ("uint64", "UINT64"),
])  # fmt: skip
@pytest.mark.parametrize("data", [
    [1, 2], [[1], [2]], [1, 2.5], [1], [1, 2, 3], [-1, 300], [1e39, 0], [1e300, 0], [70000, 1], [2**63, 0], [2**64, 0],
    [True, 1], ["a", 1], [1, [2, None]], {}, "x",
])  # fmt: skip
def test_large_and_small_requests_get_the_same_answer(
    dtype: Any, datatype: str, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = TensorSpec(name="y", dtype="float32", shape=[-1, 1])
    inputs = [TensorSpec(name="x", dtype=dtype, shape=[-1, 2], semantic="image")]
    codec = Codec("m", "1", Signature(task="regression", inputs=inputs, outputs=[value], label="y"))
    codec.packing = None
    small = answer(codec, datatype, data)
    monkeypatch.setattr(oip, "LARGE_BYTES", 0)
    assert answer(codec, datatype, data) == small
