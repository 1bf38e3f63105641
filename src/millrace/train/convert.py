"""From scikit-learn and LightGBM to ONNX graphs of one float32 tensor of features."""

from __future__ import annotations

import warnings
from typing import Any

import lightgbm
import numpy as np
import onnx
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType as BoosterFloats
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator

from millrace.core.errors import StageError
from millrace.train.graphs import ML_OPSET, OPSET

BOOSTER_OPSET = 15  # the newest that onnxmltools writes
INPUT = "features"
_FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, KeyError, IndexError)


def convert_estimator(estimator: Any, features: int, is_classifier: bool) -> tuple[onnx.ModelProto, str]:
    """A fitted scikit-learn estimator or pipeline as a graph.

    Args:
        estimator: Fitted on float32 [rows, features].
        features: Its width.
        is_classifier: Whether it gives probabilities.

    Returns:
        The graph, and the name of the output: probabilities [rows, classes] or values [rows, 1].

    Raises:
        StageError: There is no converter for it.
    """
    options = {id(estimator): {"zipmap": False}} if is_classifier else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            graph = convert_sklearn(
                estimator,
                initial_types=[(INPUT, FloatTensorType([None, features]))],
                options=options,
                target_opset={"": OPSET, "ai.onnx.ml": ML_OPSET},
            )
    except (MissingConverter, MissingShapeCalculator, *_FAILURES) as error:
        cause = " ".join(str(error).split())[:200]
        raise StageError(
            f"{type(estimator).__name__} cannot be converted to ONNX: {cause}",
            hint="use an estimator that skl2onnx supports (linear models, forests, SVC, MLP, …) or LightGBM",
        ) from error
    assert isinstance(graph, onnx.ModelProto)
    return graph, _answer_output(graph)


def convert_booster(booster: lightgbm.Booster, features: int) -> tuple[onnx.ModelProto, str]:
    """A LightGBM booster as a graph; see `float32_thresholds`.

    Returns:
        The graph, and the name of the output: probabilities [rows, classes] or values [rows, 1].

    Raises:
        StageError: The converter cannot do it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            graph = convert_lightgbm(
                float32_thresholds(booster),
                initial_types=[(INPUT, BoosterFloats([None, features]))],
                zipmap=False,
                target_opset=BOOSTER_OPSET,  # a number: it refuses the mapping it documents
            )
    except _FAILURES as error:
        cause = " ".join(str(error).split())[:200]
        raise StageError(f"the LightGBM model cannot be converted to ONNX: {cause}") from error
    assert isinstance(graph, onnx.ModelProto)
    return graph, _answer_output(graph)


def _answer_output(graph: onnx.ModelProto) -> str:
    """The output that is no class label."""
    return next(output.name for output in graph.graph.output if output.name not in ("label", "output_label"))


def float32_thresholds(booster: lightgbm.Booster) -> lightgbm.Booster:
    """The same trees with every threshold rounded down to a float32.

    LightGBM compares x ≤ t in double, the graph in float32. For a float32 x, x ≤ t holds exactly when
    x ≤ (the largest float32 that is not above t) does; rounding to the nearest would move rows that
    lie on a threshold to the other side.
    """
    lines = []
    for line in booster.model_to_string(num_iteration=booster.best_iteration or None).splitlines():
        if line.startswith("tree_sizes="):
            continue  # in bytes, which change; without them the reader goes by the blank lines
        if line.startswith("threshold="):
            line = "threshold=" + " ".join(repr(_floor32(float(text))) for text in line[10:].split())
        lines.append(line)
    return lightgbm.Booster(model_str="\n".join(lines) + "\n")


def _floor32(value: float) -> float:
    """The largest float32 that is not above `value`."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf)))
