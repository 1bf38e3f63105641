"""Train, validation and test: by the hash of a key, by class, by group, or by time.

With shares, a row's place depends on its hash alone: appending rows moves none. With exact counts
(and `stratify: true`), the rows with the lowest hashes are the test: appending rows then moves the
few rows that stand at the boundary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from millrace.core.errors import DataError
from millrace.core.spec import Split
from millrace.core.units import Share

TRAIN, VALIDATION, TEST = 0, 1, 2
NAMES = ("train", "validation", "test")
_DEFAULT_TEST_ROWS = 600
_DEFAULT_VALIDATION_ROWS = 150


class Sizes(NamedTuple):
    """Rows wanted; where a `share` is not None it decides, else the count."""

    test: int
    validation: int
    test_share: float | None
    validation_share: float | None

    @property
    def is_exact(self) -> bool:
        """Whether a count was asked for."""
        return self.test_share is None or self.validation_share is None


def _size(value: int | float | str, rows: int, key: str) -> tuple[int, float | None]:
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise DataError(f"data.split.{key} wants at least one row, got {value}")
        return value, None
    share = float(Share.parse(value))
    if not 0.0 < share < 1.0:
        raise DataError(f"data.split.{key} wants a share between 0 and 1, got {value!r}")
    return max(1, round(share * rows)), share


def sizes(split: Split, rows: int) -> Sizes:
    """How many rows test and validation get.

    Default test: 20 %, at least 600 rows, at most a third; validation: 10 %, at least 150 rows, at
    most a sixth.

    Raises:
        DataError: They leave no training rows.

    Example:
        >>> sizes(Split(test=600, validation=150), 1797)[:2], sizes(Split(), 300)[:2]
        ((600, 150), (100, 50))
    """
    test, test_share = _default(rows, 0.2, _DEFAULT_TEST_ROWS, 1 / 3)
    if split.test is not None:
        test, test_share = _size(split.test, rows, "test")
    validation, validation_share = _default(rows, 0.1, _DEFAULT_VALIDATION_ROWS, 1 / 6)
    if split.validation is not None:
        validation, validation_share = _size(split.validation, rows, "validation")
    if test + validation >= rows:
        raise DataError(
            f"data.split wants {test} test and {validation} validation rows: of {rows} kept rows none is left to train",
            hint="ask for fewer, or add rows",
        )
    return Sizes(test, validation, test_share, validation_share)


def _default(rows: int, share: float, at_least: int, at_most: float) -> tuple[int, float | None]:
    if share * rows >= at_least:
        return round(share * rows), share
    if at_most * rows <= at_least:
        return max(1, int(at_most * rows)), at_most
    return at_least, None


def by_threshold(hashes: np.ndarray, want: Sizes) -> np.ndarray:
    """A place for every row by its hash alone: appending rows moves none.

    Args:
        hashes: uint64 [rows].
        want: Both as shares.

    Returns:
        int8 [rows] of TRAIN, VALIDATION, TEST.

    Example:
        >>> by_threshold(np.array([0, 2**63, 2**64 - 1], dtype=np.uint64), Sizes(0, 0, 0.4, 0.2)).tolist()
        [2, 1, 0]
    """
    place = hashes.astype(np.float64) / 2.0**64
    test, validation = want.test_share or 0.0, want.validation_share or 0.0
    return np.where(place < test, TEST, np.where(place < test + validation, VALIDATION, TRAIN)).astype(np.int8)


def repair(places: np.ndarray, hashes: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Give every stratum with three rows or more at least one row in each place.

    The lowest hash goes to the test, the next to validation, the highest to training. A stratum of
    two rows has one in the test and one in training.

    Example:
        >>> repair(np.zeros(3, np.int8), np.array([3, 1, 2], np.uint64), np.zeros(3, int)).tolist()
        [0, 2, 1]
    """
    places = places.copy()
    for rows in _groups(strata):
        order = rows[np.argsort(hashes[rows], kind="stable")]
        present = set(places[order].tolist())
        if len(order) < 2 or len(present) == 3:
            continue
        if len(order) == 2:
            places[order] = [TEST, TRAIN]
            continue
        if TEST not in present:
            places[order[0]] = TEST
        if TRAIN not in present:
            places[order[-1]] = TRAIN
        if VALIDATION not in set(places[order].tolist()):
            middle = order[1:-1]
            spare = middle[places[middle] == TRAIN]
            places[spare[0] if len(spare) else middle[-1]] = VALIDATION
    return places


def _groups(strata: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(strata, kind="stable")
    edges = np.flatnonzero(np.diff(strata[order])) + 1
    return np.split(order, edges)


def quotas(counts: np.ndarray, total: int, room: np.ndarray) -> np.ndarray:
    """Share `total` rows out over strata in proportion, by largest remainder, at least one each.

    Args:
        counts: Rows of every stratum.
        total: Rows to hand out.
        room: How many rows every stratum can spare; none where it cannot spare any.

    Raises:
        DataError: There are fewer rows to hand out than strata that must have one, or too many.

    Example:
        >>> quotas(np.array([90, 9, 3]), 10, np.array([88, 7, 1])).tolist()
        [8, 1, 1]
    """
    least = np.minimum(room, 1)
    if total < least.sum() or total > room.sum():
        raise DataError(
            f"data.split: {total} rows cannot hold a row of each of {int(least.sum())} classes"
            if total < least.sum()
            else f"data.split: {total} rows leave a class without training rows",
            hint="ask for another number of rows, or set split.stratify: false",
        )
    exact = total * counts / max(1, counts.sum())
    share = np.clip(np.floor(exact).astype(np.int64), least, room)
    while share.sum() != total:
        gap = exact - share
        if share.sum() < total:
            share[np.argmax(np.where(share < room, gap, -np.inf))] += 1
        else:
            share[np.argmin(np.where(share > least, gap, np.inf))] -= 1
    return share


def by_quota(hashes: np.ndarray, strata: np.ndarray, want: Sizes) -> np.ndarray:
    """Exact counts: in every stratum the lowest hashes are the test, the next ones validation.

    Raises:
        DataError: The counts cannot be met with every stratum present.

    Example:
        >>> by_quota(np.array([5, 1, 3, 2], np.uint64), np.zeros(4, int), Sizes(1, 1, None, None)).tolist()
        [0, 2, 0, 1]
    """
    groups = _groups(strata)
    counts = np.array([len(rows) for rows in groups])
    test = quotas(counts, want.test, np.maximum(counts - np.where(counts > 2, 2, 1), 0))
    validation = quotas(counts, want.validation, np.maximum(counts - test - 1, 0))
    places = np.zeros(len(hashes), dtype=np.int8)
    for rows, tests, validations in zip(groups, test, validation, strict=True):
        order = rows[np.argsort(hashes[rows], kind="stable")]
        places[order[:tests]] = TEST
        places[order[tests : tests + validations]] = VALIDATION
    return places


def by_group(hashes: np.ndarray, group_of: np.ndarray, want: Sizes) -> np.ndarray:
    """Whole groups only, in the order of their hashes, until a place has the rows it wants.

    Args:
        hashes: uint64 [rows], equal within a group.
        group_of: int [rows], the group's number.
        want: Rows; shares go by the hash alone.

    Raises:
        DataError: There are fewer than three groups.

    Example:
        >>> by_group(np.array([1, 1, 2, 3, 3], np.uint64), np.array([0, 0, 1, 2, 2]), Sizes(2, 1, None, None)).tolist()
        [2, 2, 1, 0, 0]
    """
    groups = _groups(group_of)
    if len(groups) < 3:
        raise DataError(f"data.split.group wants at least three groups, got {len(groups)}")
    if not want.is_exact:
        places = by_threshold(hashes, want)
        firsts = np.array([rows[0] for rows in groups])
        fixed = repair(places[firsts], hashes[firsts], np.zeros(len(firsts), int))
        for rows, place in zip(groups, fixed, strict=True):
            places[rows] = place
        return places
    groups.sort(key=lambda rows: int(hashes[rows[0]]))
    places = np.zeros(len(hashes), dtype=np.int8)
    taken = {TEST: 0, VALIDATION: 0}
    for index, rows in enumerate(groups[:-1]):
        place = TEST if taken[TEST] < want.test else VALIDATION
        if index == len(groups) - 2 and not taken[VALIDATION]:
            place = VALIDATION
        if place == VALIDATION and taken[VALIDATION] >= want.validation:
            break
        places[rows] = place
        taken[place] += len(rows)
    return places


def by_time(times: np.ndarray, want: Sizes) -> np.ndarray:
    """The latest rows are the test, those before them validation; equal times keep their order.

    Example:
        >>> by_time(np.array([3, 1, 2, 4]), Sizes(1, 1, None, None)).tolist()
        [1, 0, 0, 2]
    """
    order = np.argsort(times, kind="stable")
    places = np.zeros(len(times), dtype=np.int8)
    places[order[len(order) - want.test :]] = TEST
    places[order[len(order) - want.test - want.validation : len(order) - want.test]] = VALIDATION
    return places


def by_source(given: pl.Series, hashes: np.ndarray, strata: np.ndarray, split: Split) -> np.ndarray:
    """The split that the source itself came with; validation is taken from its training rows.

    Raises:
        DataError: The source names no training or no test rows.
    """
    names = given.to_list()
    places = np.array([{"test": TEST, "validation": VALIDATION}.get(name, TRAIN) for name in names], dtype=np.int8)
    if VALIDATION not in places:
        train = np.flatnonzero(places == TRAIN)
        want = sizes(Split(test=1, validation=split.validation), len(train))
        if want.validation_share is None:
            inner = by_quota(hashes[train], strata[train], want._replace(test=1))
            inner[inner == TEST] = TRAIN
        else:
            inner = by_threshold(hashes[train], Sizes(0, 0, 0.0, want.validation_share))
        places[train] = inner
    return places


def assign(want: Sizes, hashes: np.ndarray, strata: np.ndarray, stratify: bool | None) -> np.ndarray:
    """Places by hash: exact counts or stratified exactly, else by thresholds with no class left out.

    Example:
        >>> places = assign(Sizes(2, 1, None, None), np.arange(9, dtype=np.uint64), np.zeros(9, int), None)
        >>> np.bincount(places).tolist()
        [6, 1, 2]
    """
    if stratify is False:
        strata = np.zeros(len(hashes), dtype=np.int64)
    if want.is_exact or stratify:
        return by_quota(hashes, strata, want)
    places = repair(by_threshold(hashes, want), hashes, strata)
    if VALIDATION not in places:
        train = np.flatnonzero(places == TRAIN)
        counts = np.bincount(strata[train], minlength=int(strata.max()) + 1)
        spare = train[counts[strata[train]] > 1]
        if len(spare) == 0:
            raise DataError(f"data.split: {len(places)} rows are too few for training, validation and test rows")
        places[spare[np.argmin(hashes[spare])]] = VALIDATION
    return places
