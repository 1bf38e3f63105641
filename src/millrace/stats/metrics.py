"""Metrics of answers against what was expected, each with a confidence interval; numpy only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from millrace.core.errors import InputError
from millrace.core.facts import Task

_RESAMPLES = 1000
_RESAMPLED_VALUES = 20_000_000  # rows × resamples at most: keeps a bootstrap within seconds
_SMALLEST_PROBABILITY = 1e-15

Function = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], float]


class Metric(NamedTuple):
    """A metric: what computes it, for which task, and whether more is better.

    `interval` names how its interval is found: wilson (a share of rows), mean (a mean over rows),
    confusion (resampled confusion matrices) or rows (resampled rows).
    """

    function: Function
    task: Task
    higher_is_better: bool
    interval: str
    needs_probabilities: bool = False
    description: str = ""


def accuracy(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The share of right answers.

    Example:
        >>> accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
        0.75
    """
    return float(np.mean(expected == answers))


def confusion_matrix(expected: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """How often class i (row) was answered as j (column).

    Args:
        expected: int64 [rows], class indices.
        answers: int64 [rows], class indices.
        classes: How many classes there are.

    Returns:
        int64 [classes, classes].

    Example:
        >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    flat = np.bincount(expected.astype(np.int64) * classes + answers.astype(np.int64), minlength=classes * classes)
    return flat.reshape(classes, classes)


def _f1_of(confusion: np.ndarray) -> np.ndarray:
    """Macro F1 of [..., classes, classes]: over the classes that occur in rows or answers."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-1) + confusion.sum(-2)
    present = both > 0
    scores = np.where(present, 2 * right / np.maximum(both, 1), 0.0)
    return scores.sum(-1) / np.maximum(present.sum(-1), 1)


def _recall_of(confusion: np.ndarray) -> np.ndarray:
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    rows = confusion.sum(-1)
    present = rows > 0
    return np.where(present, right / np.maximum(rows, 1), 0.0).sum(-1) / np.maximum(present.sum(-1), 1)


def _confusion(expected: np.ndarray, answers: np.ndarray) -> np.ndarray:
    classes = int(max(expected.max(initial=0), answers.max(initial=0))) + 1
    return confusion_matrix(expected, answers, classes)


def macro_f1(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The mean over the classes of 2·precision·recall / (precision + recall).

    Example:
        >>> round(macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1])), 3)
        0.667
    """
    return float(_f1_of(_confusion(expected, answers)))


def balanced_accuracy(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The mean over the classes of the share of right answers among their rows.

    Example:
        >>> balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]))
        0.5
    """
    return float(_recall_of(_confusion(expected, answers)))


def _row_losses(expected: np.ndarray, probabilities: np.ndarray | None) -> np.ndarray:
    assert probabilities is not None
    chosen = probabilities[np.arange(len(expected)), expected.astype(np.int64)]
    return -np.log(np.maximum(chosen.astype(np.float64), _SMALLEST_PROBABILITY))


def log_loss(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The mean of −ln(probability of the expected class), in nats.

    Example:
        >>> round(log_loss(np.array([0]), np.array([0]), np.array([[0.5, 0.5]])), 4)
        0.6931
    """
    return float(np.mean(_row_losses(expected, probabilities)))


def auc(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The area under the ROC curve; with more than two classes the mean of one against the rest.

    Ties count a half (Mann and Whitney, 1947). Classes without rows, or without others, are left out.

    Example:
        >>> p = np.array([0.1, 0.4, 0.35, 0.8])
        >>> auc(np.array([0, 0, 1, 1]), p > 0.5, np.stack([1 - p, p], axis=1))
        0.75
    """
    assert probabilities is not None
    classes = probabilities.shape[1]
    areas = [_area(expected == index, probabilities[:, index]) for index in (range(classes) if classes > 2 else [1])]
    known = [area for area in areas if not math.isnan(area)]
    return float(np.mean(known)) if known else 0.5


def _area(positive: np.ndarray, values: np.ndarray) -> float:
    count = int(positive.sum())
    others = len(positive) - count
    if count == 0 or others == 0:
        return math.nan
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.cumsum(sizes) - (sizes - 1) / 2.0
    return float((rank[group][positive].sum() - count * (count + 1) / 2.0) / (count * others))


def _errors(expected: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return answers.astype(np.float64) - expected.astype(np.float64)


def mae(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The mean absolute error, in the label's unit.

    Example:
        >>> mae(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
        1.5
    """
    return float(np.mean(np.abs(_errors(expected, answers))))


def rmse(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The root of the mean squared error, in the label's unit.

    Example:
        >>> rmse(np.array([0.0, 0.0]), np.array([3.0, -3.0]))
        3.0
    """
    return float(np.sqrt(np.mean(_errors(expected, answers) ** 2)))


def r2(expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """The share of the variance that the answers explain; 0 where the expected values are all equal.

    Example:
        >>> r2(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
        1.0
    """
    total = float(np.sum((expected.astype(np.float64) - np.mean(expected, dtype=np.float64)) ** 2))
    return 1.0 - float(np.sum(_errors(expected, answers) ** 2)) / total if total > 0 else 0.0


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, "classification", True, "wilson", description="share of right answers"),
    "macro_f1": Metric(macro_f1, "classification", True, "confusion", description="mean F1 over the classes"),
    "balanced_accuracy": Metric(
        balanced_accuracy, "classification", True, "confusion", description="mean recall over the classes"
    ),
    "log_loss": Metric(log_loss, "classification", False, "mean", True, "mean -ln(probability of what was expected)"),
    "auc": Metric(auc, "classification", True, "rows", True, "area under the ROC curve, one against the rest"),
    "mae": Metric(mae, "regression", False, "mean", description="mean absolute error, in the label's unit"),
    "rmse": Metric(rmse, "regression", False, "mean", description="root mean squared error, in the label's unit"),
    "r2": Metric(r2, "regression", True, "rows", description="share of the variance explained"),
}
_CONFUSIONS = {"macro_f1": _f1_of, "balanced_accuracy": _recall_of}


def default_metrics(task: Task) -> list[str]:
    """What is measured when the spec names nothing; the first decides.

    Example:
        >>> default_metrics("regression")
        ['mae', 'rmse', 'r2']
    """
    return ["accuracy", "macro_f1"] if task == "classification" else ["mae", "rmse", "r2"]


def chosen_metrics(names: list[str], task: Task) -> list[str]:
    """The spec's metrics, checked against the task, or the defaults.

    Raises:
        InputError: There is no such metric, or it is for the other task.

    Example:
        >>> chosen_metrics(["acuracy"], "classification")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: evaluate.metrics: there is no classification metric 'acuracy'
    """
    possible = [name for name, metric in METRICS.items() if metric.task == task]
    for name in names:
        if name not in possible:
            near = difflib.get_close_matches(name, possible, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"evaluate.metrics: there is no {task} metric {name!r}", hint=f"{hint}want one of {', '.join(possible)}"
            )
    return list(dict.fromkeys(names)) or default_metrics(task)


def score(name: str, expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None) -> float:
    """A metric's value.

    Args:
        name: A key of `METRICS`.
        expected: [rows], class indices or values.
        answers: [rows], class indices or values.
        probabilities: [rows, classes], where the metric needs them.

    Returns:
        The value; NaN without rows.

    Example:
        >>> score("accuracy", np.array([1, 0]), np.array([1, 1]))
        0.5
    """
    if len(expected) == 0:
        return math.nan
    return METRICS[name].function(expected, answers, probabilities)


def wilson(right: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        right: How many rows count.
        rows: Of how many.
        confidence: Two-sided.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Example:
        >>> low, high = wilson(594, 600)
        >>> round(low, 4), round(high, 4)
        (0.9784, 0.9954)
    """
    if rows == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = right / rows
    centre = share + z * z / (2 * rows)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def interval(
    name: str,
    expected: np.ndarray,
    answers: np.ndarray,
    probabilities: np.ndarray | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """A two-sided confidence interval of a metric; the same arguments give the same numbers.

    Accuracy: Wilson. Means over rows: normal, on the mean (rmse: on the mean square). F1 and balanced
    accuracy: a bootstrap of the confusion matrix. AUC and R²: a bootstrap of the rows.

    Returns:
        (low, high); they enclose the value. (NaN, NaN) without rows.

    Example:
        >>> low, high = interval("mae", np.zeros(100), np.arange(100) % 2)
        >>> low < 0.5 < high
        True
    """
    rows = len(expected)
    if rows == 0:
        return math.nan, math.nan
    kind = METRICS[name].interval
    if kind == "wilson":
        return wilson(int(np.sum(expected == answers)), rows, confidence)
    if kind == "mean":
        return _mean_interval(name, expected, answers, probabilities, confidence)
    random = np.random.Generator(np.random.Philox(key=seed))
    tail = (1 - confidence) / 2
    if kind == "confusion":
        matrix = _confusion(expected, answers)
        drawn = random.multinomial(rows, matrix.ravel() / rows, size=_RESAMPLES)
        values = _CONFUSIONS[name](drawn.reshape(-1, *matrix.shape))
    else:
        count = max(20, min(_RESAMPLES, _RESAMPLED_VALUES // rows))
        chosen = (random.integers(rows, size=rows) for _ in range(count))
        values = np.array([_score_rows(name, expected, answers, probabilities, index) for index in chosen])
    low, high = np.quantile(values, [tail, 1 - tail])
    value = score(name, expected, answers, probabilities)
    return min(float(low), value), max(float(high), value)


def chance_margin(
    name: str, expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None = None
) -> float:
    """From a score to the worse end of its 95 % interval; 0 for AUC and R², where that would take long.

    Example:
        >>> round(chance_margin("accuracy", np.zeros(150), np.zeros(150)), 3)
        0.025
    """
    if len(expected) == 0 or METRICS[name].interval == "rows":
        return 0.0
    low, high = interval(name, expected, answers, probabilities)
    value = score(name, expected, answers, probabilities)
    return value - low if METRICS[name].higher_is_better else high - value


def _score_rows(
    name: str, expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None, index: np.ndarray
) -> float:
    return score(name, expected[index], answers[index], None if probabilities is None else probabilities[index])


def _mean_interval(
    name: str, expected: np.ndarray, answers: np.ndarray, probabilities: np.ndarray | None, confidence: float
) -> tuple[float, float]:
    if name == "log_loss":
        values = _row_losses(expected, probabilities)
    else:
        errors = np.abs(_errors(expected, answers))
        values = errors**2 if name == "rmse" else errors
    mean = float(values.mean())
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    spread = NormalDist().inv_cdf(0.5 + confidence / 2) * deviation / math.sqrt(len(values))
    low, high = max(0.0, mean - spread), mean + spread
    return (math.sqrt(low), math.sqrt(high)) if name == "rmse" else (low, high)
