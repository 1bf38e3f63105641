"""A race of layouts and batch sizes: what cannot win any more is not measured again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from millrace.core.types import Struct
from millrace.serve.calibrate import CHEAP_ENOUGH, Cost, fit
from millrace.serve.layouts import Layout

BUDGET_S = 10.0
DEEP_ENOUGH = 0.1  # a layout does about as much as the best one where a row costs at most so much more
LONG_ENOUGH_S = 0.01  # of a call: queueing, joining and answering cost about 0.3 ms
LONGEST_CALL_S = 1.0  # a larger batch than that is not tried
_MARGINS = (1.5, 1.25, 1.1, 1.05)  # how much worse than the best may stay in, round by round
_GAIN = 0.97  # beyond four rows twice as many are tried where a row became cheaper by so much
_HOPEFUL = 1.5  # a layout is tried with more rows where a row costs at most so many times the best


class Cell(NamedTuple):
    """Calls of so many rows in a layout."""

    layout: Layout
    rows: int


class Timing(Struct, frozen=True, kw_only=True):
    """What a cell took: `row_s` is the seconds per row of all callers together; measured so many times."""

    layout: Layout
    rows: int
    row_s: float
    times: int

    @property
    def call_s(self) -> float:
        """Of one call."""
        return self.row_s * self.rows * self.layout.callers


class Calibration(Struct, frozen=True, kw_only=True):
    """How a model is best called: `shallow` answers one request soonest, `deep` the most in a second.

    The costs are those of a call. `source`: "start" (a quick look), "idle" (measured while nobody asked),
    "stored" (measured earlier) or "fixed" (the user gave the threads).
    """

    shallow: Layout = Layout()
    deep: Layout = Layout()
    shallow_cost: Cost
    deep_cost: Cost
    timings: list[Timing] = []
    spent_s: float = 0.0
    source: str = "start"

    def cost_of(self, layout: Layout) -> Cost | None:
        """What calls of a layout cost, where it was measured."""
        call_s = {one.rows: one.call_s for one in self.timings if one.layout == layout}
        return fit(call_s) if 1 in call_s else None


class Race:
    """Successive halving over cells, for two prizes: the quickest single row, and the cheapest row.

    Whoever measures asks for the `next` cell, tells what it took, and may stop at any time and go on later.

    Args:
        layouts: Who runs.
        max_rows: Of a call.
        budget_s: Of all measurements together.
    """

    def __init__(self, layouts: Sequence[Layout], max_rows: int, budget_s: float = BUDGET_S) -> None:
        self.spent_s = 0.0
        self.timings: dict[Cell, Timing] = {}
        self._max_rows, self._budget_s = max_rows, budget_s
        self._round = 0
        self._queue = deque(Cell(layout, 1) for layout in layouts)
        self._firsts = len(self._queue)  # must be measured, whatever the budget

    @property
    def next(self) -> Cell | None:
        """What to measure now; None: it is decided, or the budget is used."""
        if self.spent_s >= self._budget_s and len(self.timings) >= self._firsts:
            return None
        while not self._queue:
            if self._round == len(_MARGINS):
                return None
            self._queue.extend(self._hopeful(_MARGINS[self._round]))
            self._round += 1
            if len(self._queue) < 2:  # nobody left to race with
                return None
        return self._queue[0]

    def tell(self, cell: Cell, row_s: float, spent_s: float) -> None:
        """What the `next` cell took.

        Args:
            cell: The one that was asked for.
            row_s: Seconds per row.
            spent_s: That measuring took.
        """
        self._queue.popleft()
        self.spent_s += spent_s
        known = self.timings.get(cell)
        times = 1 if known is None else known.times + 1
        row_s = row_s if known is None else min(row_s, known.row_s)  # noise only ever adds
        self.timings[cell] = Timing(layout=cell.layout, rows=cell.rows, row_s=row_s, times=times)
        self._grow(cell)

    def drop(self, layout: Layout) -> None:
        """A layout cannot be used: no memory for it, or it fails."""
        self._queue = deque(cell for cell in self._queue if cell.layout != layout)
        self.timings = {cell: timing for cell, timing in self.timings.items() if cell.layout != layout}
        self._firsts = min(self._firsts, len({cell.layout for cell in (*self._queue, *self.timings)}))

    def result(self) -> Calibration:
        """The winners so far; of everything that was measured at least once."""
        singles = [one for one in self.timings.values() if one.layout.callers == 1 and one.rows == 1]
        cheapest_s = min(one.row_s for one in self.timings.values())
        cheap = [one for one in self.timings.values() if one.row_s <= cheapest_s * (1 + DEEP_ENOUGH)]
        deep = min(cheap, key=_preferred)
        soonest_s = min(one.row_s for one in singles)
        soon = [one for one in singles if one.row_s <= soonest_s * (1 + CHEAP_ENOUGH)]
        shallow = min(
            soon, key=lambda one: (not _shares_session(one.layout, deep.layout), one.layout.is_spinning, one.row_s)
        )
        return Calibration(
            shallow=shallow.layout, deep=deep.layout, shallow_cost=self._cost(shallow.layout, deep.rows),
            deep_cost=self._cost(deep.layout, deep.rows), spent_s=self.spent_s, source="idle",
            timings=sorted(self.timings.values(), key=lambda one: (str(one.layout), one.rows)),
        )  # fmt: skip

    def _grow(self, cell: Cell) -> None:
        """Twice the rows, where that may pay."""
        timing = self.timings[cell]
        rows = min(cell.rows * 2, self._max_rows)
        larger = Cell(cell.layout, rows)
        if larger in self.timings or larger in self._queue or timing.call_s * rows / cell.rows > LONGEST_CALL_S:
            return
        before = min(
            (one.row_s for one in self.timings.values() if one.layout == cell.layout and one.rows < cell.rows),
            default=timing.row_s,
        )
        best = min(one.row_s for one in self.timings.values())
        is_gaining = cell.rows <= 2 or timing.row_s <= before * _GAIN
        if is_gaining and timing.row_s <= best * _HOPEFUL:
            self._queue.append(larger)

    def _hopeful(self, margin: float) -> list[Cell]:
        """Who may still win one of the prizes."""
        cheapest_s = min(one.row_s for one in self.timings.values())
        soonest_s = min(
            one.row_s for cell, one in self.timings.items() if cell.rows == 1 and cell.layout.callers == 1
        )  # fmt: skip
        return [
            cell
            for cell, one in self.timings.items()
            if one.row_s <= cheapest_s * margin
            or (cell.rows == 1 and cell.layout.callers == 1 and one.row_s <= soonest_s * margin)
        ]

    def _cost(self, layout: Layout, rows: int) -> Cost:
        call_s = {one.rows: one.call_s for one in self.timings.values() if one.layout == layout}
        cost = fit(call_s)
        return Cost(base_s=cost.base_s, per_row_s=cost.per_row_s, best_rows=rows)


def _preferred(one: Timing) -> tuple[int, bool, bool, int, float]:
    """Of what does about as much: calls that need not wait for each other's threads, since under load others want the
    processors too; long enough that what surrounds a call costs little; then the shortest."""
    layout = one.layout
    return -layout.callers, layout.is_spinning, one.call_s < LONG_ENOUGH_S, one.rows, one.row_s


def _shares_session(one: Layout, other: Layout) -> bool:
    return (one.threads, one.is_spinning) == (other.threads, other.is_spinning)
