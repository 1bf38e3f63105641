"""Messages to tensors and back, for one signature: `raw_*_contents` and typed contents, in both directions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from millrace.core.errors import InputError
from millrace.formats.signature import TensorSpec
from millrace.serve.batching import Job, Packing
from millrace.serve.dataplane import DataPlane
from millrace.serve.grpc.calls import varint
from millrace.serve.grpc.messages import message_type
from millrace.serve.oip import Codec, timeout_of
from millrace.serve.tensors import DATATYPES, check_shape, read_binary, to_bytes

InferRequest = message_type("ModelInferRequest")
InferResponse = message_type("ModelInferResponse")
_FIELDS = {
    "bool": "bool_contents", "int8": "int_contents", "int16": "int_contents", "int32": "int_contents",
    "int64": "int64_contents", "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents",
    "uint64": "uint64_contents", "float32": "fp32_contents", "float64": "fp64_contents", "string": "bytes_contents",
}  # fmt: skip
_MAX_KNOWN, _MAX_HEAD_BYTES = 1024, 1024


class Asked:
    """A decoded request.

    Args:
        request: As it came.
        codec: Of the model.

    Raises:
        InputError: It is not one for this model; names the tensor.
    """

    __slots__ = ("id", "is_final_told", "is_raw", "outputs", "tensors", "timeout_us")

    def __init__(self, request: Any, codec: Codec) -> None:
        parameters = parameters_of(request.parameters)
        self.id: str = request.id
        self.timeout_us = timeout_of(parameters)
        self.is_final_told = parameters.get("triton_enable_empty_final_response") is True
        self.is_raw = bool(request.raw_input_contents) or parameters.get("binary_data_output") is True
        self.tensors = _tensors(request, codec)
        self.outputs = list(codec.outputs)
        if request.outputs:
            wanted = [{"name": one.name, "parameters": parameters_of(one.parameters)} for one in request.outputs]
            self.outputs = list(codec.wanted_outputs(wanted, binary=False))


def parameters_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A message's parameters as values.

    Example:
        >>> request = InferRequest()
        >>> request.parameters["timeout"].int64_param = 5
        >>> parameters_of(request.parameters)
        {'timeout': 5}
    """
    return {key: getattr(value, value.WhichOneof("parameter_choice") or "bool_param")
            for key, value in parameters.items()}  # fmt: skip


def _tensors(request: Any, codec: Codec) -> dict[str, np.ndarray]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"raw_input_contents: want one for each of {len(request.inputs)} inputs, got {len(raw)}")
    tensors: dict[str, np.ndarray] = {}
    for index, value in enumerate(request.inputs):
        spec = codec.input_spec(value.name, tensors)
        shape = list(value.shape)
        check_shape(spec, shape, value.datatype)
        if not raw:
            tensors[spec.name] = _typed(spec, shape, value.contents)
        elif value.HasField("contents"):
            raise InputError(f"input {spec.name!r}: has both contents and raw_input_contents")
        else:
            data = raw[index]
            tensors[spec.name], _ = read_binary(spec, shape, {"binary_data_size": len(data)}, data, 0)
    codec.check_complete(tensors)
    return tensors


def _typed(spec: TensorSpec, shape: list[int], contents: Any) -> np.ndarray:
    field = _FIELDS.get(spec.dtype)
    if field is None:
        raise InputError(f"input {spec.name!r}: {DATATYPES[spec.dtype]} has no typed contents: want raw_input_contents")
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        raise InputError(
            f"input {spec.name!r}: want {math.prod(shape)} values in {field} for shape {shape}, got {len(values)}"
        )
    if spec.dtype == "string":
        try:
            return np.array([value.decode() for value in values], dtype=object).reshape(shape)
        except UnicodeDecodeError:
            raise InputError(f"input {spec.name!r}: has a text that is not UTF-8") from None
    array = np.array(values)
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu" and len(values):
        bounds = np.iinfo(dtype)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise InputError(f"input {spec.name!r}: has a number that {DATATYPES[spec.dtype]} cannot hold")
    return array.astype(dtype).reshape(shape)


def answer(codec: Codec, asked: Asked, job: Job) -> bytes:
    """A `ModelInferResponse`: raw where the request was, else with typed contents."""
    given, parameters = job.outputs, _FINAL if asked.is_final_told else b""
    if not asked.is_raw and all(codec.outputs[name].dtype in _FIELDS for name in asked.outputs):
        return _typed_answer(codec, asked, given) + parameters
    described, contents = [_opening(codec.name, codec.version, asked.id)], []
    for name in asked.outputs:
        values, spec = given[name], codec.outputs[name]
        data = to_bytes(values, spec.dtype)
        described.append(_described(name, DATATYPES[spec.dtype], values.shape))
        contents += b"\x32" + varint(len(data)), data
    return b"".join([*described, parameters, *contents])


def _typed_answer(codec: Codec, asked: Asked, given: Mapping[str, np.ndarray]) -> bytes:
    response = InferResponse(model_name=codec.name, model_version=codec.version, id=asked.id)
    for name in asked.outputs:
        values, spec = given[name], codec.outputs[name]
        output = response.outputs.add(name=name, datatype=DATATYPES[spec.dtype], shape=values.shape)
        if spec.dtype == "string":
            output.contents.bytes_contents.extend([str(value).encode() for value in values.reshape(-1)])
        else:
            getattr(output.contents, _FIELDS[spec.dtype]).extend(values.reshape(-1).tolist())
    return response.SerializeToString()


@functools.lru_cache(maxsize=1024)
def _opening(name: str, version: str, id: str) -> bytes:
    return InferResponse(model_name=name, model_version=version, id=id).SerializeToString()


@functools.lru_cache(maxsize=4096)
def _described(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    response = InferResponse()
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    return response.SerializeToString()


def _final() -> bytes:
    response = InferResponse()
    response.parameters["triton_final_response"].bool_param = True
    return response.SerializeToString()


_FINAL = _final()  # fields of a message may stand in any order: what was rendered before is joined


class Repeated(NamedTuple):
    """What a message means whose like came before."""

    name: str
    plane: DataPlane
    packing: Packing
    asked: Asked


class _Known(NamedTuple):
    head: bytes
    repeated: Repeated | None  # None: seen once


class Repeats:
    """Messages that differ in the bytes of their one tensor alone, which clients send again and again.

    Such a message is the same head (names, shape, parameters) and then `raw_input_contents`, its last field. With as
    many bytes and the same head there is nothing to parse or check: it is right if the first one was.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}  # by size

    def clear(self) -> None:
        """Forget: other models are served."""
        self._known.clear()

    def find(self, data: bytes) -> tuple[Repeated, bytes] | None:
        """What a message means, and the bytes of its tensor."""
        known = self._known.get(len(data))
        if known is None or known.repeated is None or not data.startswith(known.head):
            return None
        return known.repeated, data[len(known.head) :]

    def learn(self, request: Any, data: bytes, repeated: Repeated) -> None:
        """Remember a message that was found right, once a second one has the same head.

        Args:
            request: Parsed.
            data: The message.
            repeated: What it means; its tensors are not kept.
        """
        raw = request.raw_input_contents
        if len(raw) != 1 or not raw[0]:
            return
        size = len(raw[0])
        head = data[: len(data) - size]
        lead = b"\x3a" + varint(size)
        if not data.endswith(raw[0]) or not head.endswith(lead) or len(head) > _MAX_HEAD_BYTES:
            return
        before = self._known.get(len(data))
        if before is None or before.head != head:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[len(data)] = _Known(head, None)
            return
        try:
            rest = InferRequest.FromString(head[: -len(lead)])
        except DecodeError:  # the field is inside another one
            return
        if not rest.raw_input_contents and len(rest.inputs) == 1:
            repeated.asked.tensors = {}
            self._known[len(data)] = _Known(head, repeated)
