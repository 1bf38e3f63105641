"""How long calls take: a quick look before the first request, and a race of layouts and batch sizes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from millrace.core.types import Struct

INLINE_LIMIT_S = 200e-6  # a call of one row quicker than this runs on the event loop
TICK_LIMIT_S = 2e-3  # a batch predicted to take longer never does: it would hold up every connection
CHEAP_ENOUGH = 0.05  # a batch is large enough when a row costs at most so much more than at the best size

Tensors = dict[str, np.ndarray]


class Infer(Protocol):
    """Outputs by name for tensors by name."""

    def __call__(self, tensors: Mapping[str, np.ndarray], /) -> Tensors: ...


class Cost(Struct, frozen=True, kw_only=True):
    """How long a call takes: `base_s` + rows x `per_row_s`, measured; and where a row is cheapest.

    `best_rows`: larger calls are no cheaper per row, so nobody is kept waiting for them.

    Example:
        >>> round(Cost(base_s=1e-5, per_row_s=1e-6).predict_s(10), 9)
        2e-05
    """

    base_s: float
    per_row_s: float
    best_rows: int | None = None
    may_hang: bool = False  # a user's code: however quick, it never runs on the event loop

    def predict_s(self, rows: int) -> float:
        """Seconds for a call of so many rows."""
        return self.base_s + rows * self.per_row_s

    @property
    def is_inline(self) -> bool:
        """Whether one row is quicker than handing it to a thread would be worth."""
        return not self.may_hang and self.predict_s(1) < INLINE_LIMIT_S

    def rows_within(self, limit_s: float) -> int:
        """The most rows whose call is predicted to take no longer; a row that is itself slower still runs.

        Example:
            >>> Cost(base_s=0.01, per_row_s=0.002).rows_within(0.025)
            7
        """
        if self.per_row_s <= 0:
            return sys.maxsize if self.base_s <= limit_s else 1
        return max(1, int((limit_s - self.base_s) / self.per_row_s + 1e-9))


def fit(call_s: Mapping[int, float]) -> Cost:
    """The line through the calls of one row and of the best size.

    Args:
        call_s: Seconds of the quickest call by its rows; of one row at least.

    Returns:
        A line of one point costs as much for every row.

    Example:
        >>> found = fit({1: 0.011, 2: 0.012, 4: 0.014, 8: 0.018})
        >>> round(found.base_s, 6), round(found.per_row_s, 6), found.best_rows
        (0.01, 0.001, 8)
        >>> fit({1: 0.01, 2: 0.02}).best_rows
        1
    """
    single_s = call_s[1]
    if len(call_s) == 1:
        return Cost(base_s=0.0, per_row_s=single_s, best_rows=1)
    cheapest_s = min(took_s / rows for rows, took_s in call_s.items())
    best = next(rows for rows, took_s in sorted(call_s.items()) if took_s / rows <= cheapest_s * (1 + CHEAP_ENOUGH))
    reach = max(best, min(rows for rows in call_s if rows > 1))
    per_row_s = max(0.0, (call_s[reach] - single_s) / (reach - 1))
    return Cost(base_s=max(0.0, single_s - per_row_s), per_row_s=per_row_s, best_rows=best)


def calibrate(infer: Infer, sample: Mapping[str, np.ndarray], max_batch: int, budget_s: float = 0.15) -> Cost:
    """Time calls of 1 row and, where that is quick, of 2, 4, 8 … `max_batch` rows.

    Args:
        infer: The model.
        sample: Real tensors of at least one row.
        max_batch: Rows of the largest call.
        budget_s: For all repetitions together.

    Returns:
        The line through the quickest calls of one row and of the best size: noise only ever adds. A slow
        model is taken to cost as much per row: being ready matters more than knowing better.

    Raises:
        MillraceError: The model failed.
    """
    sizes = [1, *(2**power for power in range(1, max_batch.bit_length()) if 2**power < max_batch), max_batch]
    quickest_s: dict[int, float] = {}
    for size in dict.fromkeys(sizes):
        quickest_s[size] = _quickest(infer, repeated(sample, size), budget_s / len(sizes))
        if quickest_s[size] > TICK_LIMIT_S:
            break
    if len(quickest_s) == 1 and quickest_s[1] > TICK_LIMIT_S:
        return Cost(base_s=0.0, per_row_s=quickest_s[1])
    return fit(quickest_s)


def repeated(sample: Mapping[str, np.ndarray], rows: int) -> Tensors:
    """The first row so many times."""
    return {name: np.repeat(values[:1], rows, axis=0) for name, values in sample.items()}


def _quickest(infer: Infer, tensors: Mapping[str, np.ndarray], budget_s: float) -> float:
    begin = time.perf_counter()
    infer(tensors)  # the first call of a shape allocates
    quickest = time.perf_counter() - begin
    if quickest > budget_s:
        return quickest
    for _ in range(30):
        start = time.perf_counter()
        infer(tensors)
        end = time.perf_counter()
        quickest = min(quickest, end - start)
        if end - begin > budget_s:
            break
    return quickest
