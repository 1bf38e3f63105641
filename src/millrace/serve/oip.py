"""The Open Inference Protocol (V2): bodies to tensors and back, JSON and binary, without a transport."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import orjson

from millrace.core.errors import InputError
from millrace.core.types import Struct
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.metrics import Metrics
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


class InferRequest:
    """A decoded request: tensors that fit the signature, and how its answer is wanted."""

    __slots__ = ("binary", "id", "outputs", "tensors")

    def __init__(self, tensors: dict[str, np.ndarray], id: str, outputs: dict[str, bool] | None, binary: bool) -> None:
        self.tensors = tensors
        self.id = id
        self.outputs = outputs  # name → binary; None: all, each as `binary` says
        self.binary = binary


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


class _FloatRequest(Struct, frozen=True, kw_only=True):
    """The common request, decoded without a Python object for anything else."""

    inputs: list[_FloatInput]
    id: str = ""
    outputs: list[Any] | None = None
    parameters: _RequestParameters | None = None


class _KnownHead(Struct, frozen=True, kw_only=True):
    """The JSON of a binary request, decoded and found right: clients repeat it byte for byte."""

    name: str
    shape: list[int]
    size_bytes: int
    outputs: dict[str, bool] | None
    binary: bool


_KNOWN_HEADS, _KNOWN_BYTES = 1024, 1024
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
        self._all_binary = dict.fromkeys(self.outputs, True)
        self._all_json = dict.fromkeys(self.outputs, False)
        self._prefix = orjson.dumps({"model_name": name, "model_version": version})[:-1]
        self._binary_heads: dict[int, bytes] = {}
        self._known_heads: dict[bytes, _KnownHead] = {}
        only = signature.inputs[0] if len(signature.inputs) == 1 else None
        is_plain = only is not None and only.dtype == "float32" and len(only.shape) == 2 and only.shape[1] > 0
        self._plain = only if is_plain else None  # one tensor of numbers: what a quick path is worth for
        self._has_static_heads = all(spec.dtype != "string" and -1 not in spec.shape[1:] for spec in signature.outputs)

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
        known = self._known_heads.get(head)
        if known is not None and known.size_bytes == len(rest):
            values = np.frombuffer(rest, dtype=np.float32).reshape(known.shape)
            return InferRequest({known.name: values}, "", known.outputs, known.binary)
        request = self._decode_plain(head, rest) if self._plain is not None else None
        return request or self._decode_any(head, rest)

    def _decode_plain(self, head: bytes, rest: bytes) -> InferRequest | None:
        """One float32 tensor that is right in every respect; None for everything else."""
        try:
            request = _decode_floats(head)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if len(request.inputs) != 1:
            return None
        spec, value = self._plain, request.inputs[0]
        shape, parameters = value.shape, value.parameters
        assert spec is not None
        if value.name != spec.name or value.datatype != "FP32" or len(shape) != 2 or shape[1] != spec.shape[1]:
            return None
        count = shape[0] * shape[1]
        if parameters is None:
            if value.data is msgspec.UNSET or count <= 0 or len(value.data) != count or rest:
                return None
            tensor = pack_floats(value.data)
            if tensor is None:
                return None
        else:
            if (
                value.data is not msgspec.UNSET
                or count <= 0
                or not len(rest) == 4 * count == parameters.binary_data_size
            ):
                return None
            tensor = np.frombuffer(rest, dtype=np.float32)
        binary = request.parameters is not None and request.parameters.binary_data_output
        outputs = self._wanted(request.outputs, binary) if request.outputs else None
        if rest and not request.id and len(head) <= _KNOWN_BYTES:
            if len(self._known_heads) >= _KNOWN_HEADS:
                self._known_heads.clear()
            known = _KnownHead(name=spec.name, shape=shape, size_bytes=len(rest), outputs=outputs, binary=binary)
            self._known_heads[head] = known
        return InferRequest({spec.name: tensor.reshape(shape)}, request.id, outputs, binary)

    def _raw(self, body: bytes) -> InferRequest:
        if len(self.inputs) != 1:
            raise InputError(f"a raw binary request has one tensor; this model wants {', '.join(self.inputs)}")
        spec = next(iter(self.inputs.values()))
        row_bytes = math.prod(spec.shape[1:]) * itemsize(spec) if -1 not in spec.shape[1:] else 0
        if row_bytes <= 0 or not body or len(body) % row_bytes:
            raise InputError(f"input {spec.name!r}: want a multiple of {row_bytes} bytes, got {len(body)}")
        shape = [len(body) // row_bytes, *spec.shape[1:]]
        tensor, _ = read_binary(spec, shape, {"binary_data_size": len(body)}, body, 0)
        return InferRequest({spec.name: tensor}, "", None, True)

    def _decode_any(self, head: bytes, rest: bytes) -> InferRequest:
        """Every form that the protocol allows, and every error named."""
        try:
            request = orjson.loads(head)
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
        tensors: dict[str, np.ndarray] = {}
        offset = 0
        for index, value in enumerate(request["inputs"]):
            if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                raise InputError(f"inputs[{index}].name: missing, or not a text")
            spec = self._input_spec(value["name"], tensors)
            check_shape(spec, value.get("shape"), value.get("datatype"))
            own = as_object(value.get("parameters"), f"input {spec.name!r}: parameters")
            if "binary_data_size" in own:
                if "data" in value:
                    raise InputError(f"input {spec.name!r}: has both data and binary_data_size")
                tensors[spec.name], offset = read_binary(spec, value["shape"], own, rest, offset)
            else:
                tensors[spec.name] = from_json(spec, value["shape"], value.get("data"))
        self._check_complete(tensors, rest, offset)
        outputs = request.get("outputs")
        return InferRequest(tensors, id, self._wanted(outputs, binary) if outputs else None, binary)

    def _input_spec(self, name: str, seen: Mapping[str, Any]) -> TensorSpec:
        spec = self.inputs.get(name)
        if spec is None:
            raise InputError(f"input {name[:80]!r}: unknown; this model wants {', '.join(map(repr, self.inputs))}")
        if name in seen:
            raise InputError(f"input {name!r}: given twice")
        return spec

    def _check_complete(self, tensors: Mapping[str, np.ndarray], rest: bytes, offset: int) -> None:
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

    def _wanted(self, outputs: Any, binary: bool) -> dict[str, bool]:
        if not isinstance(outputs, list):
            raise InputError(f"outputs: want a list, got {shown(outputs)}")
        wanted: dict[str, bool] = {}
        for index, value in enumerate(outputs):
            name = value.get("name") if isinstance(value, dict) else None
            if not isinstance(name, str) or name not in self.outputs:
                known = ", ".join(map(repr, self.outputs))
                raise InputError(f"outputs[{index}]: {shown(name)} is unknown; this model gives {known}")
            parameters = as_object(value.get("parameters"), f"output {name!r}: parameters")
            if parameters.get("classification"):
                raise InputError(f"output {name!r}: classification is not supported; use :predict for labels")
            wanted[name] = bool(parameters.get("binary_data", binary))
        return wanted

    # ------------------------------------------------------------------ answers

    def encode(self, request: InferRequest, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, list[bytes]]:
        """An answer's JSON and its binary tensors in order (empty: a plain JSON body)."""
        wanted = request.outputs
        if wanted is None:
            if request.binary:
                return self._all_as_binary(request.id, outputs)
            wanted = self._all_json
        blobs: list[bytes] = []
        parts: list[bytes] = []
        for name, is_binary in wanted.items():
            values = outputs[name]
            described = self._described(name, values.shape)
            if is_binary:
                blob = to_bytes(values)
                blobs.append(blob)
                parts.append(b'%s,"parameters":{"binary_data_size":%d}}' % (described, len(blob)))
            else:
                parts.append(b'%s,"data":%s}' % (described, to_json(values)))
        return b'%s%s,"outputs":[%s]}' % (self._prefix, _id_field(request.id), b",".join(parts)), blobs

    def _all_as_binary(self, id: str, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, list[bytes]]:
        blobs = [to_bytes(outputs[name]) for name in self.outputs]
        rows = len(next(iter(outputs.values())))
        if id or not self._has_static_heads:
            return self._binary_head(id, outputs, blobs), blobs
        head = self._binary_heads.get(rows)
        if head is None:
            head = self._binary_head(id, outputs, blobs)
            if len(self._binary_heads) < 1024:
                self._binary_heads[rows] = head  # the same for every request of so many rows
        return head, blobs

    def _binary_head(self, id: str, outputs: Mapping[str, np.ndarray], blobs: list[bytes]) -> bytes:
        parts = [
            b'%s,"parameters":{"binary_data_size":%d}}' % (self._described(name, outputs[name].shape), len(blob))
            for name, blob in zip(self.outputs, blobs, strict=True)
        ]
        return b'%s%s,"outputs":[%s]}' % (self._prefix, _id_field(id), b",".join(parts))

    def _described(self, name: str, shape: tuple[int, ...]) -> bytes:
        spec = self.outputs[name]
        return _description(name, DATATYPES[spec.dtype], shape)


@functools.lru_cache(maxsize=4096)
def _description(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    return orjson.dumps({"name": name, "datatype": datatype, "shape": list(shape)})[:-1]


def _id_field(id: str) -> bytes:
    return b',"id":%s' % orjson.dumps(id) if id else b""


# ---------------------------------------------------------------------- documents


def server_metadata(version: str) -> dict[str, Any]:
    """`GET /v2`."""
    extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
    return {"name": "millrace", "version": version, "extensions": extensions}


def model_metadata(name: str, version: str, signature: Signature) -> dict[str, Any]:
    """`GET /v2/models/{name}`.

    Example:
        >>> value = TensorSpec(name="value", dtype="float32", shape=[-1, 1])
        >>> model = Signature(task="regression", inputs=[], outputs=[value], label="y")
        >>> model_metadata("m", "1", model)["outputs"]
        [{'name': 'value', 'datatype': 'FP32', 'shape': [-1, 1]}]
    """

    def described(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": spec.shape} for spec in specs]

    return {
        "name": name,
        "versions": [version],
        "platform": "onnxruntime_onnx",
        "inputs": described(signature.inputs),
        "outputs": described(signature.outputs),
    }


def model_config(name: str, signature: Signature, max_batch: int) -> dict[str, Any]:
    """`GET /v2/models/{name}/config`, Triton's model configuration; dims are without the rows."""

    def described(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_" + {"string": "STRING"}.get(spec.dtype, DATATYPES[spec.dtype]),
                "dims": spec.shape[1:] or [1],
            }
            for spec in specs
        ]

    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_batch,
        "input": described(signature.inputs),
        "output": described(signature.outputs),
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }


def statistics(name: str, version: str, metrics: Metrics) -> dict[str, Any]:
    """`GET /v2/models/{name}/stats`, in Triton's form; times in nanoseconds.

    Example:
        >>> statistics("m", "1", Metrics())["model_stats"][0]["inference_count"]
        0
    """
    answered = metrics.latency.total - metrics.failures

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    nothing = duration(0, 0)
    batches = [
        {
            "batch_size": rows,
            "compute_input": nothing,
            "compute_infer": duration(calls, metrics.batch_ns[rows]),
            "compute_output": nothing,
        }
        for rows, calls in sorted(metrics.batches.items())
    ]
    model = {
        "name": name,
        "version": version,
        "last_inference": metrics.last_inference_ms,
        "inference_count": metrics.rows,
        "execution_count": metrics.calls,
        "inference_stats": {
            "success": duration(answered, int(metrics.latency.sum * 1e9)),
            "fail": duration(metrics.failures, 0),
            "queue": duration(answered, metrics.queue_ns),
            "compute_input": nothing,
            "compute_infer": duration(metrics.calls, metrics.model_ns),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": batches,
    }
    return {"model_stats": [model]}
