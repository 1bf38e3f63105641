"""Rows to tensors and outputs to answers."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError, StageError
from millrace.formats.rows import decode_answers, encode_rows
from millrace.formats.signature import Signature, TensorSpec

IMAGE = TensorSpec(name="pixels", dtype="float32", shape=[-1, 4], semantic="image", columns=["a", "b", "c", "d"])
NUMBERS = TensorSpec(name="numbers", dtype="float32", shape=[-1, 2], semantic="number", columns=["x", "y"])
TEXTS = TensorSpec(name="categories", dtype="string", shape=[-1, 1], semantic="category", columns=["z"])


def model(*inputs: TensorSpec, **more: Any) -> Signature:
    return Signature(**{"task": "classification", "inputs": list(inputs), "outputs": [], "label": "y", **more})


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FLOAT32, FLOAT32 | st.none(), st.text(max_size=5) | st.none()), min_size=1, max_size=20))
def test_tables_arrive_as_they_were_sent(rows: list[tuple[float, float | None, str | None]]) -> None:
    instances = [{"x": x, "y": y, "z": z, "other": object()} for x, y, z in rows]
    tensors = encode_rows(model(NUMBERS, TEXTS), instances)
    wanted = np.array([[x, math.nan if y is None else y] for x, y, _ in rows], np.float32)
    np.testing.assert_array_equal(tensors["numbers"], wanted)
    assert tensors["numbers"].dtype == np.float32
    assert tensors["categories"].tolist() == [[z or ""] for _, _, z in rows]


@given(st.lists(st.lists(FLOAT32, min_size=4, max_size=4), min_size=1, max_size=20))
def test_every_form_of_an_image_is_the_same_tensor(rows: list[list[float]]) -> None:
    signature = model(IMAGE)
    wanted = np.array(rows, np.float32)
    forms = (
        [{"pixels": row} for row in rows],
        [{"pixels": [row[:2], row[2:]]} for row in rows],
        [dict(zip("abcd", row, strict=True)) for row in rows],
        rows,
        [np.array(row, np.float32) for row in rows],
    )
    for instances in forms:
        np.testing.assert_array_equal(encode_rows(signature, instances)["pixels"], wanted)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["pixels", "a", "x", "z"]), inner),
    max_leaves=10,
)


@given(ANY)
def test_anything_is_a_tensor_or_a_named_error(value: Any) -> None:
    for signature in (model(IMAGE), model(NUMBERS, TEXTS), model(TEXTS)):
        try:
            tensors = encode_rows(signature, value)
        except InputError as error:
            text = error.message
        else:
            text = "instances"
            assert {len(tensor) for tensor in tensors.values()} == {len(value)}
            assert all(not np.isinf(tensor).any() for tensor in tensors.values() if tensor.dtype != object)
        assert text.startswith("instances")


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (IMAGE, [1, 2, 3], "instances[0]: want 4 numbers, got 3"),
        (
            IMAGE,
            {"pixels": [1, 2, 3, math.nan]},
            "instances[0].pixels[3]: want a finite number that float32 can hold, got nan",
        ),
        (IMAGE, {"a": 1, "b": 2, "c": 3, "d": None}, "instances[0].d: want a number, got null"),
        (IMAGE, {"a": 1, "b": 2, "c": 3}, "instances[0].d: missing"),
        (NUMBERS, {"x": 1, "y": math.inf}, "instances[0].y: want a finite number that float32 can hold, got inf"),
        (NUMBERS, {"x": 1, "y": 10**400}, "instances[0].y: want a finite number"),
        (NUMBERS, {"x": [1], "y": 1}, "instances[0].x: want a number, got [1]"),
        (TEXTS, {"z": {"a": 1}}, "instances[0].z: want a text, got an object"),
    ],
)
def test_what_is_wrong_is_named(spec: TensorSpec, value: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        encode_rows(model(spec), [value])
    assert raised.value.message.startswith(message)


def test_a_misspelt_column_is_hinted_at() -> None:
    with pytest.raises(InputError) as raised:
        encode_rows(model(NUMBERS), [{"x": 1, "Y": 2}])
    assert raised.value.message == "instances[0].y: missing"
    with pytest.raises(InputError) as raised:
        encode_rows(model(IMAGE), [{"pixel": [1, 2, 3, 4]}])
    assert "'pixel'" in raised.value.hint


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("int64", [1, 2.0, -3], ["1", 1.5, None, 2**63, math.nan]),
        ("uint8", [0, 255], [256, -1, "a"]),
        ("bool", [True, 0, 1.0], [2, "true", None]),
        ("float64", [1e300, None], [math.inf, "1"]),
    ],
)
def test_other_dtypes(dtype: str, good: list[Any], bad: list[Any]) -> None:
    spec = TensorSpec(name="v", dtype=dtype, shape=[-1, 1])  # type: ignore[arg-type]
    values = encode_rows(model(spec), [{"v": [value]} for value in good])["v"]
    assert str(values.dtype) == dtype
    assert [None if value != value else value for value in values.reshape(-1).tolist()] == good
    for value in bad:
        with pytest.raises(InputError):
            encode_rows(model(spec), [{"v": [value]}])


def test_tensors_with_more_and_with_free_dimensions() -> None:
    cube = TensorSpec(name="v", dtype="float32", shape=[-1, 2, 2])
    assert encode_rows(model(cube), [[[1, 2], [3, 4]], [5, 6, 7, 8]])["v"].shape == (2, 2, 2)
    free = TensorSpec(name="v", dtype="int64", shape=[-1, -1])
    assert encode_rows(model(free), [[1, 2, 3], [4, 5, 6]])["v"].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(InputError, match="one shape"):
        encode_rows(model(free), [[1, 2, 3], [4]])


@given(st.lists(st.lists(FLOAT32, min_size=2, max_size=2), min_size=1, max_size=10))
def test_shares_name_the_float32_exactly(rows: list[list[float]]) -> None:
    shares = np.array(rows, np.float32)
    answers = decode_answers(model(classes=["a", "b"]), {"probabilities": shares})
    for answer, row in zip(answers, shares, strict=True):
        back = [struct.unpack("f", struct.pack("f", value))[0] for value in answer["probabilities"].values()]
        assert back == row.tolist()
        assert answer["label"] == ["a", "b"][int(row.argmax())]


@pytest.mark.parametrize(
    ("label_type", "names", "labels"),
    [
        ("integer", ["0", "10"], [0, 10]),
        ("number", ["0.5", "1"], [0.5, 1.0]),
        ("boolean", ["False", "True"], [False, True]),
        ("string", ["0", "b"], ["0", "b"]),
        ("integer", ["x", "2.0"], ["x", 2]),
    ],
)
def test_labels_have_the_type_of_their_column(label_type: str, names: list[str], labels: list[Any]) -> None:
    signature = model(classes=names, label_type=label_type)
    answers = decode_answers(signature, {"probabilities": np.eye(2, dtype=np.float32)})
    assert [answer["label"] for answer in answers] == labels
    assert [type(answer["label"]) for answer in answers] == [type(label) for label in labels]


def test_values_and_what_is_no_answer() -> None:
    regression = model(task="regression")
    values = np.array([[0.1], [np.nan]], np.float32)
    assert decode_answers(regression, {"value": values}) == [{"value": 0.1}, {"value": None}]
    with pytest.raises(StageError, match="want an output 'value'"):
        decode_answers(regression, {"probabilities": values})
    with pytest.raises(StageError, match=r"want \[rows, 3\]"):
        decode_answers(model(classes=["a", "b", "c"]), {"probabilities": values})
