"""Model files that were made elsewhere: ONNX, which is recognised and looked through before anything runs it.

Nothing is scanned for what is bad: a file that is not one whole ONNX model of known operators is refused,
whatever it is called. Nothing of it is unpacked, unpickled or executed to find that out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from millrace.core.errors import InputError, NotFoundError
from millrace.formats.plain_file import read_plain

MAX_MODEL_BYTES = 2_000_000_000
MAX_NODES = 200_000  # with those of functions, each time that one is called
MAX_DEPTH = 16  # of graphs in graphs and of functions in functions
MAX_ELEMENTS = 1 << 30  # of one tensor whose size the file says
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_FOREIGN_CODE = frozenset({"EPContext", "PythonOp", "PythonOpGrad", "ATen"})  # of com.microsoft: they load or call code
_SAFE_HINT = "export the model as one self-contained .onnx file"
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive (torch.save and numpy.savez write such)"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x1f\x8b", "compressed with gzip"),
    (0, b"BZh", "compressed with bzip2"),
    (0, b"\xfd7zXZ\x00", "compressed with xz"),
    (0, b"\x5d\x00\x00", "compressed with lzma"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"\x78\x01", "compressed with zlib"),
    (0, b"\x78\x9c", "compressed with zlib"),
    (0, b"\x78\xda", "compressed with zlib"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (4, b"ORTM", "in onnxruntime's own format, which cannot be checked"),
)


def read_model(path: Path) -> bytes:
    """A model file's bytes, read once: what is checked is what is used.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no regular file, is too large, or cannot be read.
    """
    try:
        return read_plain(path, MAX_MODEL_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFoundError(f"there is no file {path}", hint="check the path") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}", hint="check its permissions") from None
    except ValueError as error:
        raise InputError(f"{path.name} cannot be taken as a model: {error}", hint=_SAFE_HINT) from None


def check_model(data: bytes, name: str) -> None:
    """Refuse whatever is not one valid, self-contained ONNX model of known operators.

    Args:
        data: The file's bytes.
        name: What it is called, for messages.

    Raises:
        InputError: It is something else, keeps data elsewhere, or is more than any model needs.

    Example:
        >>> check_model(b"\\x80\\x04K\\x01.", "model.onnx")
        Traceback (most recent call last):
        millrace.core.errors.InputError: model.onnx is a pickle, which runs code when it is loaded; want ONNX
    """
    other = what_else(data)
    if other is not None:
        raise InputError(f"{name} is {other}; want ONNX", hint=_SAFE_HINT)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InputError(f"{name} is no ONNX model: its bytes are none", hint=_SAFE_HINT) from None
    if not (model.HasField("graph") and model.ir_version and model.opset_import) or len(UnknownFieldSet(model)):
        raise InputError(f"{name} is no ONNX model: it has no graph, no version, or other parts", hint=_SAFE_HINT)
    _check_versions(model, name)
    _Look(model, name).all()
    _check_as_onnx(model, name)


def what_else(data: bytes) -> str | None:
    """What a file plainly is, if that is another format; only its first bytes are looked at.

    Example:
        >>> what_else(b"PK\\x05\\x06"), what_else(b"\\x08\\x08")
        ('a zip archive', None)
    """
    if data[:1] == b"\x80" and data[1:2] <= b"\x05":
        return "a pickle, which runs code when it is loaded"
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < max(len(data), 1 << 27):
        return "safetensors: weights without a graph"
    return next((text for at, magic, text in _MAGIC if data[at : at + len(magic)] == magic), None)


def _check_versions(model: onnx.ModelProto, name: str) -> None:
    imports = {("" if one.domain == "ai.onnx" else one.domain, one.version) for one in model.opset_import}
    newest = onnx.defs.onnx_opset_version()
    if len({domain for domain, _ in imports}) != len(imports):
        raise InputError(f"{name} names two versions of one set of operators", hint="export it again")
    if model.ir_version > onnx.IR_VERSION:
        raise InputError(
            f"{name} has the ONNX version {model.ir_version}; want at most {onnx.IR_VERSION}",
            hint="export it for an older one",
        )
    for domain, version in imports:
        if version < 1 or (domain == "" and version > newest):
            raise InputError(
                f"{name} wants version {version} of the operators; known are 1 to {newest}",
                hint="export it for an older one",
            )


def _check_as_onnx(model: onnx.ModelProto, name: str) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["the ONNX checker refuses it"])[0][:300]
        raise InputError(f"{name} is not a valid ONNX model: {reason}", hint="export it again") from None
    _Look(inferred, name).values(inferred.graph)


class _Look:
    """One look through a model: every graph, function, attribute and tensor."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self._model, self._name = model, name
        self._functions = {(one.domain, one.name): one for one in model.functions}
        self._sizes: dict[tuple[str, str], int] = {}  # of functions, with what they call
        self._open: set[tuple[str, str]] = set()

    def all(self) -> None:
        """Everything.

        Raises:
            InputError: Something is outside of the file, unknown, or too much.
        """
        if self._model.training_info:
            raise self._refusal("it holds training; want inference alone")
        if len(self._functions) != len(self._model.functions):
            raise self._refusal("it has two functions of one name")
        for key in self._functions:
            self._function(key, 0)
        self._bound(self._graph(self._model.graph, 0))

    def values(self, graph: Any) -> None:
        """Sizes that are known before any row comes.

        Raises:
            InputError: One is too large.
        """
        for value in (*graph.input, *graph.output, *graph.value_info):
            dims = value.type.tensor_type.shape.dim
            if dims and all(dim.HasField("dim_value") for dim in dims):
                self._elements([dim.dim_value for dim in dims], value.name, is_stored=False)

    def _graph(self, graph: Any, depth: int) -> int:
        """The number of its nodes, with all that is in them."""
        if depth > MAX_DEPTH:
            raise self._refusal(f"its graphs are nested deeper than {MAX_DEPTH}")
        for tensor in graph.initializer:
            self._tensor(tensor)
        for sparse in graph.sparse_initializer:
            self._sparse(sparse)
        self.values(graph)
        return self._nodes(graph.node, depth)

    def _nodes(self, nodes: Iterable[Any], depth: int) -> int:
        count = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in self._functions:
                count += self._function(key, depth + 1)
            elif node.domain not in DOMAINS:
                raise self._refusal(f"the operator {node.op_type!r} is of the unknown domain {node.domain!r}")
            elif node.domain == "com.microsoft" and node.op_type in _FOREIGN_CODE:
                raise self._refusal(f"the operator {node.op_type!r} runs code from outside the file")
            count = self._bound(count + 1 + sum(self._attribute(one, depth) for one in node.attribute))
        return count

    def _attribute(self, attribute: Any, depth: int) -> int:
        for tensor in ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors):
            self._tensor(tensor)
        own = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for sparse in own + list(attribute.sparse_tensors):
            self._sparse(sparse)
        graphs = ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)
        return sum(self._graph(graph, depth + 1) for graph in graphs)

    def _function(self, key: tuple[str, str], depth: int) -> int:
        """The number of nodes that a call stands for; a function is looked through once."""
        if key in self._open:
            raise self._refusal(f"the function {key[1]!r} calls itself")
        if depth > MAX_DEPTH:
            raise self._refusal(f"its functions are nested deeper than {MAX_DEPTH}")
        if key not in self._sizes:
            function = self._functions[key]
            self._open.add(key)
            for attribute in function.attribute_proto:
                self._attribute(attribute, depth)
            self._sizes[key] = self._nodes(function.node, depth)
            self._open.remove(key)
        return self._sizes[key]

    def _tensor(self, tensor: Any) -> None:
        if tensor.data_location != onnx.TensorProto.DEFAULT or tensor.external_data:
            raise InputError(
                f"{self._name} keeps weights in files outside the graph; only self-contained ONNX files are taken",
                hint="save it as one file: onnx.save(onnx.load(path), path, save_as_external_data=False)",
            )
        self._elements(tensor.dims, tensor.name)

    def _sparse(self, sparse: Any) -> None:
        self._tensor(sparse.values)
        self._tensor(sparse.indices)
        self._elements(sparse.dims, sparse.values.name)

    def _elements(self, dims: Iterable[int], name: str, *, is_stored: bool = True) -> None:
        sizes = list(dims)
        if (is_stored and min(sizes, default=0) < 0) or math.prod(abs(size) for size in sizes) > MAX_ELEMENTS:
            raise self._refusal(f"the tensor {name!r} has the size {sizes}; want at most {MAX_ELEMENTS} elements")

    def _bound(self, nodes: int) -> int:
        if nodes > MAX_NODES:
            raise self._refusal(f"it has more than {MAX_NODES} nodes")
        return nodes

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"{self._name} is refused: {reason}", hint="export it again, with standard operators only")
