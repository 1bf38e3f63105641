"""Putting a graph together: preprocessing, the framework's own graph, and what makes answers of its output."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, compose, helper, inliner, numpy_helper

from millrace.core.errors import CorruptError, StageError
from millrace.formats.signature import TensorSpec
from millrace.train.preprocess import PREFIX, Preprocess, prefix_nodes

OPSET = 17
ML_OPSET = 3
IR_VERSION = 8  # of opset 17
CORE = "model/"
SUFFIX = "postprocess/"
PREFIX_KEY = "millrace.preprocess_nodes"
_DTYPES = {"float32": TensorProto.FLOAT, "string": TensorProto.STRING}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the core's output means.

    `kind` logits → softmax; probabilities of the classes `present` (indices) → spread over all
    `classes`; value → · sd + mean.
    """

    kind: str  # logits | probabilities | value
    classes: int = 0
    present: list[int] = []
    mean: float = 0.0
    sd: float = 1.0

    @property
    def output(self) -> str:
        """The graph's output."""
        return "value" if self.kind == "value" else "probabilities"

    def finish(self, raw: np.ndarray) -> np.ndarray:
        """The same in NumPy: the framework's raw output → what the graph must answer.

        Args:
            raw: [rows, outputs] or [rows].

        Returns:
            float32 [rows, classes] or [rows, 1].

        Example:
            >>> Answer(kind="probabilities", classes=3, present=[0, 2]).finish(np.array([[0.25, 0.75]]))
            array([[0.25, 0.  , 0.75]], dtype=float32)
        """
        raw = raw.astype(np.float64)
        if self.kind == "value":
            return (raw.reshape(-1, 1) * self.sd + self.mean).astype(np.float32)
        if self.kind == "logits":
            powers = np.exp(raw - raw.max(axis=1, keepdims=True))
            return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
        if len(self.present) == self.classes:
            return raw.astype(np.float32)
        spread = np.zeros((len(raw), self.classes), np.float32)
        spread[:, self.present] = raw
        return spread


def assemble(
    core: onnx.ModelProto, inputs: list[TensorSpec], preprocess: Preprocess, answer: Answer, output: str | None = None
) -> bytes:
    """One graph from raw tensors to answers, in bytes that depend on nothing but its content.

    Args:
        core: The framework's graph: one input of features; its functions are inlined.
        inputs: The dataset's tensors.
        preprocess: What comes before.
        answer: What comes after.
        output: Which of the core's outputs; the first when absent.

    Raises:
        StageError: The graph is not a valid ONNX model.
    """
    if core.functions:
        core = inliner.inline_local_functions(core)
    core = compose.add_prefix(core, CORE)
    graph = core.graph
    source = CORE + output if output else graph.output[0].name
    prefix = prefix_nodes(preprocess, graph.input[0].name)
    suffix, constants, shape = _suffix_nodes(answer, source)
    whole = helper.make_graph(
        [*prefix.nodes, *_needed(graph, source), *suffix],
        "millrace",
        [helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], ["rows", *spec.shape[1:]]) for spec in inputs],
        [helper.make_tensor_value_info(answer.output, TensorProto.FLOAT, ["rows", shape])],
        [*prefix.initializers, *graph.initializer, *constants],
    )
    opsets = {entry.domain: entry.version for entry in core.opset_import}
    # converters name the oldest version that would do; the nodes before and after need 17
    opsets = {"": max(opsets.get("", OPSET), OPSET), "ai.onnx.ml": opsets.get("ai.onnx.ml", ML_OPSET)}
    model = helper.make_model(
        whole,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=IR_VERSION if opsets[""] == OPSET else core.ir_version,
        producer_name="millrace",
    )
    untouched = [node.name for node in [*prefix.nodes, *suffix]]
    return canonical(model, {PREFIX_KEY: json.dumps(untouched)})


def _needed(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """The nodes that `output` depends on, in their order."""
    wanted = {output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
            for attribute in node.attribute:  # bodies of If, Loop and Scan read outer tensors
                for inner in [attribute.g, *attribute.graphs]:
                    wanted.update(name for child in inner.node for name in child.input)
    return kept[::-1]


def _suffix_nodes(answer: Answer, source: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], int]:
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: Any, dtype: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), SUFFIX + name))
        return SUFFIX + name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=SUFFIX + op.lower(), **attributes)

    if answer.kind == "logits":
        return [node("Softmax", [source], "probabilities", axis=1)], constants, answer.classes
    if answer.kind == "probabilities":
        if answer.present == list(range(answer.classes)):
            return [node("Identity", [source], "probabilities")], constants, answer.classes
        spread = np.eye(answer.classes, dtype=np.float32)[answer.present]
        return [node("MatMul", [source, constant("classes", spread)], "probabilities")], constants, answer.classes
    column = [-1, 1]
    nodes = [
        node("Reshape", [source, constant("column", column, np.int64)], SUFFIX + "column_out"),
        node("Mul", [SUFFIX + "column_out", constant("sd", answer.sd)], SUFFIX + "scaled"),
        node("Add", [SUFFIX + "scaled", constant("mean", answer.mean)], "value"),
    ]
    return nodes, constants, 1


def canonical(model: onnx.ModelProto, properties: dict[str, str] | None = None) -> bytes:
    """Serialise without anything that names a place or a time: paths, doc strings, stack traces.

    Raises:
        StageError: The model is not valid ONNX.
    """
    model.doc_string = model.producer_version = ""
    del model.metadata_props[:]
    _strip(model.graph)
    for key, value in sorted((properties or {}).items()):
        model.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise StageError(f"the exported graph is not valid ONNX: {str(error)[:300]}") from error
    return model.SerializeToString(deterministic=True)


def _strip(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in [*graph.node, *graph.initializer, *graph.input, *graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = ""
            # touching an absent graph would make it present, and the attribute invalid
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _strip(inner)


def parse(data: bytes, name: str) -> onnx.ModelProto:
    """Read a graph.

    Raises:
        CorruptError: The bytes are no ONNX model.
    """
    try:
        return onnx.load_from_string(data)
    except DecodeError as error:
        raise CorruptError(f"{name} is not an ONNX file") from error


def prefix_names(model: onnx.ModelProto) -> list[str]:
    """The nodes that quantisers leave alone."""
    return [node.name for node in model.graph.node if node.name.startswith((PREFIX, SUFFIX))]
