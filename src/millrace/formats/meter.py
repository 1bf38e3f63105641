"""Latency of alternatives, measured in turns: what disturbs one disturbs all, so their ratios hold.

Every round times each call once; the speed-up is the median of the rounds' ratios, its interval comes
from order statistics (no assumption about the noise).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from millrace.core.errors import InputError

Call = Callable[[], object]
_WARM_UP_CALLS = 3
_SLOT_NS = 300_000  # a slot repeats short calls until the clock's own cost is below one per cent
_CHECK_EVERY = 8
_LN2 = math.log(2.0)


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One alternative: median seconds per call; `speedup` is base / this, with its interval."""

    p50_s: float
    speedup: float
    low: float
    high: float
    rounds: int


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """When to stop: enough precision, or out of time (but never before `min_rounds`)."""

    time_s: float = 1.0
    min_rounds: int = 9
    max_rounds: int = 400
    precision: float = 0.02  # half-width of every interval, as a share of the speed-up
    confidence: float = 0.95


def choose_clock(threads: int) -> Callable[[], int]:
    """Processor time of the calling thread for one thread, else wall time; both in nanoseconds.

    On a busy machine the first leaves out the time in which others ran.

    Example:
        >>> choose_clock(2) is time.perf_counter_ns
        True
    """
    return time.thread_time_ns if threads == 1 else time.perf_counter_ns


def measure_interleaved(
    calls: Mapping[str, Call],
    base: str,
    budget: Budget = Budget(),  # noqa: B008 - frozen
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time alternatives in turns in one process.

    Args:
        calls: Name → a call without arguments.
        base: The name that speed-ups refer to.
        budget: When to stop.
        clock: Nanoseconds; see `choose_clock`.

    Returns:
        Name → timing, in the order of `calls`.

    Raises:
        InputError: `base` is not one of the calls.

    Example:
        >>> timings = measure_interleaved({"a": lambda: None, "b": lambda: None}, "a", Budget(time_s=0.01))
        >>> timings["a"].speedup, timings["b"].rounds >= 9
        (1.0, True)
    """
    if base not in calls:
        raise InputError(f"the base {base!r} is not among the calls: {', '.join(calls)}")
    names = list(calls)
    repeats = {name: _repeats(calls[name], clock) for name in names}
    shuffle = random.Random(0).shuffle  # nobody always follows the same predecessor: it decides what is in the cache
    order = list(names)
    samples: list[list[float]] = []
    started = time.perf_counter_ns()
    while len(samples) < budget.max_rounds:
        shuffle(order)
        row = dict.fromkeys(names, 0.0)
        for name in order:
            row[name] = _slot(calls[name], repeats[name], clock)
        samples.append([row[name] for name in names])
        is_due = len(samples) >= budget.min_rounds and len(samples) % _CHECK_EVERY == 0
        is_late = len(samples) >= budget.min_rounds and time.perf_counter_ns() - started > budget.time_s * 1e9
        if is_late or (is_due and _is_precise(np.array(samples), names.index(base), budget)):
            break
    return _summarise(np.array(samples), names, names.index(base), budget.confidence)


def median_interval(values: NDArray[np.floating], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median with a distribution-free interval: two order statistics that enclose it.

    Args:
        values: Independent samples, [n].
        confidence: Wanted; with fewer than six samples the whole range is given.

    Returns:
        Median, low, high.

    Example:
        >>> median_interval(np.arange(1.0, 12.0))
        (6.0, 2.0, 10.0)
    """
    ordered = np.sort(np.asarray(values, np.float64))
    count = len(ordered)
    rank, tail = 0, 0.0
    while rank < count // 2:  # the chance that the median lies beyond the rank-th value from either end
        tail += math.exp(math.lgamma(count + 1) - math.lgamma(rank + 1) - math.lgamma(count - rank + 1) - count * _LN2)
        if 2.0 * tail > 1.0 - confidence:
            break
        rank += 1
    low, high = ordered[max(rank - 1, 0)], ordered[min(count - rank, count - 1)]
    return float(np.median(ordered)), float(low), float(high)


def _repeats(call: Call, clock: Callable[[], int]) -> int:
    for _ in range(_WARM_UP_CALLS):
        call()
    started = clock()
    call()
    return max(1, min(1000, round(_SLOT_NS / max(clock() - started, 1))))


def _slot(call: Call, repeats: int, clock: Callable[[], int]) -> float:
    call()  # untimed: brings code and weights back into the caches after the others
    started = clock()
    for _ in range(repeats):
        call()
    return max(clock() - started, 1) / repeats


def _is_precise(samples: NDArray[np.float64], base: int, budget: Budget) -> bool:
    for column in range(samples.shape[1]):
        middle, low, high = median_interval(samples[:, base] / samples[:, column], budget.confidence)
        if (high - low) / 2.0 > budget.precision * middle:
            return False
    return True


def _summarise(samples: NDArray[np.float64], names: list[str], base: int, confidence: float) -> dict[str, Timing]:
    timings = {}
    for column, name in enumerate(names):
        speedup, low, high = median_interval(samples[:, base] / samples[:, column], confidence)
        p50_s = float(np.median(samples[:, column])) / 1e9
        timings[name] = Timing(p50_s=p50_s, speedup=speedup, low=low, high=high, rounds=len(samples))
    return timings
