"""A smaller tree ensemble: boosting refitted on the training rows in place of the old trees.

It answers differently, so it is a replacement: offered, certified on accuracy, never chosen unasked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from millrace.compress.graph import ancestors, canonical_bytes, tree_input
from millrace.core.errors import InputError
from millrace.core.extras import load, require
from millrace.formats.session import open_session

_MAX_ROWS = 200_000
_MAX_OPSET = 15  # the newest that the converter knows
_EXTRAS = (("lightgbm", "sklearn"), ("onnxmltools", "sklearn"))


@dataclass(frozen=True)
class TrainingRows:
    """Labelled training rows: tensors by input name, class indices (or values), how many classes."""

    tensors: dict[str, np.ndarray]
    labels: np.ndarray
    classes: int  # 0: regression


def refit_trees(model: onnx.ModelProto, training: TrainingRows | None, rounds: int) -> bytes:
    """Replace all trees of a graph by `rounds` rounds of LightGBM; what prepares their input stays.

    Args:
        model: A graph with one output, whose trees all read one float32 tensor.
        training: The rows that the model was trained on.
        rounds: Boosting rounds (times classes = trees).

    Returns:
        The bytes of the new graph: same inputs, same output.

    Raises:
        InputError: The graph does not have that form, or there are no training rows.
        ExtraMissingError: LightGBM or its converter is not installed.
    """
    features = tree_input(model)
    if features is None or len(model.graph.output) != 1:
        raise InputError("the trees do not share one input, or the graph has several outputs")
    if training is None or len(training.labels) == 0:
        raise InputError("no training rows to refit on")
    require(_EXTRAS, "a smaller refit of trees")
    matrix = _features(model, features, training)
    converted = _fit(matrix, training.labels[:_MAX_ROWS], training.classes, rounds, model)
    return canonical_bytes(_splice(model, features, converted), model)


def _features(model: onnx.ModelProto, name: str, training: TrainingRows) -> np.ndarray:
    tensors = {key: value[:_MAX_ROWS] for key, value in training.tensors.items()}
    if name in tensors:
        return tensors[name]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    nodes = ancestors(probe.graph.node, [name])
    del probe.graph.node[:]
    probe.graph.node.extend(nodes)
    return open_session(probe.SerializeToString()).run(tensors)[name]


def _fit(matrix: np.ndarray, labels: np.ndarray, classes: int, rounds: int, model: onnx.ModelProto) -> Any:
    if classes and len(np.unique(labels)) != classes:
        raise InputError("some class has no training row")
    estimator = load("lightgbm:LGBMClassifier" if classes else "lightgbm:LGBMRegressor")(
        n_estimators=rounds,
        num_leaves=15,
        learning_rate=0.2 if rounds <= 30 else 0.1,
        random_state=0,
        n_jobs=1,
        deterministic=True,
        force_row_wise=True,
        verbose=-1,
    )
    estimator.fit(matrix, labels)
    opset = next((entry.version for entry in model.opset_import if entry.domain == ""), _MAX_OPSET)
    float_type = load("onnxmltools.convert.common.data_types:FloatTensorType")
    return load("onnxmltools:convert_lightgbm")(
        estimator,
        initial_types=[("features", float_type([None, matrix.shape[1]]))],
        zipmap=False,
        target_opset=min(opset, _MAX_OPSET),
    )


def _splice(model: onnx.ModelProto, features: str, converted: Any) -> onnx.ModelProto:
    """The base's nodes up to `features`, then the converted graph, under the base's output name."""
    target = model.graph.output[0].name
    source = next((output.name for output in converted.graph.output if output.name != "label"), "variable")
    names = {"features": features, source: target}

    def renamed(name: str) -> str:
        return names.get(name, f"refit/{name}") if name else name

    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(ancestors(model.graph.node, [features]))
    for index, node in enumerate(converted.graph.node):
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"refit/{node.op_type}/{index}"
        copy.input[:] = [renamed(name) for name in node.input]
        copy.output[:] = [renamed(name) for name in node.output]
    for tensor in converted.graph.initializer:
        copy = result.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = renamed(tensor.name)
    known = {entry.domain for entry in result.opset_import}
    result.opset_import.extend(entry for entry in converted.opset_import if entry.domain not in known)
    return result
