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
from millrace.stats.histogram import CONFIDENCE, PREDICTION, Feature, Histograms, Layout, edges_of, top_categories

TOP = 8
CHECK_ROWS = 200  # rows of a window in the check on real rows
CHECK_SPLITS = 60
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
        Plain data: `rows`, `histograms`, and `check`: what windows of these very rows do (see `check_halves`).
    """
    inputs = [feature for spec in signature.inputs for feature in _input_features(spec, tensors[spec.name])]
    layout = Layout(inputs=inputs, outputs=_output_features(signature, outputs))
    histograms = Histograms(layout)
    histograms.add(tensors, outputs)
    check = check_halves(tensors, outputs, layout)
    return {"rows": histograms.rows, "histograms": histograms.to_dict(), "check": check}


def check_halves(
    tensors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, Any]:
    """Real windows against real references: one half of the rows is profiled, windows of the other half are judged.

    Nothing is drawn from a distribution here, so this can contradict the calibration. The bins are those of all rows.

    Returns:
        `window_rows`, and `levels`: per window the smallest share of false alarms at which it would alarm.
        Empty with too few rows to say anything.
    """
    total = min(_rows_of(tensors), CHECK_MOST_ROWS)
    half = total // 2
    if half < 50:
        return {}
    window_rows, columns = min(CHECK_ROWS, half), len(layout.features)
    splits = max(20, min(CHECK_SPLITS, 20_000 // max(columns, 1)))
    generator = np.random.default_rng(20240502)
    ordered = [feature.kind == "number" for feature in layout.features]
    limits: Limits | None = None
    levels = []
    for _ in range(splits):
        order = generator.permutation(_rows_of(tensors))[:total]
        counts = _count_rows(tensors, outputs, layout, order[:half]).counts
        # Halves differ by chance only: the first one's limits serve them all, they take most of the time.
        limits = limits or limits_of(counts, ordered, window_rows, CHECK_LEVEL)
        window = _count_rows(tensors, outputs, layout, order[half : half + window_rows])
        levels.append(round(limits.level(*effects_of(profile_of(counts, ordered), pad(window.counts))), 4))
    return {"window_rows": window_rows, "levels": levels}


def _rows_of(tensors: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(tensors.values())))


def _count_rows(
    tensors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], layout: Layout, rows: np.ndarray
) -> Histograms:
    histograms = Histograms(layout)
    histograms.add(
        {name: array[rows] for name, array in tensors.items()}, {name: array[rows] for name, array in outputs.items()}
    )
    return histograms


def measured_false_alarms(reference: Mapping[str, Any], false_alarms: float) -> float | None:
    """The share of real windows of the reference that would alarm; None when there were too few rows to measure.

    Example:
        >>> measured_false_alarms({"check": {"window_rows": 200, "levels": [0.5, 0.01, 1.0, 0.3]}}, 0.02)
        0.25
    """
    levels = reference.get("check", {}).get("levels")
    return sum(level < false_alarms for level in levels) / len(levels) if levels else None


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
            known = top_categories(values)
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
