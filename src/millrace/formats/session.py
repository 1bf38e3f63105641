"""Opening and running ONNX graphs: one thread, no spinning, nothing read from outside the file."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]

from millrace.core.errors import CorruptError, InputError, NotFoundError, StageError
from millrace.formats.signature import Dtype, TensorSpec

_DTYPES: dict[str, Dtype] = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(string)": "string",
}
# onnxruntime's exceptions have no common parent of their own
ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)
)
_LOG_FATAL = 4  # errors are raised as well: what onnxruntime prints would only repeat them


class Session:
    """An open graph. `run` may be called from several threads at once."""

    def __init__(self, raw: onnxruntime.InferenceSession, name: str) -> None:
        self.raw = raw
        self.name = name
        self.inputs = [_describe(value, name) for value in raw.get_inputs()]
        self.outputs = [_describe(value, name) for value in raw.get_outputs()]
        self._output_names = [value.name for value in self.outputs]

    def run(self, tensors: Mapping[str, np.ndarray], limit_s: float | None = None) -> dict[str, np.ndarray]:
        """All outputs by name.

        Args:
            tensors: Every input by name with the graph's dtype; the first dimension is the row.
            limit_s: How long it may take; of a graph that nobody knows yet.

        Returns:
            Output name → array, the same number of rows.

        Raises:
            StageError: The graph failed on these tensors, or they are not what it wants.
        """
        try:
            found: Any = self.raw.run(None, dict(tensors)) if limit_s is None else self._within(tensors, limit_s)
            outputs: list[Any] = list(found)
            return dict(zip(self._output_names, outputs, strict=True))
        except (*ORT_ERRORS, ValueError, RuntimeError, TypeError) as error:
            wanted = ", ".join(f"{spec.name} {spec.dtype}{spec.shape}" for spec in self.inputs)
            got = ", ".join(f"{key} {np.asarray(value).dtype}{list(np.shape(value))}" for key, value in tensors.items())
            raise StageError(
                f"{self.name} failed on its input (want {wanted}; got {got}): {_first_line(error)}",
                hint="check the tensors' names, dtypes and shapes against the model's signature",
            ) from error

    def _within(self, tensors: Mapping[str, np.ndarray], limit_s: float) -> Any:
        options = onnxruntime.RunOptions()
        alarm = threading.Timer(limit_s, setattr, (options, "terminate", True))
        alarm.daemon = True
        alarm.start()
        try:
            return self.raw.run(None, dict(tensors), options)
        finally:
            alarm.cancel()


def open_session(
    model: Path | bytes,
    threads: int = 1,
    spinning: bool = False,
    optimized_path: Path | None = None,
    name: str = "",
) -> Session:
    """Open an ONNX graph on the CPU.

    Args:
        model: A file, or its bytes.
        threads: Threads inside one call; 1 gives the same bits for the same flags.
        spinning: Busy-wait between the operators of a call: lower latency, busy cores until the call ends.
        optimized_path: Also write the graph after onnxruntime's standard fusions to this file.
        name: What it is called in messages; the path by default.

    Returns:
        The session; its inputs and outputs are `TensorSpec`s with -1 for free dimensions.

    Raises:
        NotFoundError: There is no such file.
        CorruptError: The bytes are no graph that can be loaded, or refer to data outside of them.
        InputError: `threads` is less than one, or an input has a type that no tensor of ours has.

    Example:
        >>> open_session(b"not a model")
        Traceback (most recent call last):
        ...
        millrace.core.errors.CorruptError: model cannot be loaded as ONNX: ...
    """
    name = name or ("model" if isinstance(model, bytes) else str(model))
    if threads < 1:
        raise InputError(f"want at least one thread, got {threads}")
    data = model if isinstance(model, bytes) else _read(model)
    if refers_outside(data):
        raise CorruptError(
            f"{name} keeps weights in files outside the graph; only self-contained ONNX files are opened",
            hint="save it as one file: onnx.save(onnx.load(path), path, save_as_external_data=False)",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = _LOG_FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # nobody is served between calls
    options.add_session_config_entry("session.load_model_format", "ONNX")  # its own format holds unchecked plans
    if optimized_path is not None:
        # basic fusions give standard operators; the higher levels write files for this processor only
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = os.fspath(optimized_path)
    try:
        return Session(onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]), name)
    except (*ORT_ERRORS, ValueError, RuntimeError) as error:
        raise CorruptError(
            f"{name} cannot be loaded as ONNX: {_first_line(error)}",
            hint="export the model again; `python -m onnx.checker` names what is wrong with a file",
        ) from error


def refers_outside(data: bytes) -> bool:
    """Whether a serialised graph keeps a tensor's data in another file.

    Only the lengths of the protocol buffer's fields are walked, and only when the key that every such
    tensor must carry occurs at all: 2 ms per 100 MB otherwise.

    Example:
        >>> refers_outside(b"")
        False
    """
    if b"location" not in data:
        return False
    try:
        return _walk(memoryview(data), "model")
    except (IndexError, ValueError):
        return True  # cannot be walked to its end: what cannot be checked is not trusted


# message → field number → message of the field; "external" marks TensorProto.data_location
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_DATA_LOCATION, _EXTERNAL = 14, 1
_DEEPEST = 100  # of messages in messages, as protocol buffers themselves have it
_WORD = 0xFFFFFFFF  # numbers of fields and of enumerations are cut to 32 bits by who parses them


def _walk(data: memoryview, message: str, depth: int = 0) -> bool:
    if depth > _DEEPEST:
        raise ValueError("too deep")
    children = _CHILDREN[message]
    for field, value in _fields(data):
        if isinstance(value, int):
            if message == "tensor" and field == _DATA_LOCATION and value & _WORD == _EXTERNAL:
                return True
        elif field in children and _walk(value, children[field], depth + 1):
            return True
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        tag &= _WORD
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
        elif kind == 2:
            length, position = _varint(data, position)
            yield tag >> 3, data[position : position + length]
            position += length
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"model file {path} does not exist", hint="check the path") from error


def _describe(value: Any, name: str) -> TensorSpec:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise InputError(
            f"{name}: tensor {value.name!r} has type {value.type}; supported are {', '.join(sorted(_DTYPES))}",
            hint="export the model with plain tensors (for scikit-learn: without ZipMap)",
        )
    shape = [size if isinstance(size, int) else -1 for size in value.shape or []]
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
