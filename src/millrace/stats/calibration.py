"""What windows of the reference reach by chance: the thresholds of `stats.drift`.

Nothing is assumed of how a feature is distributed. Both effect sizes are functions of bin counts, and what the counts
of a clean window look like follows from the reference's own counts: the true shares are drawn from their posterior
(Dirichlet; for bins between quantiles this is the exact law of spacings), then a window from those shares. So the
reference's sampling error and bins that it has hardly seen are part of the threshold.

A shift of the mean is what the promise is about, so it may spend four fifths of a number's chance of a false alarm;
any other change of shape shows in the bins, and has the last fifth. What has no order spends all on the bins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np

SEED = 20240501
EXCEEDING = 25  # at least so many drawn windows should lie beyond the wanted quantile
MIN_WINDOWS, MAX_WINDOWS = 1000, 4000  # of a feature, whatever the others are
DRAWS = 100_000  # windows of all features together: half a second
BINNED_PENALTY = math.log(4.0)  # a number's bins may alarm a quarter as often as its mean
_LOW, _HIGH = 0.90, 0.99  # quantiles that fix a tail
_LOG_LOW = -math.log(1.0 - _LOW)
_GRID_STEPS = (1, 2, 5)


class Profile(NamedTuple):
    """A reference's bins side by side: every array is [features, bins], padded with zeros, or [features]."""

    shares: np.ndarray
    weights: np.ndarray  # parameters of the posterior: rows that speak for a bin, one where none does
    scores: np.ndarray  # normal score of a number's bin
    present: np.ndarray  # 1 where a bin enters the mean score
    mean: np.ndarray
    sd: np.ndarray  # of the scores; 0: no order, no shift


class Pool(NamedTuple):
    """How surprising drawn windows of every feature were, ascending, and how many of them are not less so."""

    surprises: np.ndarray
    beyond: np.ndarray

    def at_least(self, surprise: float) -> float:
        """How many are not less surprising."""
        place = int(np.searchsorted(self.surprises, surprise))
        return float(self.beyond[place]) if place < len(self.beyond) else 0.0

    def exceeded_by(self, most: float) -> float:
        """The smallest surprise that so many reach at most; the largest where that is fewer than one draw."""
        place = int(np.searchsorted(-self.beyond, -most))
        return float(self.surprises[min(place, len(self.surprises) - 1)])


class Limits(NamedTuple):
    """Thresholds of the distance and of the shift, [features], and how surprising anything else is."""

    binned: np.ndarray
    shifted: np.ndarray
    tails: np.ndarray  # [2, features, 2]: quantile and exponent
    penalties: np.ndarray  # [features], of the distance
    drawn: Pool
    windows: int  # drawn of each feature

    def level(self, binned: np.ndarray, shifted: np.ndarray) -> float:
        """The smallest share of false alarms at which a window with these effects would alarm."""
        surprise = float(_joint_surprise(binned, shifted, self.tails, self.penalties).max())
        return 1.0 - math.exp(-self.drawn.at_least(surprise) / self.windows)


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

    Round numbers, which windows usually have, stay as they are.

    Example:
        >>> [on_grid(rows) for rows in (7, 200, 207, 1000, 1049)]
        [7, 200, 200, 1000, 1000]
    """
    if rows <= 20:
        return rows
    decade = 10 ** int(math.log10(rows) + 1e-9)
    leading = max(step * decade for step in _GRID_STEPS if step * decade <= rows)
    return rows - rows % max(leading // 20, 1)


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


@lru_cache(maxsize=16)  # of a few megabytes each
def _calibrate(key: bytes, rows: int, false_alarms: float) -> Limits:
    """Draw windows for every feature, then choose one surprise for all that keeps the windows' rate.

    Features count as independent: where they move together, the true rate is lower than asked.
    """
    decoded: list[tuple[list[int], bool]] = msgspec.msgpack.decode(key)
    features = [(tuple(own), ordered) for own, ordered in decoded]
    # Bins lie at quantiles: numbers without repeated values all have the same counts, and are drawn once.
    kinds = Counter(features)
    profile = profile_of([np.asarray(own) for own, _ in kinds], [ordered for _, ordered in kinds])
    penalties = np.where(profile.sd > 0, BINNED_PENALTY, 0.0)
    expected = -math.log1p(-min(max(false_alarms, 1e-6), 0.999))  # features beyond their limit, per window
    windows = max(int(min(max(EXCEEDING / expected, MIN_WINDOWS), MAX_WINDOWS)), DRAWS // len(kinds))
    generator = np.random.default_rng(SEED)
    tails, drawn = np.empty((2, len(kinds), 2)), np.empty((len(kinds), windows))
    for index in range(len(kinds)):
        effects = effects_of(profile, draw_windows(profile.weights[index], rows, windows, generator), index)
        tails[:, index] = [_tail(values) for values in effects]
        drawn[index] = _joint_surprise(*effects, tails[:, index], penalties[index])
    often = np.array(list(kinds.values()), float)
    pool = _pool(drawn, often)
    surprise = _choose(pool, expected * windows, float(np.square(often).sum() / often.sum()))
    place = {kind: index for index, kind in enumerate(kinds)}
    order = [place[feature] for feature in features]
    tails, penalties = tails[:, order], penalties[order]
    binned = _limit(surprise + penalties, tails[0])
    return Limits(binned, _limit(surprise, tails[1]), tails, penalties, pool, windows)


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


def _limit(surprise: np.ndarray | float, tail: np.ndarray) -> np.ndarray:
    """The value that is so surprising."""
    return tail[..., 0] * (surprise / _LOG_LOW) ** (1.0 / tail[..., 1])


def _joint_surprise(binned: np.ndarray, shifted: np.ndarray, tails: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    return np.maximum(_surprise(binned, tails[0]) - penalty, _surprise(shifted, tails[1]))


def _pool(drawn: np.ndarray, often: np.ndarray) -> Pool:
    """Draws of [kinds, windows] for all features; each counts for as many as share its kind."""
    order = np.argsort(drawn, axis=None, kind="stable")
    weights = np.repeat(often, drawn.shape[1])[order]
    return Pool(drawn.ravel()[order], np.cumsum(weights[::-1])[::-1])


def _choose(pool: Pool, exceeding: float, repeats: float) -> float:
    """The surprise that so many of the pool exceed, on the careful side of what drawing leaves unsure.

    Args:
        pool: Of all features.
        exceeding: How many may lie beyond.
        repeats: For how many features a draw counts on average.
    """
    careful = exceeding - 1.28 * math.sqrt(exceeding * repeats)
    if careful >= 5.0 * repeats:
        return pool.exceeded_by(careful)
    # Too few draws lie out there: go on from the tenth as the tail does, a factor in chance for its logarithm.
    reachable = min(10.0 * repeats, float(pool.beyond[0]))
    return pool.exceeded_by(reachable) + math.log(max(reachable / (exceeding * 0.75), 1.0))
