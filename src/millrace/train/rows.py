"""Which rows come when: pure functions of (seed, epoch, step), so that nothing must be saved to resume."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def row_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of an epoch's rows: the ranks of a Philox stream keyed by seed and epoch.

    Built on the raw stream, which NumPy promises never to change, not on its `permutation`.

    Returns:
        int64 [rows].

    Example:
        >>> sorted(row_order(0, 1, 4).tolist())
        [0, 1, 2, 3]
    """
    keys = np.random.Philox(key=[seed & _MASK, epoch]).random_raw(rows)
    return np.argsort(keys, kind="stable")


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and end of each batch; a last batch of one row joins the one before (batch norm needs two).

    Example:
        >>> batch_bounds(7, 3), batch_bounds(8, 3)
        ([(0, 3), (3, 7)], [(0, 3), (3, 6), (6, 8)])
    """
    bounds = [(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        last = bounds.pop()
        bounds[-1] = (bounds[-1][0], last[1])
    return bounds


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's randomness (dropout, augmentation): SplitMix64 of both, 63 bits.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.

    Example:
        >>> step_seed(0, 1) != step_seed(0, 2)
        True
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) >> 1
