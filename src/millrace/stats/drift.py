"""Drift by effect size, with thresholds calibrated on windows of the reference.

Two statistics per feature, in the same units: Hellinger's distance of the binned counts, and the distance that two
normal distributions have whose means differ as the mean normal scores of window and reference do,
sqrt(1 - exp(-d²/8)). Both lie between 0 and 1 and depend on bin counts only, so that no single wild value rules them.
`calibration` says what clean windows reach: at most the asked share of *windows* alarms over all features together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from millrace.stats.calibration import Limits, effects_of, limits_of, pad, profile_of
from millrace.stats.histogram import CONFIDENCE, MAX_CATEGORIES, PREDICTION, Feature, Histograms, Layout, edges_of

TOP = 8
CHECK_ROWS = 200  # rows of a window in the check on real rows
CHECK_SPLITS = 12
CHECK_MOST_ROWS = 2000
CHECK_LEVEL = 0.02  # only how many windows are drawn depends on it


class FeatureScore(msgspec.Struct, frozen=True, kw_only=True):
    """One feature's effect size against its threshold."""

    name: str
    score: float
    threshold: float


class DriftVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A window judged. `score` and `threshold` are of the strongest feature; `scores` of all."""

    score: float
    threshold: float
    is_alert: bool
    rows: int
    top: list[FeatureScore] = []
    scores: dict[str, float] = {}


def build_reference(
    tensors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], signature: Any
) -> dict[str, Any]:
    """The profile of held-out rows: histograms of every feature and of the answers.

    Args:
        tensors: Inputs by name, [rows, columns].
        outputs: The model's outputs by name on these rows.
        signature: `formats.signature.Signature`: names, columns, classes.

    Returns:
        Plain data: `rows` and `histograms`.
    """
    inputs = [feature for spec in signature.inputs for feature in _input_features(spec, tensors[spec.name])]
    layout = Layout(inputs=inputs, outputs=_output_features(signature, outputs))
    histograms = Histograms(layout)
    histograms.add(tensors, outputs)
    return {"rows": histograms.rows, "histograms": histograms.to_dict()}


def _input_features(spec: Any, array: np.ndarray) -> list[Feature]:
    flat = array.reshape(len(array), -1)
    features = []
    for column in range(flat.shape[1]):
        if spec.semantic == "image":
            name = f"pixel {column}"
        else:
            name = spec.columns[column] if column < len(spec.columns) else f"{spec.name}[{column}]"
        values = flat[:, column]
        if spec.dtype == "string":
            found, counts = np.unique(values.astype(str), return_counts=True)
            order = np.lexsort((found, -counts))[:MAX_CATEGORIES]
            known = sorted(str(found[index]) for index in order if found[index] != "")
            features.append(Feature(name=name, kind="category", tensor=spec.name, column=column, categories=known))
        else:
            numbers = values.astype(np.float64)
            features.append(Feature(name=name, kind="number", tensor=spec.name, column=column, edges=edges_of(numbers)))
    return features


def _output_features(signature: Any, outputs: Mapping[str, np.ndarray]) -> list[Feature]:
    spec = signature.outputs[0]
    flat = outputs[spec.name].reshape(len(outputs[spec.name]), -1)
    if signature.task == "regression":
        edges = edges_of(flat[:, 0].astype(np.float64))
        return [Feature(name=PREDICTION, kind="number", tensor=spec.name, edges=edges)]
    return [
        Feature(name=PREDICTION, kind="category", tensor=spec.name, categories=list(signature.classes)),
        Feature(name=CONFIDENCE, kind="number", tensor=spec.name, edges=edges_of(flat.max(axis=1).astype(np.float64))),
    ]


def judge(reference: Mapping[str, Any], window: Histograms, false_alarms: float = 0.02) -> DriftVerdict:
    """Compare a window with the reference.

    Args:
        reference: As `build_reference` makes it.
        window: Histograms of the same layout.
        false_alarms: The share of clean windows that may alarm.

    Returns:
        The verdict; never an alert when the window or the reference has no rows.
    """
    if not reference or window.rows == 0:
        return DriftVerdict(score=0.0, threshold=1.0, is_alert=False, rows=window.rows)
    profile = Histograms.from_dict(reference["histograms"])
    names = [feature.name for feature in profile.layout.features]
    binned, shifted, limits = _effects(profile, window, false_alarms)
    by_bins, by_mean = binned / limits.binned, shifted / limits.shifted
    ratios, by_shift = np.maximum(by_bins, by_mean), by_mean > by_bins
    scores = np.where(by_shift, shifted, binned)
    bounds = np.minimum(np.where(by_shift, limits.shifted, limits.binned), 1.0)
    # Beyond its threshold the larger effect counts, not the larger ratio.
    order = sorted(
        range(len(names)),
        key=lambda index: (ratios[index] <= 1.0, -scores[index] if ratios[index] > 1.0 else -ratios[index]),
    )
    top = [
        FeatureScore(name=names[index], score=float(scores[index]), threshold=float(bounds[index]))
        for index in order[:TOP]
    ]
    return DriftVerdict(
        score=top[0].score,
        threshold=top[0].threshold,
        is_alert=bool(ratios.max() > 1.0),
        rows=window.rows,
        top=top,
        scores={name: float(score) for name, score in zip(names, scores, strict=True)},
    )


def _effects(profile: Histograms, window: Histograms, false_alarms: float) -> tuple[np.ndarray, np.ndarray, Limits]:
    """Both effect sizes of every feature and their limits.

    Raises:
        ValueError: The window counts other features than the reference.
    """
    if window.layout != profile.layout:
        raise ValueError("the window counts other features than the reference")
    ordered = [feature.kind == "number" for feature in profile.layout.features]
    binned, shifted = effects_of(profile_of(profile.counts, ordered), pad(window.counts))
    return binned, shifted, limits_of(profile.counts, ordered, window.rows, false_alarms)
