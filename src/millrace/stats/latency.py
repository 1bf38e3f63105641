"""Latencies counted in fine bins, and the threshold above which a canary's request is slow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS_PER_OCTAVE = 8
_LEAST_S = 1e-6
MAX_BIN = BINS_PER_OCTAVE * 28  # some four minutes
SLACK, SLACK_S = 1.25, 1e-3  # slower by so little is not slower


def bins_of(latencies_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """In which bin each latency falls: eight to an octave, from a microsecond.

    Example:
        >>> bins_of(np.array([0.0, 1e-6, 2e-6, 1e9])).tolist()
        [0, 0, 8, 224]
    """
    places = np.floor(np.log2(np.maximum(latencies_s, _LEAST_S) / _LEAST_S) * BINS_PER_OCTAVE)
    return np.clip(places, 0, MAX_BIN).astype(np.int64)


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """From which bin on a request is slow; a candidate's may take a little longer than the baseline's."""

    base: int
    candidate: int

    @property
    def seconds(self) -> float:
        """The baseline's, as a time."""
        return _LEAST_S * 2 ** (self.base / BINS_PER_OCTAVE)

    def count(self, counts: Mapping[int, int], *, is_candidate: bool) -> int:
        """How many of these latencies are slow.

        Example:
            >>> Threshold(base=10, candidate=12).count({9: 1, 10: 2, 12: 4}, is_candidate=False)
            6
        """
        limit = self.candidate if is_candidate else self.base
        return sum(count for place, count in counts.items() if place >= limit)


def threshold_of(counts: Mapping[int, int]) -> Threshold:
    """The baseline's 95th percentile.

    Args:
        counts: Its latencies by bin, at least one.

    Example:
        >>> threshold_of({100: 95, 120: 5})
        Threshold(base=101, candidate=104)
    """
    left = 0.95 * sum(counts.values())
    base = 0
    for place in sorted(counts):
        left -= counts[place]
        base = place + 1
        if left <= 0:
            break
    limit_s = _LEAST_S * 2 ** (base / BINS_PER_OCTAVE)
    candidate = math.ceil(math.log2(max(limit_s * SLACK, limit_s + SLACK_S) / _LEAST_S) * BINS_PER_OCTAVE)
    return Threshold(base=base, candidate=candidate)
