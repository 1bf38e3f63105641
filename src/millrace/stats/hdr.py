"""Latencies with three significant digits over nine orders of magnitude (an HDR histogram), and comparing two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_HALF = 1024  # places in an octave: each is less than 0.1 % wide
_OCTAVES = 23  # an hour in microseconds
SIZE = _HALF * (_OCTAVES + 1)
_DRAWS_AT_ONCE = 50


def places_of(latencies_s: np.ndarray) -> np.ndarray:
    """In which bin each latency falls: exact microseconds up to 2 ms, then 1024 to an octave.

    Example:
        >>> places_of(np.array([0.0, 5e-6, 0.002047, 0.004096, 1e9])).tolist()
        [0, 5, 2047, 3072, 24575]
    """
    ticks = np.clip(np.rint(np.asarray(latencies_s) * 1e6), 0, 2.0 ** (_OCTAVES + 10) - 1).astype(np.int64)
    shift = np.maximum(np.frexp(ticks.astype(np.float64))[1] - 11, 0)
    return shift * _HALF + (ticks >> shift)


def upper_edges_s() -> np.ndarray:
    """The largest latency of each bin.

    Example:
        >>> [round(float(upper_edges_s()[place]), 7) for place in (5, 2047, 2048)]
        [5e-06, 0.002047, 0.002049]
    """
    places = np.arange(SIZE)
    shift = np.maximum(places // _HALF - 1, 0)
    return (((places - shift * _HALF + 1) << shift) - 1) * 1e-6


_EDGES = upper_edges_s()


class HdrHistogram:
    """Counts of latencies. One thread at a time.

    Example:
        >>> histogram = HdrHistogram()
        >>> histogram.add(np.arange(1, 1001) * 1e-3)
        >>> round(histogram.quantile(0.5), 3), round(histogram.quantile(0.999), 2), round(histogram.greatest, 3)
        (0.5, 1.0, 1.0)
    """

    def __init__(self) -> None:
        self.counts = np.zeros(SIZE, np.int64)
        self.sum = 0.0
        self.greatest = 0.0

    @property
    def total(self) -> int:
        """How many."""
        return int(self.counts.sum())

    def add(self, latencies_s: np.ndarray) -> None:
        """Count latencies."""
        if len(latencies_s):
            self.counts += np.bincount(places_of(latencies_s), minlength=SIZE)
            self.sum += float(np.sum(latencies_s))
            self.greatest = max(self.greatest, float(np.max(latencies_s)))

    def merge(self, other: HdrHistogram) -> None:
        """Add another one's."""
        self.counts += other.counts
        self.sum += other.sum
        self.greatest = max(self.greatest, other.greatest)

    def quantile(self, share: float, failures: int = 0) -> float:
        """The latency that this share of all was not above; NaN of nothing.

        Args:
            share: From 0 to 1.
            failures: How many more there were that never ended well: slower than all others.

        Returns:
            Seconds; infinite where the share reaches into the failures.
        """
        total = self.total
        if total + failures == 0:
            return math.nan
        wanted = max(math.ceil(share * (total + failures) - 1e-9), 1)
        if wanted > total:
            return math.inf
        place = int(np.searchsorted(np.cumsum(self.counts), wanted))
        return min(float(_EDGES[place]), self.greatest)


def ratio_interval(
    left: Sequence[HdrHistogram], right: Sequence[HdrHistogram], share: float, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """How many times slower the right is than the left at a quantile, and how sure that is.

    Latencies that follow one another resemble one another, so slices of time are drawn, not requests: a pair of
    slices that were measured side by side stays together.

    Args:
        left: Slices of the one.
        right: As many slices of the other; each was measured next to the left's of the same place.
        share: The quantile, from 0 to 1.
        draws: Of the bootstrap.
        seed: Of the draws.

    Returns:
        The ratio, and the ends of its 95 % interval; NaN where one of them has no latencies.

    Raises:
        ValueError: There are not as many slices of the one as of the other, or none.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> slices = [[HdrHistogram() for _ in range(20)] for _ in range(2)]
        >>> for one, other in zip(*slices):
        ...     one.add(rng.gamma(9, 1e-4, 500))
        ...     other.add(rng.gamma(9, 2e-4, 500))
        >>> ratio, low, high = ratio_interval(*slices, 0.5)
        >>> low < 2 < high, high - low < 0.2
        (True, True)
    """
    if len(left) != len(right) or not left:
        raise ValueError("want as many slices of the one as of the other")
    pairs = [np.array([one.counts for one in side]) for side in (left, right)]
    weights = np.random.default_rng(seed).multinomial(len(left), [1 / len(left)] * len(left), size=draws)
    all_once = np.ones((1, len(left)), np.int64)
    point = _quantiles(pairs[1], all_once, share) / _quantiles(pairs[0], all_once, share)
    drawn = _quantiles(pairs[1], weights, share) / _quantiles(pairs[0], weights, share)
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if not np.isnan(drawn).all() else (math.nan, math.nan)
    return float(point[0]), float(low), float(high)


def _quantiles(slices: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    used = np.flatnonzero(slices.any(axis=0))
    if not len(used):
        return np.full(len(weights), math.nan)
    summed = np.cumsum(slices[:, used], axis=1).astype(np.float64)
    edges = np.maximum(_EDGES[used], 1e-6)
    found = np.full(len(weights), math.nan)
    for start in range(0, len(weights), _DRAWS_AT_ONCE):
        block = weights[start : start + _DRAWS_AT_ONCE].astype(np.float64) @ summed
        for index, cumulated in enumerate(block, start):
            if cumulated[-1]:
                found[index] = edges[np.searchsorted(cumulated, math.ceil(share * cumulated[-1] - 1e-9))]
    return found
