"""The guard: fixed sequence, both bounds, few rows, regression; and how often it ships a bad variant."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.compress.guard import Candidate, Limits, certify, changed_answers, signal_to_noise

CLASSES = Limits("classification", max_drop=0.01, max_changed=0.05)
VALUES = Limits("regression", max_drop=0.02, max_changed=0.05)


def wrong_on(truth: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    answers = truth.copy()
    answers[rows] = (answers[rows] + 1) % 10
    return answers


@pytest.fixture
def truth() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, 600)


def test_an_equal_variant_is_certified_with_its_bounds_in_words(truth: np.ndarray) -> None:
    facts = certify(truth, [Candidate("same", truth)], truth, CLASSES)["same"]
    assert facts.status == "certified"
    assert facts.bound == pytest.approx(0.0045, abs=1e-4)
    assert facts.changed_bound == pytest.approx(0.005, abs=1e-4)
    assert (facts.metric, facts.rows, facts.changed, facts.drop) == ("accuracy", 600, 0, 0.0)
    assert facts.explanation.startswith("loses at most 0.45 points of accuracy (95 % sure; limit 1.00)")


def test_testing_stops_at_the_first_failure(truth: np.ndarray) -> None:
    bad = wrong_on(truth, slice(0, 30))
    found = certify(truth, [Candidate("a", truth), Candidate("b", bad), Candidate("c", truth)], truth, CLASSES)
    assert [found[name].status for name in "abc"] == ["certified", "refused", "not_tested"]
    assert found["c"].bound is None
    assert "here b" in found["c"].explanation


def test_a_variant_that_loses_more_is_refused_not_undecided(truth: np.ndarray) -> None:
    facts = certify(truth, [Candidate("bad", wrong_on(truth, slice(0, 12)))], truth, CLASSES)["bad"]
    assert facts.status == "refused"
    assert "lost 2.00 points" in facts.explanation


def test_equal_accuracy_with_other_answers_is_refused(truth: np.ndarray) -> None:
    """Full-range int8 without VNNI: accuracy kept, 8.7 % of the answers silently changed."""
    base = wrong_on(truth, slice(0, 60))
    other = wrong_on(base, slice(0, 60))  # wrong as before, but differently
    facts = certify(base, [Candidate("saturated", other)], truth, CLASSES)["saturated"]
    assert facts.drop == 0.0
    assert facts.bound is not None
    assert facts.bound < 0.01
    assert facts.status == "refused"
    assert "60 of 600 answers changed" in facts.explanation


def test_few_rows_are_undecided_and_say_how_many_are_needed(truth: np.ndarray) -> None:
    facts = certify(truth[:120], [Candidate("same", truth[:120])], truth[:120], CLASSES)["same"]
    assert facts.status == "undecided"
    assert facts.rows_needed == 268
    assert "not enough rows: about 268 rows needed" in facts.explanation
    enough = np.zeros(facts.rows_needed, int)
    assert certify(enough, [Candidate("same", enough)], enough, CLASSES)["same"].status == "certified"


def test_few_rows_for_changed_answers_alone(truth: np.ndarray) -> None:
    base = wrong_on(truth, slice(0, 25))
    other = wrong_on(base, slice(0, 25))
    facts = certify(base, [Candidate("x", other)], truth, CLASSES)["x"]
    assert facts.status == "undecided"
    assert facts.rows_needed is not None
    assert facts.rows_needed > 600
    assert "changed answers" in facts.explanation


def test_a_replacement_may_change_answers_but_not_lose_accuracy(truth: np.ndarray) -> None:
    base = wrong_on(truth, slice(0, 120))
    better = wrong_on(truth, slice(110, 200))
    facts = certify(base, [Candidate("refit", better, is_replacement=True)], truth, CLASSES)["refit"]
    assert facts.status == "certified"
    assert "a replacement" in facts.explanation
    worse = wrong_on(truth, slice(0, 150))
    assert certify(base, [Candidate("refit", worse, True)], truth, CLASSES)["refit"].status == "refused"


def test_another_deciding_metric_is_said_to_be_judged_by_accuracy(truth: np.ndarray) -> None:
    limits = Limits("classification", 0.01, 0.05, metric="macro_f1")
    facts = certify(truth, [Candidate("same", truth)], truth, limits)["same"]
    assert facts.metric == "accuracy"
    assert "judged by paired accuracy, since macro_f1" in facts.explanation


def test_regression_is_a_share_of_the_bases_error() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=500) * 10
    base = truth + rng.normal(size=500)
    tiny, large = base + 0.001 * rng.normal(size=500), base + 0.8 * rng.normal(size=500)
    found = certify(base, [Candidate("tiny", tiny), Candidate("large", large)], truth, VALUES)
    assert found["tiny"].status == "certified"
    assert found["tiny"].metric == "mae"
    assert found["tiny"].bound is not None
    assert found["tiny"].bound < 0.02
    assert found["tiny"].base_score == pytest.approx(float(np.mean(np.abs(base - truth))))
    assert found["large"].status == "refused"
    assert found["large"].drop > 0.02


def test_regression_with_few_rows_is_undecided() -> None:
    rng = np.random.default_rng(2)
    truth = np.zeros(15)
    base = rng.normal(size=15)
    facts = certify(base, [Candidate("x", base + 0.05 * rng.normal(size=15))], truth, VALUES)["x"]
    assert facts.status == "undecided"
    assert facts.rows_needed is None or facts.rows_needed > 15


def test_values_that_are_not_numbers_count_as_changed() -> None:
    base = np.array([1.0, 2.0])
    assert changed_answers(base, np.array([1.0, np.nan]), base + 1, "regression").tolist() == [False, True]


def test_the_order_needs_no_labels() -> None:
    assert list(inspect.signature(signal_to_noise).parameters) == ["base", "other", "task"]


@given(st.floats(0.001, 0.3), st.integers(0, 100))
@settings(max_examples=40)
def test_more_noise_means_less_signal_to_noise(noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(50, 5))
    error = rng.normal(size=(50, 5))

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values)
        return powers / powers.sum(axis=1, keepdims=True)

    for task, base, small, large in (
        ("classification", softmax(logits), softmax(logits + noise * error), softmax(logits + 3 * noise * error)),
        ("classification", logits, logits + noise * error, logits + 3 * noise * error),
        ("regression", logits[:, :1], (logits + noise * error)[:, :1], (logits + 3 * noise * error)[:, :1]),
    ):
        assert signal_to_noise(base, small, task) > signal_to_noise(base, large, task)  # type: ignore[arg-type]


def test_signal_to_noise_does_not_see_shifts_of_a_rows_logits() -> None:
    logits = np.random.default_rng(3).normal(size=(20, 4))
    assert signal_to_noise(logits, logits + 7.0, "classification") == 200.0
    assert signal_to_noise(logits, np.full_like(logits, np.nan), "classification") == -np.inf


def test_twenty_variants_just_over_budget_ship_in_at_most_five_per_cent() -> None:
    """The worst case: each truly loses 1.05 points. The sequence stops, so the error stays that of one test."""
    rng = np.random.default_rng(5)
    rows, runs, shipped = 3000, 400, 0
    truth = np.zeros(rows, int)
    for _ in range(runs):
        base = (rng.random(rows) < 0.05).astype(int)
        candidates = []
        for number in range(20):
            answers = base.copy()
            answers[(base == 0) & (rng.random(rows) < 0.0150 / 0.95)] = 1
            answers[(base == 1) & (rng.random(rows) < 0.0045 / 0.05)] = 0
            candidates.append(Candidate(str(number), answers))
        found = certify(base, candidates, truth, CLASSES)
        shipped += any(facts.status == "certified" for facts in found.values())
    assert shipped / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_a_point_estimate_would_ship_them_all() -> None:
    """The baseline that the guard replaces: best of twenty by measured drop."""
    rng = np.random.default_rng(6)
    runs, shipped = 300, 0
    for _ in range(runs):
        draws = rng.multinomial(3000, [0.015, 0.0045, 0.9805], size=20)
        shipped += bool(np.any((draws[:, 0] - draws[:, 1]) / 3000 <= 0.01))
    assert shipped / runs > 0.9
