"""Is a candidate worse than the baseline? A test that may be looked at after every window, for as long as it takes.

Two e-processes bet against "the candidate is no worse" and are averaged: if that is true, the evidence ever
reaches `1 / FALSE_ROLL_BACK` with a chance of at most `FALSE_ROLL_BACK` (Ville's inequality), however often one
looks. A third one bets against "the candidate is worse by more than a margin", and lets it be promoted.

- Errors: of those in a window, the candidate's are binomial with its share of the window's requests if both are
  alike (fewer, given the counts of requests: hypergeometric, which no convex bet can gain from; Hoeffding 1963,
  theorem 4). The bets are likelihood ratios for several factors of error rates, mixed (Robbins 1970; Howard,
  Ramdas, McAuliffe and Sekhon 2021). Rates may change with the time of day: only one window's requests are compared.
- Latency: who has the larger share of requests above the baseline's 95th percentile, window by window, between
  equally many requests of both. A stall makes many requests slow at once; it counts as one window lost.
- Not worse: a mixture's likelihood over the largest likelihood that a worse candidate could have (universal
  inference: Wasserman, Ramdas and Balakrishnan 2020). This one takes rates to be steady while a step lasts.

E-processes in general: Ramdas, Grünwald, Vovk and Shafer 2023; Waudby-Smith and Ramdas 2024.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Decision = Literal["roll back", "promote", "go on"]
FALSE_ROLL_BACK = 0.05
FALSE_PROMOTION = 0.05
LEAST_REQUESTS = 5  # of each in a window: fewer tell little of their shares
TIMED_REQUESTS = 20  # of each that a window compares at most: what comes together is slow together
RATIOS = np.array([1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0])  # candidate's rate over the baseline's
_ERROR_PRIOR = np.log([0.05, 0.1, 0.2, 0.35, 0.15, 0.1, 0.05])
_SLOW_PRIOR = np.log(np.full(len(RATIOS), 1 / len(RATIOS)))
ERROR_SHARE = 0.75  # of the stake; the rest is on latency
_RARE = (0.1, 1.0)  # a Beta prior of rates: most are near none
_BISECTIONS = 50
_TINY = 1e-16
_log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])


class Margins(msgspec.Struct, frozen=True, kw_only=True):
    """By how much a candidate may be worse and still pass: shares of its requests."""

    errors: float
    slow: float  # above the baseline's 95th percentile, where the baseline has 0.05


FINAL = Margins(errors=0.01, slow=0.05)
FIRST = Margins(errors=0.05, slow=0.15)  # to give it more requests


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """What one revision answered in a window.

    `timed` requests have a latency, `slow` ones of them one above the threshold.
    """

    requests: int = 0
    errors: int = 0
    timed: int = 0
    slow: int = 0

    def __add__(self, other: Arm) -> Arm:
        """Both."""
        return Arm(
            requests=self.requests + other.requests, errors=self.errors + other.errors,
            timed=self.timed + other.timed, slow=self.slow + other.slow,
        )  # fmt: skip

    @property
    def error_rate(self) -> float:
        """The share of errors; 0 where there was nothing."""
        return self.errors / self.requests if self.requests else 0.0

    @property
    def slow_rate(self) -> float:
        """The share of slow requests; 0 where there was none."""
        return self.slow / self.timed if self.timed else 0.0


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What the windows up to now say. Plain data: it outlives the process that gathers it.

    `errors` and `slow`: the logarithms of the bets' wealth, without their priors. `base` and `candidate` are of
    the whole rollout, `step_base` and `step_candidate` since the weights last changed.
    """

    errors: tuple[float, ...] = (0.0,) * len(RATIOS)
    slow: tuple[float, ...] = (0.0,) * len(RATIOS)
    windows: int = 0
    base: Arm = Arm()
    candidate: Arm = Arm()
    step_base: Arm = Arm()
    step_candidate: Arm = Arm()

    @property
    def against(self) -> float:
        """How often over the stake on "it is worse" has been won; 20 decides."""
        return float(np.exp(np.minimum(log_against(np.array(self.errors), np.array(self.slow)), 700.0)))

    def at_next_step(self) -> Evidence:
        """The same as the weights change: what lets the candidate pass is gathered anew."""
        return msgspec.structs.replace(self, step_base=Arm(), step_candidate=Arm())


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the evidence allows, and why."""

    decision: Decision
    reason: str = ""


def observe(evidence: Evidence, base: Arm, candidate: Arm, chance: np.random.Generator) -> Evidence:
    """Add a window. It must have been closed by its number of requests, never by what became of them.

    Args:
        evidence: Before it.
        base: The baseline's part of the window.
        candidate: The candidate's.
        chance: Picks the requests that are compared by latency.

    Example:
        >>> bad = observe(Evidence(), Arm(requests=100), Arm(requests=100, errors=20), np.random.default_rng(0))
        >>> bad.against > 20, judge(bad).decision
        (True, 'roll back')
    """
    errors = np.array(evidence.errors) + error_bets(base.requests, base.errors, candidate.requests, candidate.errors)
    compared = min(base.timed, candidate.timed, TIMED_REQUESTS)
    slow_base = int(chance.hypergeometric(base.slow, base.timed - base.slow, compared)) if compared else 0
    slow_candidate = (
        int(chance.hypergeometric(candidate.slow, candidate.timed - candidate.slow, compared)) if compared else 0
    )
    slow = np.array(evidence.slow) + slow_bets(slow_base, slow_candidate)
    step = (
        msgspec.structs.replace(base, timed=compared, slow=slow_base),
        msgspec.structs.replace(candidate, timed=compared, slow=slow_candidate),
    )
    return Evidence(
        errors=tuple(errors.tolist()), slow=tuple(slow.tolist()), windows=evidence.windows + 1,
        base=evidence.base + base, candidate=evidence.candidate + candidate,
        step_base=evidence.step_base + step[0], step_candidate=evidence.step_candidate + step[1],
    )  # fmt: skip


def judge(evidence: Evidence, margins: Margins = FINAL) -> Verdict:
    """What to do now.

    Args:
        evidence: All of it.
        margins: What is to be shown before the candidate passes.

    Example:
        >>> judge(Evidence()).decision
        'go on'
        >>> step = Arm(requests=2000, errors=2, timed=900, slow=40)
        >>> judge(Evidence(step_base=step, step_candidate=step)).decision
        'promote'
    """
    base, candidate = evidence.base, evidence.candidate
    if log_against(np.array(evidence.errors), np.array(evidence.slow)) >= -math.log(FALSE_ROLL_BACK):
        if log_wealth(np.array(evidence.errors), _ERROR_PRIOR) >= log_wealth(np.array(evidence.slow), _SLOW_PRIOR):
            reason = (
                f"{_percent(candidate.error_rate)} of its {candidate.requests} requests failed, "
                f"{_percent(base.error_rate)} of the baseline's {base.requests}"
            )
        else:
            reason = (
                f"{_percent(candidate.slow_rate)} of its {candidate.timed} requests took longer than the baseline's "
                f"95th percentile, {_percent(base.slow_rate)} of the baseline's {base.timed}"
            )
        return Verdict(decision="roll back", reason=reason)
    base, candidate = evidence.step_base, evidence.step_candidate
    passes = -math.log(FALSE_PROMOTION)
    for_errors = log_for(base.requests, base.errors, candidate.requests, candidate.errors, margins.errors)
    for_latency = log_for(base.timed, base.slow, candidate.timed, candidate.slow, margins.slow)
    if min(float(for_errors), float(for_latency)) >= passes:
        reason = (
            f"at most {_percent(margins.errors)} more of its requests fail than of the baseline's, and at most "
            f"{_percent(margins.slow)} more are slow: shown by {candidate.requests} and {base.requests} requests"
        )
        return Verdict(decision="promote", reason=reason)
    return Verdict(decision="go on")


def error_bets(base: ArrayLike, base_errors: ArrayLike, candidate: ArrayLike, errors: ArrayLike) -> NDArray[np.float64]:
    """By what a window multiplies the wealth of each bet on errors, as logarithms: one for each of `RATIOS`.

    Args:
        base: The baseline's requests.
        base_errors: And its errors.
        candidate: The candidate's requests.
        errors: And its errors. All four may be arrays of the same shape.

    Example:
        >>> bool(error_bets(90, 3, 10, 0).max() < 0 < error_bets(90, 0, 10, 1).min())
        True
    """
    base, base_errors, candidate, errors = (np.asarray(one, dtype=np.float64) for one in (
        base, base_errors, candidate, errors))  # fmt: skip
    share = (candidate / np.maximum(base + candidate, 1.0))[..., None]
    return np.log(RATIOS) * errors[..., None] - (base_errors + errors)[..., None] * np.log1p(share * (RATIOS - 1.0))


def slow_bets(base: ArrayLike, candidate: ArrayLike) -> NDArray[np.float64]:
    """The same for latency: who has more slow requests, of equally many, wins the window.

    Example:
        >>> bool(slow_bets(2, 2).any()), bool(slow_bets(0, 3).min() > 0)
        (False, True)
    """
    ahead = np.sign(np.asarray(candidate) - np.asarray(base))[..., None]
    won = np.log(2.0 * RATIOS / (1.0 + RATIOS))
    lost = np.log(2.0 / (1.0 + RATIOS))
    return np.where(ahead > 0, won, np.where(ahead < 0, lost, 0.0))


def log_wealth(bets: NDArray[np.float64], log_prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mixture of the bets in the last dimension."""
    stakes = bets + log_prior
    best = stakes.max(axis=-1)
    return best + np.log(np.exp(stakes - best[..., None]).sum(axis=-1))


def log_against(errors: NDArray[np.float64], slow: NDArray[np.float64]) -> NDArray[np.float64]:
    """The evidence that the candidate is worse: what the whole stake has become."""
    return np.logaddexp(
        math.log(ERROR_SHARE) + log_wealth(errors, _ERROR_PRIOR),
        math.log1p(-ERROR_SHARE) + log_wealth(slow, _SLOW_PRIOR),
    )


def log_for(
    base: ArrayLike, base_hits: ArrayLike, candidate: ArrayLike, hits: ArrayLike, margin: float
) -> NDArray[np.float64]:
    """The evidence against "the candidate's rate is higher than the baseline's by the margin or more".

    Args:
        base: The baseline's requests.
        base_hits: Those of them that failed (or were slow).
        candidate: The candidate's requests.
        hits: Those of them that failed (or were slow). All four may be arrays of the same shape.
        margin: A difference of rates.

    Returns:
        A logarithm.

    Example:
        >>> bool(log_for(5000, 5, 600, 0, 0.01) > 3 > log_for(5000, 5, 600, 8, 0.01))
        True
    """
    base, base_hits, candidate, hits = (np.asarray(one, dtype=np.float64) for one in (
        base, base_hits, candidate, hits))  # fmt: skip
    requests, all_hits = base + candidate, base_hits + hits
    mixed = _log_beta(_RARE[0] + all_hits, _RARE[1] + requests - all_hits) - _log_beta(*_RARE)
    is_worse = hits / np.maximum(candidate, 1.0) >= base_hits / np.maximum(base, 1.0) + margin
    on_edge = _largest_on_edge(base, base_hits, candidate, hits, margin)
    free = _likelihood(base, base_hits, base_hits / np.maximum(base, 1.0)) + _likelihood(
        candidate, hits, hits / np.maximum(candidate, 1.0)
    )
    return mixed - np.where(is_worse, free, on_edge)


def _likelihood(
    requests: NDArray[np.float64], hits: NDArray[np.float64], rate: NDArray[np.float64]
) -> NDArray[np.float64]:
    passed = requests - hits
    return np.where(hits > 0, hits * np.log(np.maximum(rate, _TINY)), 0.0) + np.where(
        passed > 0, passed * np.log1p(-np.minimum(rate, 1.0 - _TINY)), 0.0
    )


def _log_beta(left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
    return _log_gamma(left) + _log_gamma(right) - _log_gamma(np.asarray(left) + np.asarray(right))


def _largest_on_edge(
    base: NDArray[np.float64], base_hits: NDArray[np.float64], candidate: NDArray[np.float64],
    hits: NDArray[np.float64], margin: float,
) -> NDArray[np.float64]:  # fmt: skip
    """The largest likelihood with rates exactly `margin` apart: concave in the baseline's."""
    low, high = np.zeros_like(base), np.full_like(base, 1.0 - margin)
    for _ in range(_BISECTIONS):
        rate = 0.5 * (low + high)
        other = rate + margin
        slope = base_hits / rate - (base - base_hits) / (1 - rate) + hits / other - (candidate - hits) / (1 - other)
        low, high = np.where(slope > 0, rate, low), np.where(slope > 0, high, rate)
    return _likelihood(base, base_hits, low) + _likelihood(candidate, hits, low + margin)


# --------------------------------------------------------------------------- how long it takes


@functools.lru_cache(maxsize=64)
def requests_to_find(share: float, base_rate: float = 0.01, rate: float = 0.05) -> tuple[float, float]:
    """How many requests of both together it takes to find a candidate that fails more often.

    Args:
        share: Of the requests that the candidate gets.
        base_rate: The baseline's share of errors.
        rate: The candidate's.

    Returns:
        The median and the 95th percentile over 400 simulated rollouts.

    Example:
        >>> median, late = requests_to_find(0.5)
        >>> 300 < median < 700 and median < late
        True
    """
    chance = np.random.default_rng(0)
    rollouts, size = 400, max(10, math.ceil(LEAST_REQUESTS / min(share, 1 - share)))
    found = np.full(rollouts, np.inf)
    bets = np.zeros((rollouts, len(RATIOS)))
    still = np.zeros((1, len(RATIOS)))
    for window in range(1, 100_000):
        candidate = chance.binomial(size, share, rollouts)
        errors, base_errors = chance.binomial(candidate, rate), chance.binomial(size - candidate, base_rate)
        bets += error_bets(size - candidate, base_errors, candidate, errors)
        is_found = (log_against(bets, still) >= -math.log(FALSE_ROLL_BACK)) & np.isinf(found)
        found[is_found] = window * size
        if np.isfinite(found).mean() > 0.96:
            break
    return float(np.median(found)), float(np.sort(found)[int(0.95 * rollouts)])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def restored(facts: Mapping[str, Any]) -> Evidence:
    """Evidence that was stored; what cannot be read begins anew.

    Example:
        >>> restored({"windows": 3}).windows, restored({"errors": "?"}).windows
        (3, 0)
    """
    try:
        evidence = msgspec.convert(dict(facts), Evidence)
    except msgspec.ValidationError:
        return Evidence()
    return evidence if len(evidence.errors) == len(evidence.slow) == len(RATIOS) else Evidence()
