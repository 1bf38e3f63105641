"""The catalogue: how a variant is made, and for which graphs a recipe is worth trying.

Never the tools' defaults: static s8s8 runs at 0.7x on x86 without VNNI, dynamic int8 of a CNN at 0.2x anywhere,
and full-range u8s8 weights saturate without VNNI (the accuracy stays, 8.7 % of the answers change). Hence u8s8
with `reduce_range` (7-bit weights) everywhere; the full range only by name, and only where VNNI is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization import quantize_static as ort_quantize_static

from millrace.compress.graph import GraphProfile, canonical_bytes, parse_model, profile_graph, weight_array
from millrace.compress.trees import TrainingRows, refit_trees
from millrace.formats.cpu import has_vnni
from millrace.formats.session import open_session

Tensors = Mapping[str, np.ndarray]
DYNAMIC = "uint8-dynamic"  # ranges are found in each batch, so a row's answer depends on the rows beside it
_CALIBRATION_BATCH = 64
_DENSE_OPS = ["Gemm", "MatMul"]
# in a CNN the operators between two convolutions stay in 8 bits as well, or every layer converts twice
_CNN_OPS = ["Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat",
            "Flatten", "Reshape"]  # fmt: skip
_PREPARED_MARK = "onnx.quant.pre_process"  # tells onnxruntime that its advice to prepare the graph was followed


@dataclass
class Material:
    """What recipes work on. `calibration` are unlabelled rows, never test rows."""

    data: bytes
    calibration: Tensors
    training: TrainingRows | None = None
    model: onnx.ModelProto = field(init=False)
    profile: GraphProfile = field(init=False)
    _optimized: bytes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model = parse_model(self.data)
        self.profile = profile_graph(self.model)

    def optimized(self) -> bytes:
        """The graph after standard fusions (batch norm into convolutions, constants folded)."""
        if self._optimized is None:
            with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
                path = Path(folder) / "optimized.onnx"
                open_session(self.model.SerializeToString(), optimized_path=path)
                self._optimized = canonical_bytes(parse_model(path.read_bytes()), self.model)
        return self._optimized


@dataclass(frozen=True)
class Recipe:
    """One way to a variant. `refuses` gives the reason why a graph is left out, or None."""

    name: str
    title: str
    weights: str
    acts: str
    refuses: Callable[[GraphProfile], str | None]
    build: Callable[[Material], bytes]
    reduce_range: bool = False
    needs_vnni: bool = False
    is_replacement: bool = False
    is_automatic: bool = True


# --------------------------------------------------------------------------- graph optimisation


def optimize_graph(material: Material) -> bytes:
    """onnxruntime's standard fusions, written once instead of at every load."""
    return material.optimized()


# --------------------------------------------------------------------------- int8 by onnxruntime


class _Rows(CalibrationDataReader):
    def __init__(self, tensors: Tensors) -> None:
        self._batches = _batches(tensors)

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def _batches(tensors: Tensors) -> Iterator[dict[str, np.ndarray]]:
    rows = len(next(iter(tensors.values())))
    for start in range(0, rows, _CALIBRATION_BATCH):
        yield {name: array[start : start + _CALIBRATION_BATCH] for name, array in tensors.items()}


def _prepared(material: Material) -> onnx.ModelProto:
    # fusions rename nodes: where the prefix has something to quantise, it must stay recognisable
    has_risk = any(n.op_type in _CNN_OPS[:3] for n in material.model.graph.node if n.name in material.profile.prefix)
    source = material.model.SerializeToString() if has_risk else material.optimized()
    model = onnx.shape_inference.infer_shapes(parse_model(source))
    model.metadata_props.add(key=_PREPARED_MARK, value="onnxruntime.quant")
    return model


def quantize_dynamically(material: Material) -> bytes:
    """Weights per channel in 7 bits, activations in 8 bits with a range found at every call."""
    model = _prepared(material)
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        path = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],  # Gemm is rewritten to MatMul + Add first
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[name + end for name in sorted(material.profile.prefix) for end in ("", "_MatMul")],
            extra_options={"MatMulConstBOnly": True},
        )
        return canonical_bytes(parse_model(path.read_bytes()), material.model)


def _quantize_statically(material: Material, reduce_range: bool) -> bytes:
    model = _prepared(material)
    is_cnn = material.profile.has_conv
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        path = Path(folder) / "static.onnx"
        ort_quantize_static(
            model,
            path,
            _Rows(material.calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_CNN_OPS if is_cnn else _DENSE_OPS,
            per_channel=is_cnn,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=sorted(material.profile.prefix),
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
        )
        quantized = parse_model(path.read_bytes())
    _free_tail(quantized, frozenset(_CNN_OPS))
    return canonical_bytes(quantized, material.model)


def quantize_statically(material: Material) -> bytes:
    """u8s8 QDQ with 7-bit weights, calibrated by minimum and maximum on unlabelled rows."""
    return _quantize_statically(material, reduce_range=True)


def quantize_statically_full(material: Material) -> bytes:
    """u8s8 QDQ with 8-bit weights: exact only where products are added in 32 bits (VNNI)."""
    return _quantize_statically(material, reduce_range=False)


def _free_tail(model: onnx.ModelProto, quantized_ops: frozenset[str]) -> None:
    """Do not squeeze into 8 bits what only float operators (softmax, the output) read: it buys no time."""
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    outputs = {output.name for output in graph.output}
    for node in list(graph.node):
        source = producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is None or source.op_type != "QuantizeLinear":
            continue
        readers = [reader for reader in graph.node if node.output[0] in reader.input]
        if any(reader.op_type in quantized_ops for reader in readers):
            continue
        _rename(graph, source.input[0], node.output[0], to_reader=node.output[0] in outputs)
        graph.node.remove(node)


def _rename(graph: onnx.GraphProto, kept: str, replaced: str, to_reader: bool) -> None:
    """Let readers of `replaced` read `kept`; a graph output keeps its name, so its producer takes it."""
    old, new = (kept, replaced) if to_reader else (replaced, kept)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        for index, name in enumerate(node.output):
            if name == old and to_reader:
                node.output[index] = new


# --------------------------------------------------------------------------- int8 in the file only


def store_weights(material: Material) -> bytes:
    """Weights as int8 with a scale per channel, multiplied out again when the file is loaded.

    Cast and Mul of constants are folded by the runtime; DequantizeLinear would run at every call.
    """
    model = onnx.ModelProto()
    model.CopyFrom(material.model)
    for weight in material.profile.weights:
        values = weight_array(model, weight.name).astype(np.float32)
        axes = tuple(axis for axis in range(values.ndim) if axis != weight.axis)
        peak = np.abs(values).max(axis=axes, keepdims=True)
        scale = np.where(peak > 0.0, peak / 127.0, 1.0).astype(np.float32)
        stored = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
        entry = next(entry for entry in model.graph.initializer if entry.name == weight.name)
        model.graph.initializer.remove(entry)
        small, wide, factor = (f"{weight.name}/{part}" for part in ("int8", "cast", "scale"))
        model.graph.initializer.append(numpy_helper.from_array(stored, small))
        model.graph.initializer.append(numpy_helper.from_array(scale, factor))
        model.graph.node.append(helper.make_node("Cast", [small], [wide], name=wide, to=onnx.TensorProto.FLOAT))
        model.graph.node.append(helper.make_node("Mul", [wide, factor], [weight.name], name=f"{weight.name}/mul"))
    return canonical_bytes(model, material.model)


# --------------------------------------------------------------------------- which graphs


def _refuses_optimize(profile: GraphProfile) -> str | None:
    return "tree ensembles have nothing to fuse" if profile.has_trees else None


def _refuses_weights(profile: GraphProfile) -> str | None:
    if profile.has_trees:
        return "tree ensembles are not quantised"
    return None if profile.weights else "no weights of 256 numbers or more"


def _refuses_dynamic(profile: GraphProfile) -> str | None:
    if profile.has_conv:
        return "dynamic int8 runs convolutions 5 to 7 times slower"
    return _refuses_dense(profile)


def _refuses_static(profile: GraphProfile) -> str | None:
    if profile.has_attention:
        return "static int8 changes 15 % of an encoder's answers; dynamic int8 is the recipe there"
    if profile.has_conv and profile.opset < 13:
        return f"per-channel int8 needs opset 13, this graph has {profile.opset}"
    return None if profile.has_conv else _refuses_dense(profile)


def _refuses_static_full(profile: GraphProfile) -> str | None:
    if not has_vnni():
        return "full-range u8s8 saturates on this processor: it has no VNNI"
    return _refuses_static(profile)


def _refuses_dense(profile: GraphProfile) -> str | None:
    if profile.has_trees:
        return "tree ensembles are not quantised"
    return None if profile.has_matmul else "no dense layer with 256 weights or more"


def _refuses_refit(profile: GraphProfile) -> str | None:
    return None if profile.has_trees else "only tree ensembles are replaced by a smaller refit"


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32-optimized", "graph optimisation", "float32", "float32", _refuses_optimize, optimize_graph),
        Recipe("int8-weights", "weights stored in 8 bits", "int8", "float32", _refuses_weights, store_weights),
        Recipe("int8-dynamic", "dynamic int8", "int8", DYNAMIC, _refuses_dynamic, quantize_dynamically,
               reduce_range=True),
        Recipe("int8-static", "static int8", "int8", "uint8", _refuses_static, quantize_statically, reduce_range=True),
        Recipe("int8-static-full", "static int8, full range, VNNI only", "int8", "uint8", _refuses_static_full,
               quantize_statically_full, needs_vnni=True, is_automatic=False),
        Recipe("trees-60", "refit as 60 rounds of boosting", "float32", "float32", _refuses_refit,
               lambda material: refit_trees(material.model, material.training, rounds=60), is_replacement=True),
        Recipe("trees-25", "refit as 25 rounds of boosting", "float32", "float32", _refuses_refit,
               lambda material: refit_trees(material.model, material.training, rounds=25), is_replacement=True),
    )
}  # fmt: skip
"""Recipe by name, the table that documentation and `compress.variants` refer to."""
