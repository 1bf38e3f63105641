"""The guard: which variants lose no more than allowed, jointly, at full confidence.

Candidates stand in an order that was fixed without labels (signal-to-noise of their outputs against the
base on calibration rows, safest first). Each is tested at the full confidence; testing stops at the first
failure, so all certificates hold together without a correction (fixed-sequence procedure). A variant is
certified when its drop *and* its changed answers are bounded below their limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from millrace.core.facts import GuaranteeFacts, Task
from millrace.stats.paired import (
    clopper_pearson_upper,
    noninferior,
    noninferior_errors,
    rows_needed_for_share,
)

DEFAULT_DROP: dict[Task, float] = {"classification": 0.01, "regression": 0.02}
_FLOOR = 1e-6  # probabilities below are all "practically never"
_PERFECT_DB = 200.0


@dataclass(frozen=True)
class Limits:
    """What may be lost, and how sure we must be. `metric` is what the spec's first metric is called."""

    task: Task
    max_drop: float
    max_changed: float
    confidence: float = 0.95
    metric: str = ""


@dataclass(frozen=True)
class Candidate:
    """A variant's answers on the test rows: class indices, or values."""

    name: str
    answers: np.ndarray
    is_replacement: bool = False


def signal_to_noise(base: np.ndarray, other: np.ndarray, task: Task) -> float:
    """How faithfully a variant's outputs follow the base's, in decibels; needs no labels.

    Args:
        base: The base's scores [rows, classes] or values [rows, 1].
        other: The variant's on the same rows.
        task: Classification compares log-probabilities, centred per row (scores, when the rows are
            no probabilities); regression compares values, centred over the rows.

    Returns:
        10·log10 of signal over noise, at most 200; minus infinity for outputs that are not finite.

    Example:
        >>> base = np.array([[0.9, 0.1], [0.2, 0.8]])
        >>> signal_to_noise(base, base, "classification")
        200.0
        >>> 10 < signal_to_noise(base, base + [[0.05, -0.05], [0.0, 0.0]], "classification") < 20
        True
    """
    reference, answer = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if reference.shape != answer.shape or not np.isfinite(answer).all():
        return -math.inf
    axis = 0
    if task == "classification":
        axis = 1
        if _are_probabilities(reference):
            reference, answer = np.log(np.clip(reference, _FLOOR, None)), np.log(np.clip(answer, _FLOOR, None))
        answer = answer - answer.mean(axis=1, keepdims=True)
    else:
        answer = answer - reference.mean(axis=0, keepdims=True)
    reference = reference - reference.mean(axis=axis, keepdims=True)
    signal, noise = float(np.square(reference).sum()), float(np.square(reference - answer).sum())
    if noise <= signal * 10.0 ** (-_PERFECT_DB / 10.0):
        return _PERFECT_DB
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def certify(
    base: np.ndarray, candidates: Sequence[Candidate], expected: np.ndarray, limits: Limits
) -> dict[str, GuaranteeFacts]:
    """Test candidates in the given order and stop at the first that is not certified.

    Args:
        base: The base's answers on held-out rows: class indices [rows] or values [rows].
        candidates: Safest first, in an order that did not look at labels.
        expected: The true class indices or values, [rows].
        limits: What may be lost.

    Returns:
        Name → guarantee with status `certified`, `refused` (it does lose more, or changes more),
        `undecided` (too few rows; `rows_needed`), or `not_tested` (after the first failure).

    Example:
        >>> truth = np.zeros(600, int)
        >>> limits = Limits("classification", max_drop=0.01, max_changed=0.05)
        >>> certify(truth, [Candidate("same", truth)], truth, limits)["same"].status
        'certified'
    """
    guarantees: dict[str, GuaranteeFacts] = {}
    stopped_by = ""
    for candidate in candidates:
        facts = _test(base, candidate, expected, limits)
        if stopped_by:
            facts = _untested(facts, stopped_by)
        elif facts.status != "certified":
            stopped_by = candidate.name
        guarantees[candidate.name] = facts
    return guarantees


def changed_answers(base: np.ndarray, other: np.ndarray, expected: np.ndarray, task: Task) -> np.ndarray:
    """Per row, whether the answer is another one.

    Classification: another class. Regression: moved by more than the base's own mean absolute error.

    Example:
        >>> changed_answers(np.array([1, 2]), np.array([1, 0]), np.array([1, 2]), "classification")
        array([False,  True])
    """
    if task == "classification":
        return np.asarray(base) != np.asarray(other)
    tolerance = float(np.mean(np.abs(np.asarray(base) - expected))) if len(expected) else 0.0
    return ~(np.abs(np.asarray(base) - np.asarray(other)) <= tolerance)


def _test(base: np.ndarray, candidate: Candidate, expected: np.ndarray, limits: Limits) -> GuaranteeFacts:
    rows = len(expected)
    changed = int(changed_answers(base, candidate.answers, expected, limits.task).sum())
    changed_bound = clopper_pearson_upper(changed, rows, limits.confidence)
    if limits.task == "classification":
        paired = noninferior(candidate.answers == expected, base == expected, limits.max_drop, limits.confidence)
        scores = _mean(base == expected), _mean(candidate.answers == expected)
    else:
        errors, base_errors = np.abs(candidate.answers - expected), np.abs(base - expected)
        paired = noninferior_errors(errors, base_errors, limits.max_drop, limits.confidence)
        scores = _mean(base_errors), _mean(errors)
    drop = -paired.difference
    changed_status, changed_rows = _judge_changed(changed, changed_bound, rows, limits, candidate.is_replacement)
    drop_status = {"non_inferior": "certified", "inferior": "refused"}.get(paired.verdict, "undecided")
    if drop_status == "undecided" and drop > limits.max_drop:
        drop_status = "refused"  # the measured loss itself is over the limit
    statuses = {drop_status, changed_status}
    status = next(name for name in ("refused", "undecided", "certified") if name in statuses)
    needed = None
    if status == "undecided":
        asked = [paired.rows_needed if drop_status == "undecided" else None, changed_rows]
        needed = max((count for count in asked if count is not None), default=None)
    facts = GuaranteeFacts(
        status=status,
        metric="accuracy" if limits.task == "classification" else "mae",
        base_score=scores[0],
        score=scores[1],
        drop=drop,
        bound=paired.bound if math.isfinite(paired.bound) else None,
        limit=limits.max_drop,
        confidence=limits.confidence,
        rows=rows,
        changed=changed,
        changed_bound=changed_bound,
        changed_limit=limits.max_changed,
        rows_needed=needed,
    )
    return _explained(facts, limits, candidate.is_replacement, drop_status, changed_status)


def _judge_changed(
    changed: int, bound: float, rows: int, limits: Limits, is_replacement: bool
) -> tuple[str, int | None]:
    if is_replacement or bound <= limits.max_changed:
        return "certified", None  # a replacement is another model: it is certified on its errors alone
    share = changed / rows if rows else 0.0
    if share > limits.max_changed:
        return "refused", None
    return "undecided", rows_needed_for_share(share, limits.max_changed, limits.confidence)


def _untested(facts: GuaranteeFacts, stopped_by: str) -> GuaranteeFacts:
    text = f"not tested: testing stops at the first failure, here {stopped_by}, so that all certificates hold together"
    return msgspec.structs.replace(
        facts, status="not_tested", bound=None, changed_bound=None, rows_needed=None, explanation=text
    )


def _explained(
    facts: GuaranteeFacts, limits: Limits, is_replacement: bool, drop_status: str, changed_status: str
) -> GuaranteeFacts:
    sure = f"{facts.confidence * 100:g} % sure"
    unit = "points of accuracy" if limits.task == "classification" else "% more mean absolute error"
    parts = []
    if facts.status == "certified":
        parts.append(f"loses at most {_percent(facts.bound)} {unit} ({sure}; limit {_percent(facts.limit)})")
        if not is_replacement:
            parts.append(f"at most {_percent(facts.changed_bound)} % of answers change")
    else:
        if drop_status == "refused":
            parts.append(f"lost {_percent(facts.drop)} {unit}, the limit is {_percent(facts.limit)}")
        if changed_status == "refused":
            parts.append(
                f"{facts.changed} of {facts.rows} answers changed, the limit is {_percent(facts.changed_limit)} %"
            )
    if facts.status == "undecided":
        what = (
            f"{facts.rows} rows bound the loss only by {_percent(facts.bound)} {unit} (limit {_percent(facts.limit)})"
            if drop_status == "undecided"
            else f"{facts.rows} rows bound the changed answers only by {_percent(facts.changed_bound)} %"
        )
        needed = f"about {facts.rows_needed} rows needed" if facts.rows_needed else "more rows needed"
        parts.append(f"not enough rows: {needed}; {what}")
    if is_replacement:
        parts.append("a replacement: another model, its answers may differ")
    if limits.task == "classification" and limits.metric not in {"", "accuracy"}:
        parts.append(f"judged by paired accuracy, since {limits.metric} has no bound per row")
    if limits.task == "regression" and limits.metric not in {"", "mae"}:
        parts.append(f"judged by mean absolute error, whose paired bound holds; {limits.metric} has heavy tails")
    return msgspec.structs.replace(facts, explanation="; ".join(parts))


def _percent(share: float | None) -> str:
    return "an unknown number of" if share is None else f"{share * 100:.2f}"


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _are_probabilities(scores: np.ndarray) -> bool:
    if scores.size == 0 or scores.min() < 0.0 or scores.max() > 1.0 + 1e-6:
        return False
    return bool(np.allclose(scores.sum(axis=1), 1.0, atol=1e-3))
