"""What windows of the reference reach by chance: the thresholds of `stats.drift`.

Nothing is assumed of how a feature is distributed. Both effect sizes are functions of bin counts, and what the counts
of a clean window look like follows from the reference's own counts: the true shares are drawn from their posterior
(Dirichlet; for bins between quantiles this is the exact law of spacings), then a window from those shares. So the
reference's sampling error and bins that it has hardly seen are part of the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np

SEED = 20240501
EXCEEDING = 25  # so many drawn windows should lie beyond the wanted quantile
MIN_WINDOWS, MAX_WINDOWS = 1000, 4000
_LOW, _HIGH = 0.90, 0.99  # quantiles that fix a tail
_LOG_LOW = -math.log(1.0 - _LOW)
_GRID = 1.05


class Profile(NamedTuple):
    """A reference's bins side by side: every array is [features, bins], padded with zeros, or [features]."""

    shares: np.ndarray
    weights: np.ndarray  # parameters of the posterior: rows that speak for a bin, one where none does
    scores: np.ndarray  # normal score of a number's bin
    present: np.ndarray  # 1 where a bin enters the mean score
    mean: np.ndarray
    sd: np.ndarray  # of the scores; 0: no order, no shift


class Limits(NamedTuple):
    """Thresholds of the distance and of the shift, [features], and how surprising anything else is."""

    binned: np.ndarray
    shifted: np.ndarray
    tails: np.ndarray  # [2, features, 2]: quantile and exponent
    drawn: np.ndarray  # surprise of every drawn window and feature, ascending
    windows: int

    def level(self, binned: np.ndarray, shifted: np.ndarray) -> float:
        """The smallest share of false alarms at which a window with these effects would alarm."""
        surprise = max(float(_surprise(binned, self.tails[0]).max()), float(_surprise(shifted, self.tails[1]).max()))
        beyond = len(self.drawn) - int(np.searchsorted(self.drawn, surprise))
        return 1.0 - math.exp(-beyond / self.windows)


def profile_of(counts: Sequence[np.ndarray], is_number: Sequence[bool]) -> Profile:
    """Lay a reference's counts side by side.

    Args:
        counts: Per feature, as `Histograms.counts`: the last bin is for missing values.
        is_number: Per feature: its bins have an order.

    Example:
        >>> profile = profile_of([np.array([0, 50, 50, 0, 0])], [True])
        >>> profile.weights.tolist(), round(float(profile.sd[0]), 2)
        ([[1.0, 50.0, 50.0, 1.0, 1.0]], 0.75)
    """
    table = pad(counts)
    weights, scores, present = np.zeros(table.shape), np.zeros(table.shape), np.zeros(table.shape)
    for index, (own, ordered) in enumerate(zip(counts, is_number, strict=True)):
        size = len(own)
        weights[index, :size] = np.maximum(own, 1)
        if ordered:
            scores[index, : size - 1] = _normal_scores(weights[index, : size - 1])
            present[index, : size - 1] = 1.0
        else:
            # Good and Turing: what was seen once says how much was not seen at all.
            weights[index, size - 2] = max(own[size - 2], 1, int((own[: size - 2] == 1).sum()))
    known = weights * present
    total = np.maximum(known.sum(axis=1), 1.0)
    mean = (known * scores).sum(axis=1) / total
    variance = (known * scores**2).sum(axis=1) / total - mean**2
    sd = np.sqrt(np.maximum(variance, 0.0))
    return Profile(_shares(table), weights, scores, present, mean, sd)


def pad(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Counts of features with different numbers of bins as one table, [features, bins]."""
    table = np.zeros((len(counts), max((len(own) for own in counts), default=1)))
    for index, own in enumerate(counts):
        table[index, : len(own)] = own
    return table


def _shares(table: np.ndarray) -> np.ndarray:
    return table / np.maximum(table.sum(axis=-1, keepdims=True), 1.0)


def _normal_scores(weights: np.ndarray) -> list[float]:
    """The normal quantile of every bin's middle rank: bounded, whatever the values are."""
    ranks = (np.cumsum(weights) - weights / 2) / weights.sum()
    return [NormalDist().inv_cdf(float(rank)) for rank in ranks]


def effects_of(profile: Profile, table: np.ndarray, rows: slice | int = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the bins, and the distance that a shift of the mean normal score stands for.

    Args:
        profile: The reference.
        table: Counts of a window, [features, bins]; or of many windows of the feature `rows`, [windows, bins].
        rows: Which features.
    """
    binned = hellinger(profile.shares[rows], _shares(table))
    seen = (table * profile.present[rows]).sum(axis=-1)
    mean = (table * profile.scores[rows]).sum(axis=-1) / np.maximum(seen, 1.0)
    sd = profile.sd[rows]
    shift = np.where((sd > 0) & (seen > 0), (mean - profile.mean[rows]) / np.where(sd > 0, sd, 1.0), 0.0)
    return binned, as_distance(shift)


def hellinger(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Hellinger's distance along the last axis.

    Example:
        >>> float(hellinger(np.array([1.0, 0.0]), np.array([0.0, 1.0])))
        1.0
    """
    return np.sqrt(np.maximum(1.0 - np.sqrt(left * right).sum(axis=-1), 0.0))


def as_distance(shift: Any) -> Any:
    """Hellinger's distance of two normal distributions whose means differ by `shift` standard deviations.

    Example:
        >>> round(float(as_distance(0.2)), 3)
        0.071
    """
    return np.sqrt(-np.expm1(-np.square(np.minimum(np.abs(shift), 1e6)) / 8.0))


def on_grid(rows: int) -> int:
    """A window's rows rounded down by at most 5 %: fewer calibrations, each a little too careful.

    Example:
        >>> [on_grid(rows) for rows in (7, 200, 207, 1000)]
        [7, 194, 204, 972]
    """
    if rows <= 20:
        return rows
    return int(_GRID ** math.floor(math.log(rows) / math.log(_GRID) + 1e-9))


def limits_of(counts: Sequence[np.ndarray], is_number: Sequence[bool], rows: int, false_alarms: float) -> Limits:
    """Thresholds for windows of so many rows; kept for the next window.

    Args:
        counts: The reference's, per feature.
        is_number: Per feature: its bins have an order.
        rows: Of the window.
        false_alarms: The share of clean windows that may exceed any threshold.
    """
    key = msgspec.msgpack.encode([[own.tolist(), bool(one)] for own, one in zip(counts, is_number, strict=True)])
    return _calibrate(key, on_grid(rows), false_alarms)


@lru_cache(maxsize=64)
def _calibrate(key: bytes, rows: int, false_alarms: float) -> Limits:
    """Draw windows for every feature, then choose one surprise for all that keeps the windows' rate.

    Features count as independent: where they move together, the true rate is lower than asked.
    """
    decoded: list[tuple[list[int], bool]] = msgspec.msgpack.decode(key)
    profile = profile_of([np.asarray(own) for own, _ in decoded], [one for _, one in decoded])
    expected = -math.log1p(-min(max(false_alarms, 1e-6), 0.999))  # features beyond their limit, per window
    windows = int(min(max(EXCEEDING / expected, MIN_WINDOWS), MAX_WINDOWS))
    generator = np.random.default_rng(SEED)
    features = len(decoded)
    tails, drawn = np.empty((2, features, 2)), np.empty((features, windows))
    for index in range(features):
        table = draw_windows(profile.weights[index], rows, windows, generator)
        binned, shifted = effects_of(profile, table, index)
        tails[0, index], tails[1, index] = _tail(binned), _tail(shifted)
        drawn[index] = np.maximum(_surprise(binned, tails[0, index]), _surprise(shifted, tails[1, index]))
    pool = np.sort(drawn, axis=None)
    surprise = _choose(pool, expected * windows)
    limits = tails[:, :, 0] * (surprise / _LOG_LOW) ** (1.0 / tails[:, :, 1])
    return Limits(limits[0], limits[1], tails, pool, windows)


def draw_windows(weights: np.ndarray, rows: int, windows: int, generator: np.random.Generator) -> np.ndarray:
    """Counts of clean windows of one feature, [windows, bins]: each with its own true shares."""
    shares = generator.standard_gamma(weights, size=(windows, len(weights)))
    shares /= shares.sum(axis=1, keepdims=True)
    return generator.multinomial(rows, shares).astype(np.float64)


def _tail(values: np.ndarray) -> tuple[float, float]:
    """A Weibull tail through two quantiles: makes features with thin and with heavy tails comparable."""
    low, high = np.quantile(values, [_LOW, _HIGH])
    low = max(float(low), 1e-6)
    ratio = min(max(float(high) / low, 1.05), 8.0)
    return low, math.log(2.0) / math.log(ratio)


def _surprise(values: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """About minus the logarithm of the chance to see such a value in a clean window."""
    with np.errstate(over="ignore"):  # infinitely surprising is right
        return _LOG_LOW * (values / tail[..., 0]) ** tail[..., 1]


def _choose(pool: np.ndarray, exceeding: float) -> float:
    """The surprise that so many of the pool exceed, on the careful side of what drawing leaves unsure."""
    careful = exceeding - 1.28 * math.sqrt(exceeding)
    if careful >= 5.0:
        return float(pool[len(pool) - int(careful)])
    # Too few draws lie out there: go on from the tenth as the tail does, a factor in chance for its logarithm.
    reachable = min(10, len(pool))
    return float(pool[len(pool) - reachable]) + math.log(reachable / (exceeding * 0.75))
