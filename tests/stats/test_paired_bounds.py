"""Bounds against published figures, against properties, and against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.stats.paired import (
    clopper_pearson_upper,
    decide,
    noninferior,
    noninferior_errors,
    paired_ratio_upper,
    paired_t_upper,
    plan_rows,
    rows_needed,
    rows_needed_for_share,
    tango_interval,
    tango_statistic,
    tango_upper,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("first_only", "second_only", "rows", "confidence", "low", "high", "digits"),
    [
        # Fagerland, Lydersen, Laake (2014), airway responsiveness (Bentur et al. 2009), Tango's interval
        (1, 7, 21, 0.95, -0.517, -0.026, 3),
        # R, PropCIs::scoreci.mp(25, 28, 618, conf.level = 0.90), which estimates (28 - 25) / 618
        (28, 25, 618, 0.90, -0.0148, 0.0247, 4),
    ],
)
def test_tango_interval_equals_published_figures(
    first_only: int, second_only: int, rows: int, confidence: float, low: float, high: float, digits: int
) -> None:
    found = tango_interval(first_only, second_only, rows, confidence)
    assert [round(value, digits) for value in found] == [low, high]


def test_tango_statistic_equals_the_papers_example() -> None:
    # Tango (1998), contact lens disinfection, 44 pairs, equivalence limit 0.1: Z = 1.709, p = 0.044
    assert round(tango_statistic(losses=0, wins=1, rows=44, drop=-0.1), 3) == 1.709


def test_all_ties_have_the_closed_form() -> None:
    # without a discordant pair the score bound is z² / (n + z²)
    for rows in (1, 59, 268, 600, 10_000):
        assert tango_upper(0, 0, rows) == pytest.approx(1.6448536**2 / (rows + 1.6448536**2), rel=1e-6)


counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 2000)).map(
    lambda value: (value[0], value[1], value[0] + value[1] + value[2])
)


@given(counts, st.floats(0.6, 0.99))
def test_the_bound_is_above_the_estimate_and_more_sure_means_wider(
    value: tuple[int, int, int], confidence: float
) -> None:
    losses, wins, rows = value
    bound = tango_upper(losses, wins, rows, confidence)
    assert (losses - wins) / rows <= bound <= 1.0
    assert tango_upper(losses, wins, rows, 0.995) >= bound


@given(counts)
def test_more_losses_raise_the_bound_and_more_wins_lower_it(value: tuple[int, int, int]) -> None:
    losses, wins, rows = value
    bound = tango_upper(losses, wins, rows)
    assert tango_upper(losses + 1, wins, rows + 1) > bound - 1e-9
    if losses:
        assert tango_upper(losses - 1, wins + 1, rows) < bound


@given(counts)
def test_the_interval_mirrors_when_the_models_are_swapped(value: tuple[int, int, int]) -> None:
    losses, wins, rows = value
    low, high = tango_interval(losses, wins, rows)
    swapped = tango_interval(wins, losses, rows)
    assert (low, high) == pytest.approx((-swapped[1], -swapped[0]), abs=1e-9)


@given(counts, st.floats(-0.5, 0.5))
def test_the_bound_is_where_the_statistic_reaches_the_quantile(value: tuple[int, int, int], drop: float) -> None:
    losses, wins, rows = value
    bound = tango_upper(losses, wins, rows)
    is_rejected = tango_statistic(losses, wins, rows, drop) <= -1.6448536269514722
    assert is_rejected == (drop >= bound) or abs(drop - bound) < 1e-6


@pytest.mark.parametrize(("changed", "drop"), [(0.02, 0.01), (0.05, 0.01), (0.09, 0.03)])
def test_tango_misses_the_true_drop_in_about_five_per_cent(changed: float, drop: float) -> None:
    rng = np.random.default_rng(0)
    rows, runs = 2000, 2000
    loss_rate, win_rate = (changed + drop) / 2, (changed - drop) / 2
    draws = rng.multinomial(rows, [loss_rate, win_rate, 1 - changed], size=runs)
    misses = sum(tango_statistic(int(a), int(b), rows, drop) <= -1.6448536 for a, b, _ in draws)
    assert 0.03 <= misses / runs <= 0.065


@pytest.mark.parametrize("tails", ["normal", "student3"])
def test_the_ratio_bound_misses_in_about_five_per_cent(tails: str) -> None:
    rng = np.random.default_rng(1)
    rows, runs, truth = 300, 1500, 0.05
    misses = 0
    for _ in range(runs):
        noise = rng.standard_t(3, rows) if tails == "student3" else rng.normal(size=rows)
        old = np.abs(noise)
        new = np.abs(old * (1 + truth) + 0.1 * (rng.random(rows) - 0.5) * old)
        misses += paired_ratio_upper(old, new) < truth
    assert 0.025 <= misses / runs <= 0.08


def test_pairing_beats_comparing_two_means() -> None:
    rng = np.random.default_rng(2)
    old = np.abs(rng.normal(size=400))
    new = old + 0.01 * rng.normal(size=400)
    unpaired = 1.645 * math.sqrt(old.var() / 400 + new.var() / 400)
    assert paired_t_upper(old, new) < unpaired / 4


def test_ratio_bound_of_a_perfect_or_tiny_base() -> None:
    zeros = np.zeros(10)
    assert paired_ratio_upper(zeros, zeros) == 0.0
    assert paired_ratio_upper(zeros, zeros + 1) == math.inf
    assert paired_ratio_upper(np.ones(1), np.ones(1)) == math.inf
    assert paired_t_upper(np.ones(1), np.ones(1)) == math.inf


@given(st.integers(0, 50), st.integers(1, 500), st.floats(0.6, 0.99))
def test_clopper_pearson_is_above_the_share_and_monotone(count: int, extra: int, confidence: float) -> None:
    rows = count + extra
    bound = clopper_pearson_upper(count, rows, confidence)
    assert count / rows < bound <= 1.0
    assert clopper_pearson_upper(count + 1, rows, confidence) >= bound


def test_clopper_pearson_is_the_exact_tail() -> None:
    bound = clopper_pearson_upper(3, 50, 0.95)
    tail = sum(math.comb(50, k) * bound**k * (1 - bound) ** (50 - k) for k in range(4))
    assert tail == pytest.approx(0.05, abs=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_wilson_encloses_the_share(count: int, extra: int) -> None:
    rows = count + extra
    low, high = wilson_interval(count, rows)
    assert 0.0 <= low <= high <= 1.0
    if rows:
        assert low - 1e-12 <= count / rows <= high + 1e-12


@pytest.mark.parametrize(("discordant", "rows"), [(0.005, 310), (0.02, 1237), (0.04, 2474), (0.09, 5565)])
def test_rows_needed_is_what_the_simulation_study_found(discordant: float, rows: int) -> None:
    assert rows_needed(discordant, 0.01) == pytest.approx(rows, abs=1)


def test_so_many_rows_do_certify_with_four_chances_in_five() -> None:
    rng = np.random.default_rng(3)
    rows = rows_needed(0.02, 0.01)
    assert rows is not None
    draws = rng.multinomial(rows, [0.01, 0.01, 0.98], size=2000)
    certified = np.mean([tango_statistic(int(a), int(b), rows, 0.01) <= -1.6448536 for a, b, _ in draws])
    assert 0.74 <= certified <= 0.86


@given(st.floats(0.0, 0.2), st.floats(0.001, 0.1))
def test_a_tighter_margin_needs_more_rows(discordant: float, margin: float) -> None:
    wide, tight = rows_needed(discordant, margin), rows_needed(discordant, margin / 2)
    assert wide is not None
    assert tight is not None
    assert tight > wide


@given(st.floats(0.0, 0.2), st.floats(-0.05, 0.05), st.integers(1, 100_000))
def test_a_plan_always_asks_for_more_than_there_is(discordant: float, drop: float, rows: int) -> None:
    needed = plan_rows(discordant, 0.01, 0.95, drop, rows)
    assert needed is None or needed > rows


def test_rows_for_a_share() -> None:
    assert rows_needed_for_share(0.0, 0.05) == 59
    assert rows_needed_for_share(0.05, 0.05) is None
    more = rows_needed_for_share(0.03, 0.05)
    assert more is not None
    assert more > 59


@given(st.integers(0, 400), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60)
def test_verdicts_count_every_row_once(ties: int, wins: int, losses: int) -> None:
    challenger = np.array([True] * ties + [True] * wins + [False] * losses, bool)
    champion = np.array([True] * ties + [False] * wins + [True] * losses, bool)
    verdict = noninferior(challenger, champion, margin=0.01)
    assert (verdict.wins, verdict.losses, verdict.ties) == (wins, losses, ties)
    assert verdict.rows == ties + wins + losses
    assert (verdict.verdict == "non_inferior") == (verdict.bound <= 0.01)
    assert (verdict.rows_needed is not None) <= (verdict.verdict == "undecided")


def test_the_three_verdicts() -> None:
    right = np.ones(2000, bool)
    worse, slightly = right.copy(), np.ones(100, bool)
    worse[:100] = False
    assert noninferior(right, right, 0.01).verdict == "non_inferior"
    assert noninferior(worse, right, 0.01).verdict == "inferior"
    undecided = noninferior(slightly, slightly, 0.01)
    assert undecided.verdict == "undecided"
    assert undecided.rows_needed == 268


def test_the_three_verdicts_for_errors() -> None:
    rng = np.random.default_rng(4)
    old = np.abs(rng.normal(size=500))
    assert noninferior_errors(old, old, 0.02).verdict == "non_inferior"
    assert noninferior_errors(old * 1.2, old, 0.02).verdict == "inferior"
    noisy = noninferior_errors(np.abs(old + 0.3 * rng.normal(size=500)), old, 0.02)
    assert noisy.verdict in {"undecided", "inferior"}
    few = noninferior_errors(old[:20] + 0.2 * rng.normal(size=20), old[:20], 0.02)
    assert few.verdict == "undecided"


def test_a_better_challenger_has_a_positive_difference() -> None:
    old = np.linspace(0.5, 1.5, 50)
    verdict = noninferior_errors(old * 0.9, old, 0.02)
    assert verdict.difference == pytest.approx(0.1)
    assert verdict.wins == 50


def test_no_rows_decide_nothing() -> None:
    empty = np.zeros(0, bool)
    assert noninferior(empty, empty, 0.01).verdict == "undecided"
    assert noninferior_errors(empty.astype(float), empty.astype(float), 0.02).verdict == "undecided"
    assert decide(1.0, -1.0, 0.01) == "undecided"


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(InputError, match="between 0 and the rows"):
        tango_upper(5, 6, 10)
    with pytest.raises(InputError, match="confidence"):
        tango_upper(1, 1, 10, confidence=95.0)
    with pytest.raises(InputError, match="same rows"):
        noninferior(np.ones(3, bool), np.ones(4, bool), 0.01)
