"""`model: auto`: a linear and a boosting baseline compared by the deciding metric, the better one chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from millrace.stats.metrics import METRICS, score
from millrace.train.frameworks import FITS, Fitted, Table
from millrace.train.rows import row_order

SMALL = 200  # with fewer validation rows than this, cross-validation decides
FOLDS = 5


def fold_numbers(answers: np.ndarray, folds: int, seed: int, is_stratified: bool) -> np.ndarray:
    """Which fold each row belongs to; stratified: every class is spread evenly.

    Returns:
        int64 [rows], 0 to folds − 1.

    Example:
        >>> np.bincount(fold_numbers(np.array([0] * 10 + [1] * 5), 5, 0, True)[10:]).tolist()
        [1, 1, 1, 1, 1]
    """
    order = row_order(seed, 0, len(answers))
    if is_stratified:
        order = order[np.argsort(answers[order], kind="stable")]
    numbers = np.empty(len(answers), np.int64)
    numbers[order] = np.arange(len(answers)) % folds
    return numbers


def evaluate_fit(fitted: Fitted, table: Table, features: np.ndarray, answers: np.ndarray, metric: str) -> float:
    """A fitted model's score on other rows of the same table, in the label's unit."""
    found = fitted.predict(features)
    if table.task == "classification":
        return score(metric, answers, found.argmax(axis=1), found)
    return score(metric, answers * table.unit, found * table.unit)


def choose(
    table: Table, metric: str, names: list[str], report: Callable[[int, str], None]
) -> tuple[str, Fitted, list[dict[str, Any]]]:
    """Fit every candidate and keep the best.

    On the validation rows when there are at least 200, else by five-fold cross-validation over training
    and validation rows; ties go to the simpler, which comes first. The chosen one is fitted on the
    training rows.

    Args:
        table: Training and validation rows.
        metric: A key of `METRICS`; decides.
        names: Keys of `FITS`, simplest first.
        report: Called with how many candidates are done and a line for people.

    Returns:
        The chosen name, its model, and a line for each candidate (name, score, chosen, how).
    """
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    held_out = 0 if table.validation_answers is None else len(table.validation_answers)
    is_small = held_out < SMALL and len(table.answers) + held_out >= 2 * FOLDS
    scores: dict[str, float] = {}
    fits: dict[str, Fitted] = {}
    for index, name in enumerate(names):
        report(index, name)
        if len(names) > 1 and is_small:
            scores[name] = _cross_validate(table, name, metric)
            continue
        fits[name] = FITS[name](table)
        scores[name] = _held_out_score(fits[name], table, metric)
    best = max(names, key=lambda name: sign * scores[name] if np.isfinite(scores[name]) else -np.inf)
    how = f"{FOLDS}-fold" if len(names) > 1 and is_small else "validation" if held_out else "training rows"
    fitted = fits[best] if best in fits else FITS[best](table)
    report(len(names), f"{best}: {metric} {scores[best]:.4g}")
    lines = [{"name": name, "score": scores[name], "chosen": name == best, "how": how} for name in names]
    return best, fitted, lines


def _held_out_score(fitted: Fitted, table: Table, metric: str) -> float:
    if table.validation_features is not None and table.validation_answers is not None and len(table.validation_answers):
        return evaluate_fit(fitted, table, table.validation_features, table.validation_answers, metric)
    return evaluate_fit(fitted, table, table.features, table.answers, metric)


def _cross_validate(table: Table, name: str, metric: str) -> float:
    """The mean score over the folds; a fold whose training part lacks a class is left out."""
    whole = _joined(table)
    is_classification = table.task == "classification"
    numbers = fold_numbers(whole.answers, FOLDS, table.seed, is_classification)
    scores = []
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(numbers != fold), np.flatnonzero(numbers == fold)
        if is_classification and len(np.unique(whole.answers[inside])) < len(table.present):
            continue
        fitted = FITS[name](whole.part(inside))
        scores.append(evaluate_fit(fitted, whole, whole.features[outside], whole.answers[outside], metric))
    return float(np.mean(scores)) if scores else float("nan")


def _joined(table: Table) -> Table:
    if table.validation_features is None or table.validation_answers is None:
        return table
    weights = table.weights
    if weights is not None:
        weights = np.concatenate([weights, np.ones(len(table.validation_answers), weights.dtype)])
    return replace(
        table,
        features=np.concatenate([table.features, table.validation_features]),
        answers=np.concatenate([table.answers, table.validation_answers]),
        weights=weights,
        validation_features=None,
        validation_answers=None,
    )
