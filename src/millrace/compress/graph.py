"""ONNX graphs as the recipes see them: what kind of model, which weights, which nodes to leave alone."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from millrace.core.errors import CorruptError

PREFIX_KEY = "millrace.preprocess_nodes"
PREFIX = "preprocess/"
_MIN_WEIGHT_ELEMENTS = 256  # smaller tensors are biases and scales: nothing to gain, accuracy to lose
_WEIGHT_OPS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}  # op → position of its weight
_TREE_OPS = frozenset({"TreeEnsembleClassifier", "TreeEnsembleRegressor", "TreeEnsemble"})


@dataclass(frozen=True)
class Weight:
    """A constant that a node multiplies with; `axis` runs over the output channels."""

    name: str
    op_type: str
    axis: int
    elements: int


@dataclass(frozen=True)
class GraphProfile:
    """What decides which recipes apply."""

    weights: tuple[Weight, ...]
    op_types: frozenset[str]
    prefix: frozenset[str]
    has_attention: bool
    opset: int

    @property
    def has_trees(self) -> bool:
        """A tree ensemble: nothing to quantise."""
        return not self.op_types.isdisjoint(_TREE_OPS)

    @property
    def has_conv(self) -> bool:
        """A convolutional network."""
        return any(weight.op_type.startswith("Conv") for weight in self.weights)

    @property
    def has_matmul(self) -> bool:
        """Dense layers with constant weights."""
        return any(weight.op_type in {"Gemm", "MatMul"} for weight in self.weights)


def parse_model(data: bytes) -> onnx.ModelProto:
    """A graph whose nodes all have names of their own.

    Raises:
        CorruptError: The bytes are no ONNX model.

    Example:
        >>> parse_model(b"no model")
        Traceback (most recent call last):
        ...
        millrace.core.errors.CorruptError: the model is not an ONNX file
    """
    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise CorruptError("the model is not an ONNX file", hint="export it again") from error
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}/{index}"
        taken.add(node.name)
    return model


def prefix_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the nodes that prepare the input and are left as they are."""
    listed = next((entry.value for entry in model.metadata_props if entry.key == PREFIX_KEY), "[]")
    named = {node.name for node in model.graph.node if node.name.lstrip("/").startswith(PREFIX)}
    return frozenset(named | set(json.loads(listed)))


def profile_graph(model: onnx.ModelProto) -> GraphProfile:
    """Look at a graph: its weights, its operators, its prefix."""
    prefix = prefix_nodes(model)
    sizes = {
        tensor.name: (int(np.prod(tensor.dims)), tensor.data_type, len(tensor.dims))
        for tensor in model.graph.initializer
    }
    weights: dict[str, Weight] = {}
    op_types: set[str] = set()
    has_attention = False
    for node in model.graph.node:
        if node.name in prefix:
            continue
        op_types.add(node.op_type)
        has_attention = has_attention or node.op_type in {"Attention", "LayerNormalization"}
        position = _WEIGHT_OPS.get(node.op_type)
        if position is None or len(node.input) <= position:
            continue
        name = node.input[position]
        elements, data_type, rank = sizes.get(name, (0, 0, 0))
        if data_type == onnx.TensorProto.FLOAT and elements >= _MIN_WEIGHT_ELEMENTS and rank >= 2:
            weights[name] = Weight(name, node.op_type, _channel_axis(node, rank), elements)
    opset = next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 0)
    return GraphProfile(tuple(weights.values()), frozenset(op_types), prefix, has_attention, opset)


def _channel_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Gemm":
        is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return 0 if is_transposed else 1
    if node.op_type == "ConvTranspose":
        return 1
    return rank - 1 if node.op_type == "MatMul" else 0


def tree_input(model: onnx.ModelProto) -> str | None:
    """The one tensor that feeds all tree ensembles of a graph; None when there is not exactly one."""
    inputs = {node.input[0] for node in model.graph.node if node.op_type in _TREE_OPS}
    return inputs.pop() if len(inputs) == 1 else None


def ancestors(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes, in their order, that are needed to compute `outputs`."""
    ordered = list(nodes)
    wanted = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(ordered):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(name for name in _reads(node) if name)
    return kept[::-1]


def _reads(node: onnx.NodeProto) -> list[str]:
    names = list(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                names += _reads(inner)
            names += [output.name for output in graph.output]
    return names


def canonical_bytes(model: onnx.ModelProto, base: onnx.ModelProto) -> bytes:
    """The bytes of a variant: equal graphs give equal bytes, without paths, dates or tools' notes.

    Args:
        model: The variant as a tool left it; changed in place.
        base: Where metadata (and the list of prefix nodes) comes from.
    """
    graph = model.graph
    live = ancestors(_topological(graph), [output.name for output in graph.output])
    used = {name for node in live for name in _reads(node)} | {output.name for output in graph.output}
    initializers = sorted((entry for entry in graph.initializer if entry.name in used), key=lambda entry: entry.name)
    for tensor in initializers:
        tensor.ClearField("doc_string")
    for node in live:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    domains = {node.domain or "" for node in live}
    opsets = sorted((entry for entry in model.opset_import if entry.domain in domains), key=lambda entry: entry.domain)
    names = {node.name for node in live}
    clean = onnx.ModelProto(ir_version=model.ir_version, producer_name="millrace")
    clean.opset_import.extend(opsets)
    clean.graph.name = base.graph.name
    clean.graph.node.extend(live)
    clean.graph.initializer.extend(initializers)
    clean.graph.input.extend(entry for entry in graph.input if entry.name not in {t.name for t in initializers})
    clean.graph.output.extend(graph.output)
    for entry in sorted(base.metadata_props, key=lambda entry: entry.key):
        value = entry.value
        if entry.key == PREFIX_KEY:
            value = json.dumps([name for name in json.loads(value) if name in names])
        clean.metadata_props.add(key=entry.key, value=value)
    return clean.SerializeToString(deterministic=True)


def _topological(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes so that producers come first; among equals by the name of the first output."""
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needs = [{producer[name] for name in _reads(node) if name in producer} for node in graph.node]
    waiting = [len(sources) for sources in needs]
    readers: dict[int, list[int]] = {}
    for index, sources in enumerate(needs):
        for source in sources:
            readers.setdefault(source, []).append(index)
    keys = [next((name for name in node.output if name), node.name) for node in graph.node]
    ready = [(keys[index], index) for index, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    ordered: list[onnx.NodeProto] = []
    while ready:
        _, index = heapq.heappop(ready)
        ordered.append(graph.node[index])
        for reader in readers.get(index, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, (keys[reader], reader))
    return ordered


def shape_of_work(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """The operators and how much of each type of number they hold: equal for an unchanged graph."""
    operators = sorted((node.op_type, node.domain) for node in model.graph.node if node.op_type != "Constant")
    constants = sorted((str(entry.data_type), str(tuple(entry.dims))) for entry in model.graph.initializer)
    return [*operators, *constants]


def weight_array(model: onnx.ModelProto, name: str) -> np.ndarray:
    """The values of a named initializer."""
    return numpy_helper.to_array(next(entry for entry in model.graph.initializer if entry.name == name))
