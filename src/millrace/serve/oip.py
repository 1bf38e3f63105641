"""The Open Inference Protocol (V2): bodies to tensors and back, JSON and binary, without a transport."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson

from millrace.core.errors import InputError
from millrace.core.types import Struct
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.batching import Job, Packing
from millrace.serve.large_json import LARGE_BYTES, read_large
from millrace.serve.tensors import (
    DATATYPES,
    as_object,
    check_shape,
    from_json,
    itemsize,
    pack_floats,
    read_binary,
    shown,
    to_bytes,
    to_json,
)

MAX_TIMEOUT_US = 86_400_000_000


class Wanted(Struct, frozen=True, kw_only=True):
    """How an answer is wanted. `outputs`: name → binary; None: all of them, each as `binary` says.

    `timeout_us`: within so many microseconds, Triton's request parameter `timeout`; 0: whenever it comes.
    """

    id: str = ""
    timeout_us: int = 0
    outputs: dict[str, bool] | None = None
    binary: bool = False


class InferRequest:
    """A decoded request: tensors that fit the signature, and how its answer is wanted.

    Args:
        tensors: By name; None: `data` stands for them, whole rows of the codec's `packing`.
        wanted: The answer.
        data: See `tensors`.
        repeats: The JSON, when all requests of this size that begin with it differ in `data` alone.
    """

    __slots__ = ("data", "repeats", "tensors", "wanted")

    def __init__(
        self,
        tensors: dict[str, np.ndarray] | None,
        wanted: Wanted,
        data: bytes | None = None,
        repeats: bytes = b"",
    ) -> None:
        self.tensors = tensors
        self.wanted = wanted
        self.data = data
        self.repeats = repeats


class _InputParameters(Struct, frozen=True, kw_only=True):
    binary_data_size: int | None = None


class _FloatInput(Struct, frozen=True, kw_only=True):
    name: str
    shape: list[int]
    datatype: str
    data: list[float] | msgspec.UnsetType = msgspec.UNSET
    parameters: _InputParameters | None = None


class _RequestParameters(Struct, frozen=True, kw_only=True):
    binary_data_output: bool = False
    timeout: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIMEOUT_US)] = 0


class _FloatRequest(Struct, frozen=True, kw_only=True):
    """The common request, decoded without a Python object for anything else."""

    inputs: list[_FloatInput]
    id: str = ""
    outputs: list[Any] | None = None
    parameters: _RequestParameters | None = None


_KNOWN_HEADS, _KNOWN_BYTES = 1024, 1024
JSON, BINARY = Wanted(), Wanted(binary=True)  # all outputs, no id: what most requests want
_decode_floats = msgspec.json.Decoder(_FloatRequest).decode


class Codec:
    """Translates bodies for one signature.

    Args:
        name: The model's name, for answers.
        version: Its version.
        signature: Its tensors.
    """

    def __init__(self, name: str, version: str, signature: Signature) -> None:
        self.name = name
        self.version = version
        self.inputs = {spec.name: spec for spec in signature.inputs}
        self.outputs = {spec.name: spec for spec in signature.outputs}
        self._all_json = dict.fromkeys(self.outputs, False)
        self._all_binary = dict.fromkeys(self.outputs, True)
        self._prefix = orjson.dumps({"model_name": name, "model_version": version})[:-1]
        self.known: dict[tuple[bytes, int], Wanted] = {}  # JSON of binary requests, found right with so many bytes
        self.packing = packing_of(signature)

    # ------------------------------------------------------------------ requests

    def decode(self, body: bytes, header_length: int | None) -> InferRequest:
        """A request's body.

        Args:
            body: JSON, followed by the binary tensors where there are some.
            header_length: Bytes of the JSON, from Inference-Header-Content-Length; None: all of it;
                0: no JSON, the body is the one tensor (Triton's raw binary request).

        Raises:
            InputError: The body is not a request for this model; names the tensor.
        """
        if header_length is None:
            head, rest = body, b""
        elif 0 <= header_length <= len(body):
            if header_length == 0:
                return self._raw(body)
            head, rest = body[:header_length], body[header_length:]
        else:
            raise InputError(
                f"Inference-Header-Content-Length: want 0 to {len(body)}, the length of the body, got {header_length}"
            )
        if self.packing is not None and (rest or len(head) < LARGE_BYTES):
            wanted = self.known.get((head, len(rest))) if rest else None
            if wanted is not None:
                return InferRequest(None, wanted, rest, head)
            request = self._decode_plain(self.packing, head, rest)
            if request is not None:
                return request
        return self._decode_any(head, rest)

    def _decode_plain(self, packing: Packing, head: bytes, rest: bytes) -> InferRequest | None:
        """One float32 tensor that is right in every respect; None for everything else."""
        try:
            request = _decode_floats(head)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if len(request.inputs) != 1:
            return None
        value = request.inputs[0]
        shape = value.shape
        if value.name != packing.name or value.datatype != "FP32" or len(shape) != 2 or shape[1] != packing.width:
            return None
        data = _data_of(value, shape[0] * shape[1], rest)
        if data is None:
            return None
        binary = request.parameters is not None and request.parameters.binary_data_output
        timeout_us = 0 if request.parameters is None else request.parameters.timeout
        if request.outputs or request.id or timeout_us:
            outputs = self.wanted_outputs(request.outputs, binary) if request.outputs else None
            wanted = Wanted(id=request.id, outputs=outputs, binary=binary, timeout_us=timeout_us)
        else:
            wanted = BINARY if binary else JSON
        if not rest or request.id or len(head) > _KNOWN_BYTES:
            return InferRequest(None, wanted, data)
        if len(self.known) >= _KNOWN_HEADS:
            self.known.clear()
        self.known[head, len(rest)] = wanted
        return InferRequest(None, wanted, data, head)

    def _raw(self, body: bytes) -> InferRequest:
        if len(self.inputs) != 1:
            raise InputError(f"a raw binary request has one tensor; this model wants {', '.join(self.inputs)}")
        spec = next(iter(self.inputs.values()))
        if -1 in spec.shape[1:]:
            raise InputError(f"input {spec.name!r}: its shape {spec.shape} cannot be told from {len(body)} bytes alone")
        if spec.dtype == "string":
            return self._raw_text(spec, body)
        row_bytes = math.prod(spec.shape[1:]) * itemsize(spec)
        if row_bytes <= 0 or not body or len(body) % row_bytes:
            raise InputError(f"input {spec.name!r}: want a multiple of {row_bytes} bytes, got {len(body)}")
        shape = [len(body) // row_bytes, *spec.shape[1:]]
        tensor, _ = read_binary(spec, shape, {"binary_data_size": len(body)}, body, 0)
        return InferRequest({spec.name: tensor}, BINARY)

    def _raw_text(self, spec: TensorSpec, body: bytes) -> InferRequest:
        """One text, without the length that stands before a text elsewhere."""
        if math.prod(spec.shape[1:]) != 1:
            raise InputError(f"input {spec.name!r}: a raw binary request has one text, a row of it {spec.shape[1:]}")
        data = len(body).to_bytes(4, "little") + body
        tensor, _ = read_binary(spec, [1, *spec.shape[1:]], {"binary_data_size": len(data)}, data, 0)
        return InferRequest({spec.name: tensor}, BINARY)

    def _decode_any(self, head: bytes, rest: bytes) -> InferRequest:
        """Every form that the protocol allows, and every error named."""
        request = read_large(head) if len(head) >= LARGE_BYTES else None
        try:
            request = orjson.loads(head) if request is None else request
        except (orjson.JSONDecodeError, RecursionError) as error:
            raise InputError(f"the request is not JSON: {error}") from None
        if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
            raise InputError("inputs: want a list of tensors (the request is one JSON object)")
        parameters = as_object(request.get("parameters"), "parameters")
        id = request.get("id", "")
        if not isinstance(id, str):
            raise InputError(f"id: want a text, got {shown(id)}")
        binary = parameters.get("binary_data_output", False)
        if not isinstance(binary, bool):
            raise InputError(f"parameters.binary_data_output: want true or false, got {shown(binary)}")
        timeout_us = timeout_of(parameters)
        tensors: dict[str, np.ndarray] = {}
        offset = 0
        for index, value in enumerate(request["inputs"]):
            if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                raise InputError(f"inputs[{index}].name: missing, or not a text")
            spec = self.input_spec(value["name"], tensors)
            check_shape(spec, value.get("shape"), value.get("datatype"))
            own = as_object(value.get("parameters"), f"input {spec.name!r}: parameters")
            if "binary_data_size" in own:
                if "data" in value:
                    raise InputError(f"input {spec.name!r}: has both data and binary_data_size")
                tensors[spec.name], offset = read_binary(spec, value["shape"], own, rest, offset)
            else:
                tensors[spec.name] = from_json(spec, value["shape"], value.get("data"))
        self.check_complete(tensors, rest, offset)
        outputs = self.wanted_outputs(request["outputs"], binary) if request.get("outputs") else None
        return InferRequest(tensors, Wanted(id=id, outputs=outputs, binary=binary, timeout_us=timeout_us))

    def input_spec(self, name: str, seen: Mapping[str, Any]) -> TensorSpec:
        """What the signature says of an input.

        Args:
            name: As the request says it.
            seen: What it has named before.

        Raises:
            InputError: The model has no such input, or it is given twice.
        """
        spec = self.inputs.get(name)
        if spec is None:
            raise InputError(f"input {name[:80]!r}: unknown; this model wants {', '.join(map(repr, self.inputs))}")
        if name in seen:
            raise InputError(f"input {name!r}: given twice")
        return spec

    def check_complete(self, tensors: Mapping[str, np.ndarray], rest: bytes = b"", offset: int = 0) -> None:
        """Refuse a request that lacks an input, has bytes left over, or not as many rows in each.

        Args:
            tensors: Decoded.
            rest: What follows its JSON.
            offset: How much of that was used.

        Raises:
            InputError: See above.
        """
        if len(tensors) != len(self.inputs):
            missing = [name for name in self.inputs if name not in tensors]
            raise InputError(f"input {missing[0]!r}: missing; this model wants {', '.join(map(repr, self.inputs))}")
        if offset != len(rest):
            raise InputError(
                f"the body has {len(rest)} bytes after its JSON: want {offset}, the sum of binary_data_size"
            )
        if len(tensors) > 1 and len({len(tensor) for tensor in tensors.values()}) > 1:
            counts = ", ".join(f"{name!r} {len(tensor)}" for name, tensor in tensors.items())
            raise InputError(f"inputs: want the same number of rows in each, got {counts}")

    def wanted_outputs(self, outputs: Any, binary: bool) -> dict[str, bool]:
        """The outputs that a request selects, and whether each is binary.

        Args:
            outputs: A list of objects with a name, and parameters.
            binary: What holds for those that say nothing.

        Raises:
            InputError: It is no such list, or the model has no such output, or it is named twice.
        """
        if not isinstance(outputs, list):
            raise InputError(f"outputs: want a list, got {shown(outputs)}")
        wanted: dict[str, bool] = {}
        for index, value in enumerate(outputs):
            name = value.get("name") if isinstance(value, dict) else None
            if not isinstance(name, str) or name not in self.outputs:
                known = ", ".join(map(repr, self.outputs))
                raise InputError(f"outputs[{index}]: {shown(name)} is unknown; this model gives {known}")
            if name in wanted:
                raise InputError(f"output {name!r}: asked for twice")
            parameters = as_object(value.get("parameters"), f"output {name!r}: parameters")
            if parameters.get("classification"):
                raise InputError(f"output {name!r}: classification is not supported; use :predict for labels")
            wanted[name] = bool(parameters.get("binary_data", binary))
        return wanted

    # ------------------------------------------------------------------ answers

    def encode(self, wanted: Wanted, job: Job) -> tuple[bytes, bytes | None]:
        """An answer's JSON and its binary tensors, one after the other (None: a plain JSON body)."""
        blobs: list[bytes] = []
        parts: list[bytes] = []
        outputs = wanted.outputs or (self._all_binary if wanted.binary else self._all_json)
        given = job.outputs
        for name, is_binary in outputs.items():
            values = given[name]
            described = _description(name, DATATYPES[self.outputs[name].dtype], values.shape)
            if is_binary:
                blob = to_bytes(values, self.outputs[name].dtype)
                blobs.append(blob)
                parts.append(b'%s,"parameters":{"binary_data_size":%d}}' % (described, len(blob)))
            else:
                parts.append(b'%s,"data":%s}' % (described, to_json(values)))
        id = b',"id":%s' % orjson.dumps(wanted.id) if wanted.id else b""
        return b'%s%s,"outputs":[%s]}' % (self._prefix, id, b",".join(parts)), b"".join(blobs) if blobs else None

    def opening(self, name: str, shape: tuple[int, ...]) -> bytes:
        """An answer with that one output and no id, up to its numbers."""
        described = _description(name, DATATYPES[self.outputs[name].dtype], shape)
        return b'%s,"outputs":[%s,"data":[' % (self._prefix, described)


def packing_of(signature: Signature) -> Packing | None:
    """The form of inputs that are one float32 tensor [rows, width]; None for others."""
    only = signature.inputs[0] if len(signature.inputs) == 1 else None
    if only is None or only.dtype != "float32" or len(only.shape) != 2 or only.shape[1] < 1:
        return None
    return Packing(name=only.name, width=only.shape[1], row_bytes=4 * only.shape[1])


def timeout_of(parameters: Mapping[str, Any]) -> int:
    """Triton's request parameter `timeout` in microseconds; 0: none.

    Raises:
        InputError: It is no such number.

    Example:
        >>> timeout_of({"timeout": 50_000}), timeout_of({})
        (50000, 0)
    """
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout <= MAX_TIMEOUT_US:
        raise InputError(f"parameters.timeout: want whole microseconds, 0 (none) to a day, got {shown(timeout)}")
    return timeout


def _data_of(value: _FloatInput, count: int, rest: bytes) -> bytes | None:
    """A tensor's bytes; None unless it has exactly `count` numbers, here or after the JSON."""
    if count <= 0:
        return None
    if value.parameters is None:
        if value.data is msgspec.UNSET or len(value.data) != count or rest:
            return None
        return pack_floats(value.data)
    if value.data is not msgspec.UNSET or not len(rest) == 4 * count == value.parameters.binary_data_size:
        return None
    return rest


@functools.lru_cache(maxsize=4096)
def _description(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    return orjson.dumps({"name": name, "datatype": datatype, "shape": list(shape)})[:-1]
