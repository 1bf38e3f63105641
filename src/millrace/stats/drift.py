"""Drift by effect size, with thresholds calibrated on windows resampled from the reference.

Two statistics per feature, in the same units: Hellinger's distance of the binned counts, and the distance that two
normal distributions have whose means differ as the window's and the reference's do, sqrt(1 - exp(-d²/8)). Both lie
between 0 and 1. A feature's threshold is what windows of the reference itself reach, so that at most the asked
share of *windows* raises an alarm over all features together; the reference's own sampling error is part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from millrace.stats.histogram import CONFIDENCE, MAX_CATEGORIES, PREDICTION, Feature, Histograms, Layout, edges_of

WINDOWS = 2000  # resampled windows per calibration
PRIOR = 0.5  # added to every bin: a value never seen in the reference is rare, not impossible
TOP = 8


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
    binned, shifted = effects(profile, window)
    limits = thresholds(msgspec.msgpack.encode(_sizes(profile)), profile.rows, window.rows, false_alarms)
    ratios = np.maximum(binned / limits[0], shifted / limits[1])
    by_shift = shifted / limits[1] > binned / limits[0]
    scores = np.where(by_shift, shifted, binned)
    bounds = np.where(by_shift, limits[1], limits[0])
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


def effects(reference: Histograms, window: Histograms) -> tuple[np.ndarray, np.ndarray]:
    """Per feature: Hellinger's distance of the bins, and the distance that the shift of the mean stands for."""
    features = reference.layout.features
    binned, shifted = np.zeros(len(features)), np.zeros(len(features))
    for index, feature in enumerate(features):
        binned[index] = hellinger(_shares(reference.counts[index]), _shares(window.counts[index]))
        if feature.kind == "number":
            (mean, sd), (other, _) = reference.moments(index), window.moments(index)
            if sd > 0 and window.counts[index][:-1].sum() > 0:
                shifted[index] = as_distance((other - mean) / sd)
    return binned, shifted


def _shares(counts: np.ndarray) -> np.ndarray:
    smooth = counts + PRIOR
    return smooth / smooth.sum()


def hellinger(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Hellinger's distance along the last axis.

    Example:
        >>> float(hellinger(np.array([1.0, 0.0]), np.array([0.0, 1.0])))
        1.0
    """
    return np.sqrt(np.maximum(1.0 - np.sqrt(left * right).sum(axis=-1), 0.0))


def as_distance(shift: Any) -> Any:
    """Hellinger's distance of two normal distributions whose means differ by `shift` standard deviations.

    Example:
        >>> round(float(as_distance(0.2)), 3)
        0.071
    """
    return np.sqrt(-np.expm1(-np.square(np.minimum(np.abs(shift), 1e6)) / 8.0))


def _sizes(profile: Histograms) -> list[tuple[list[int], bool]]:
    pairs = zip(profile.counts, profile.layout.features, strict=True)
    return [(counts.tolist(), feature.kind == "number") for counts, feature in pairs]


@lru_cache(maxsize=256)
def thresholds(profile: bytes, reference_rows: int, rows: int, false_alarms: float) -> tuple[np.ndarray, np.ndarray]:
    """What windows of the reference itself reach, by resampling with a fixed seed.

    Args:
        profile: The reference's counts, encoded.
        reference_rows: Rows of the reference.
        rows: Rows of the window.
        false_alarms: The share of clean windows that may exceed any threshold.

    Returns:
        Thresholds of the binned distance and of the shift, per feature.
    """
    features: list[tuple[list[int], bool]] = msgspec.msgpack.decode(profile)
    generator = np.random.default_rng(20240501)
    nulls = np.empty((2, len(features), WINDOWS))
    spread = np.sqrt(1.0 / rows + 1.0 / max(reference_rows, 1))
    for index, (counts, is_number) in enumerate(features):
        share = _shares(np.asarray(counts))
        first = generator.multinomial(reference_rows, share, size=WINDOWS) + PRIOR
        second = generator.multinomial(rows, share, size=WINDOWS) + PRIOR
        nulls[0, index] = hellinger(
            first / first.sum(axis=1, keepdims=True), second / second.sum(axis=1, keepdims=True)
        )
        shifts = generator.standard_normal(WINDOWS) * spread
        nulls[1, index] = as_distance(shifts) if is_number else 0.0
    # A scale per feature makes the features comparable; one factor over all of them keeps the windows' rate.
    scales = np.maximum(np.quantile(nulls, 0.95, axis=2), 1e-4)
    largest = (nulls / scales[:, :, None]).max(axis=(0, 1))
    factor = float(np.quantile(largest, 1.0 - false_alarms))
    limits = scales * factor
    return limits[0], limits[1]
