"""The canary's test, by simulation: how often it is wrong at any look, and how soon it finds what is bad."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.stats.canary import (
    FALSE_PROMOTION,
    FALSE_ROLL_BACK,
    FINAL,
    LEAST_REQUESTS,
    RATIOS,
    TIMED_REQUESTS,
    Arm,
    Evidence,
    error_bets,
    judge,
    log_against,
    log_for,
    observe,
    requests_to_find,
    restored,
    slow_bets,
)
from millrace.stats.latency import bins_of, threshold_of

DECIDES = -math.log(FALSE_ROLL_BACK)
ROLLOUTS = 1000


def rolled_back(
    share: float, base_rate: float, rate: float, *, windows: int = 200, requests: int = 60, stalls: float = 0.0,
    sways: float = 0.0, seed: int = 1,
) -> float:  # fmt: skip
    """The share of simulated rollouts that are rolled back at any of their looks.

    Args:
        share: Of the requests that the candidate gets.
        base_rate: The baseline's errors.
        rate: The candidate's.
        windows: Looks of a rollout.
        requests: In a window.
        stalls: How often an arm stands still, by itself: half of a window's requests are slow then.
        sways: The error rates of both rise and fall by this factor with the time of day.
        seed: Of the chances.
    """
    chance = np.random.default_rng(seed)
    errors, slow = np.zeros((ROLLOUTS, len(RATIOS))), np.zeros((ROLLOUTS, len(RATIOS)))
    ever = np.zeros(ROLLOUTS, dtype=bool)
    for window in range(windows):
        factor = 1 + sways * math.sin(window / 20)
        candidate = np.clip(chance.binomial(requests, share, ROLLOUTS), LEAST_REQUESTS, requests - LEAST_REQUESTS)
        base = requests - candidate
        errors += error_bets(
            base, chance.binomial(base, base_rate * factor), candidate, chance.binomial(candidate, rate * factor)
        )
        counts = []
        compared = np.minimum(np.minimum(base, candidate), TIMED_REQUESTS)
        for timed in (base, candidate):
            probability = np.where(chance.random(ROLLOUTS) < stalls, 0.5, 0.05)
            is_slow = chance.binomial(timed, probability)
            counts.append(chance.hypergeometric(is_slow, timed - is_slow, compared))
        slow += slow_bets(*counts)
        ever |= log_against(errors, slow) >= DECIDES
    return float(ever.mean())


@pytest.mark.parametrize(
    ("share", "rate", "more"),
    [
        (0.5, 0.02, {}),
        (0.1, 0.02, {}),
        (0.1, 0.3, {}),
        (0.5, 0.02, {"stalls": 0.05}),  # requests that are slow together
        (0.3, 0.05, {"sways": 0.9}),  # a rate that never stays
    ],
)
def test_a_candidate_as_good_as_the_baseline_is_hardly_ever_rolled_back_at_any_look(
    share: float, rate: float, more: dict[str, float]
) -> None:
    wrong = rolled_back(share, rate, rate, **more)  # type: ignore[arg-type]
    assert wrong <= FALSE_ROLL_BACK


def test_a_better_candidate_is_rolled_back_even_less() -> None:
    assert rolled_back(0.5, 0.05, 0.01, windows=100) < 0.02


def minutes_to_find(base_per_min: float, candidate_per_min: float, minutes: float) -> tuple[float, float]:
    """Median and 95th percentile until 1 → 5 % errors are found; requests come by chance, looks are a second apart."""
    chance = np.random.default_rng(3)
    rollouts = 400
    found = np.full(rollouts, np.inf)
    bets, still = np.zeros((rollouts, len(RATIOS))), np.zeros((1, len(RATIOS)))
    base, base_errors, candidate, errors = (np.zeros(rollouts) for _ in range(4))
    for second in range(int(60 * minutes)):
        more, more_candidate = (
            chance.poisson(base_per_min / 60, rollouts),
            chance.poisson(candidate_per_min / 60, rollouts),
        )
        base += more
        candidate += more_candidate
        base_errors += chance.binomial(more, 0.01)
        errors += chance.binomial(more_candidate, 0.05)
        is_over = (base >= LEAST_REQUESTS) & (candidate >= LEAST_REQUESTS)
        if not is_over.any():
            continue
        bets += np.where(is_over[:, None], error_bets(base, base_errors, candidate, errors), 0.0)
        for counted in (base, base_errors, candidate, errors):
            counted[is_over] = 0
        found[(log_against(bets, still) >= DECIDES) & np.isinf(found)] = (second + 1) / 60
        if np.isfinite(found).mean() > 0.96:
            break
    return float(np.median(found)), float(np.sort(found)[int(0.95 * rollouts)])


def test_one_to_five_percent_errors_are_found_within_three_minutes_at_100_requests_a_minute_per_arm() -> None:
    median, late = minutes_to_find(100, 100, 20)
    assert median <= 3
    assert late < 9


def test_a_canary_of_ten_percent_of_100_requests_a_minute_takes_eleven_minutes() -> None:
    median, late = minutes_to_find(90, 10, 90)
    assert 8 < median < 13
    assert 24 < late < 40
    planned, planned_late = requests_to_find(0.1)
    assert planned / 100 == pytest.approx(median, rel=0.25)
    assert planned_late / 100 == pytest.approx(late, rel=0.25)


def test_a_slower_candidate_is_found() -> None:
    chance = np.random.default_rng(0)
    evidence = Evidence()
    for _ in range(200):
        base = Arm(requests=20, timed=20, slow=int(chance.binomial(20, 0.05)))
        evidence = observe(evidence, base, Arm(requests=20, timed=20, slow=int(chance.binomial(20, 0.3))), chance)
        if judge(evidence).decision == "roll back":
            break
    assert evidence.windows < 40
    assert "took longer than the baseline's 95th percentile" in judge(evidence).reason


def test_a_candidate_that_is_worse_by_the_margin_is_hardly_ever_promoted_at_any_look() -> None:
    chance = np.random.default_rng(5)
    base, candidate = np.full((600, 150), 50), np.full((600, 150), 50)
    for margin, rate in ((FINAL.errors, 0.005), (FINAL.slow, 0.05)):
        base_hits = chance.binomial(base, rate).cumsum(axis=1)
        hits = chance.binomial(candidate, rate + margin).cumsum(axis=1)
        evidence = log_for(base.cumsum(axis=1), base_hits, candidate.cumsum(axis=1), hits, margin)
        assert (evidence.max(axis=1) >= -math.log(FALSE_PROMOTION)).mean() <= FALSE_PROMOTION


def test_a_good_candidate_is_promoted() -> None:
    chance = np.random.default_rng(0)
    evidence = Evidence()
    for _ in range(400):
        base, candidate = (
            Arm(requests=20, errors=int(chance.binomial(20, 0.002)), timed=20, slow=int(chance.binomial(20, 0.05)))
            for _ in range(2)
        )
        evidence = observe(evidence, base, candidate, chance)
        if judge(evidence).decision != "go on":
            break
    assert judge(evidence).decision == "promote"
    assert evidence.step_candidate.requests < 3000
    assert judge(evidence.at_next_step()).decision == "go on"


def test_nothing_is_decided_without_requests_and_nothing_said_by_a_window_of_one_arm() -> None:
    assert judge(Evidence()).decision == "go on"
    chance = np.random.default_rng(0)
    for base, candidate in ((Arm(requests=50, errors=50), Arm()), (Arm(), Arm(requests=50, errors=50))):
        assert observe(Evidence(), base, candidate, chance).errors == pytest.approx(Evidence().errors, abs=1e-9)


def test_evidence_outlives_its_process() -> None:
    seen = observe(Evidence(), Arm(requests=90, errors=1), Arm(requests=10, errors=2), np.random.default_rng(0))
    assert restored(msgspec.json.decode(msgspec.json.encode(seen))) == seen
    assert restored({"errors": [0.0]}) == Evidence()


@given(st.lists(st.floats(1e-7, 100), min_size=1, max_size=50))
def test_the_threshold_is_just_above_the_95th_percentile(latencies: list[float]) -> None:
    counted: dict[int, int] = {}
    for place in bins_of(np.array(latencies)).tolist():
        counted[place] = counted.get(place, 0) + 1
    threshold = threshold_of(counted)
    assert threshold.count(counted, is_candidate=False) <= 0.05 * len(latencies)
    assert threshold.count(counted, is_candidate=True) <= threshold.count(counted, is_candidate=False)
    assert threshold.seconds <= max(*latencies, 1e-6, 1e-6) * 1.1
