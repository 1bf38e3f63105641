"""Metrics against scikit-learn's and against hand counts; intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from millrace.core.errors import InputError
from millrace.stats.metrics import METRICS, chosen_metrics, confusion_matrix, interval, score, wilson


def drawn(seed: int, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(classes), rows)
    return random.integers(classes, size=rows), probabilities.argmax(1), probabilities


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(5, 80), classes=st.integers(2, 6))
def test_classification_metrics_equal_scikit_learn(seed: int, rows: int, classes: int) -> None:
    expected, answers, probabilities = drawn(seed, rows, classes)
    labels = sorted(set(expected) | set(answers))
    assert score("accuracy", expected, answers) == pytest.approx(sk.accuracy_score(expected, answers))
    theirs = sk.f1_score(expected, answers, average="macro", labels=labels, zero_division=0)
    assert score("macro_f1", expected, answers) == pytest.approx(theirs)
    theirs = sk.recall_score(expected, answers, average="macro", labels=np.unique(expected), zero_division=0)
    assert score("balanced_accuracy", expected, answers) == pytest.approx(theirs)
    theirs = sk.log_loss(expected, probabilities, labels=range(classes))
    assert score("log_loss", expected, answers, probabilities) == pytest.approx(theirs)
    assert confusion_matrix(expected, answers, classes).sum() == rows


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(4, 60))
def test_auc_equals_scikit_learn_with_ties(seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    expected = np.concatenate([[0, 1], random.integers(2, size=rows)])
    chance = random.integers(6, size=rows + 2) / 5.0
    both = np.stack([1 - chance, chance], axis=1)
    assert score("auc", expected, chance > 0.5, both) == pytest.approx(sk.roc_auc_score(expected, chance))


def test_auc_of_several_classes_is_the_mean_of_one_against_the_rest() -> None:
    expected, answers, probabilities = drawn(1, 200, 4)
    theirs = sk.roc_auc_score(expected, probabilities, multi_class="ovr", average="macro")
    assert score("auc", expected, answers, probabilities) == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=50))
def test_regression_metrics_equal_scikit_learn(pairs: list[tuple[float, float]]) -> None:
    expected, answers = np.array(pairs).T
    assert score("mae", expected, answers) == pytest.approx(sk.mean_absolute_error(expected, answers))
    assert score("rmse", expected, answers) == pytest.approx(sk.root_mean_squared_error(expected, answers))
    if expected.std() > 1e-3:
        assert score("r2", expected, answers) == pytest.approx(sk.r2_score(expected, answers), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_an_interval_encloses_the_value_repeats_and_narrows_with_more_rows(name: str) -> None:
    widths = []
    for rows in (60, 2000):
        random = np.random.default_rng(3)
        if METRICS[name].task == "classification":
            expected, answers, probabilities = drawn(3, rows, 2)
        else:
            expected, probabilities = random.normal(size=rows), None
            answers = expected + random.normal(size=rows) / 2
        low, high = interval(name, expected, answers, probabilities)
        assert (low, high) == interval(name, expected, answers, probabilities)
        assert low <= score(name, expected, answers, probabilities) <= high
        wider = interval(name, expected, answers, probabilities, confidence=0.999)
        assert wider[0] <= low
        assert high <= wider[1]
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    inside = {"accuracy": 0, "mae": 0, "balanced_accuracy": 0}
    trials = 300
    for _ in range(trials):
        expected = (random.random(200) < 0.3).astype(int)
        answers = np.where(random.random(200) < 0.9, expected, 1 - expected)
        for name in ("accuracy", "balanced_accuracy"):
            low, high = interval(name, expected, answers)
            inside[name] += low <= 0.9 <= high
        low, high = interval("mae", np.zeros(200), random.exponential(1.0, 200))
        inside["mae"] += low <= 1.0 <= high
    assert all(0.90 <= count / trials <= 0.99 for count in inside.values()), inside


def test_a_perfect_score_still_has_an_interval() -> None:
    low, high = wilson(600, 600)
    assert 0.99 < low < 1.0
    assert high == 1.0


def test_no_rows_give_nan_not_a_traceback() -> None:
    empty = np.zeros(0, int)
    assert all(math.isnan(score(name, empty, empty, np.zeros((0, 2)))) for name in METRICS)
    assert all(math.isnan(value) for value in interval("macro_f1", empty, empty))


def test_a_constant_target_has_no_r2_and_one_class_no_auc() -> None:
    assert score("r2", np.ones(4), np.arange(4.0)) == 0.0
    assert score("auc", np.zeros(4, int), np.zeros(4, int), np.full((4, 2), 0.5)) == 0.5


def test_metrics_are_checked_against_the_task() -> None:
    assert chosen_metrics([], "classification") == ["accuracy", "macro_f1"]
    assert chosen_metrics(["r2", "mae", "r2"], "regression") == ["r2", "mae"]
    with pytest.raises(InputError, match="no regression metric 'accuracy'"):
        chosen_metrics(["accuracy"], "regression")
    with pytest.raises(InputError) as caught:
        chosen_metrics(["macro_f2"], "classification")
    assert "did you mean 'macro_f1'" in caught.value.hint
