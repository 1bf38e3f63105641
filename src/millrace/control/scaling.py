"""How many replicas an endpoint needs: by requests in flight, by the work that arrives, by how long it would wait.

Nothing here looks at a clock or does anything: whoever calls says what time it is and what was measured.
"""

from __future__ import annotations

import math
from collections import deque

from millrace.core.types import Struct
from millrace.serve.telemetry import TelemetryFrame

UTILISATION = 0.7  # of a replica's time: what is left keeps waiting short
WAIT_SHARE = 0.5  # of the bound of the queue: before requests are refused
TOLERANCE = 0.1  # of a replica: for so little there is not one more


class Bounds(Struct, frozen=True, kw_only=True):
    """What somebody wants: how few and how many replicas, and how eagerly they follow the load.

    `in_flight`: requests that a replica is to have at once; `window_s`: over which load is averaged; `down_s`: the
    highest need of so long ago still counts; `zero_s`: after so long without a request there may be none;
    `queue_s`: how many seconds of work may wait before requests are refused.
    """

    least: int = 1
    most: int = 1
    in_flight: float = 32.0
    window_s: float = 15.0
    down_s: float = 300.0
    zero_s: float = 300.0
    queue_s: float = 1.0


class Load(Struct, frozen=True, kw_only=True):
    """What was measured since the look before.

    `waiting` and `running` requests at the moment; `requests` and `rows` that came meanwhile, whether they were
    answered or refused; `row_s`: seconds that a row takes a replica; `replicas` that serve; `knocks`: connections
    wait that nobody has taken.
    """

    waiting: int = 0
    running: int = 0
    requests: float = 0.0
    rows: float = 0.0
    row_s: float = 0.0
    replicas: int = 0
    knocks: bool = False

    @property
    def is_asked(self) -> bool:
        """Whether anybody wants anything."""
        return self.knocks or self.waiting + self.running > 0 or self.requests > 0


def need(load: Load, in_flight: float, rows_per_s: float, bounds: Bounds) -> int:
    """How many replicas a load needs: the largest of three estimates, one at least.

    Args:
        load: As it is now.
        in_flight: Requests at once, on average.
        rows_per_s: That arrive.
        bounds: With the targets.

    Example:
        >>> need(Load(row_s=0.01), in_flight=4.0, rows_per_s=200.0, bounds=Bounds(most=8))  # 2 s of work a second
        3
        >>> need(Load(), in_flight=100.0, rows_per_s=0.0, bounds=Bounds(most=8))
        4
    """
    by_concurrency = in_flight / bounds.in_flight
    by_work = rows_per_s * load.row_s / UTILISATION
    rows = load.rows / load.requests if load.requests else 1.0
    by_wait = load.waiting * max(rows, 1.0) * load.row_s / (WAIT_SHARE * bounds.queue_s)
    return max(1, math.ceil(max(by_concurrency, by_work, by_wait) - TOLERANCE))


class Scaler:
    """Decides how many replicas there are to be. Not thread-safe.

    More at once, at most twice as many at a time, and the next step once those serve. Fewer only when nothing within
    `down_s` needed as many: load that comes and goes starts no replica twice. None where `least` is 0 and nobody has
    asked for `zero_s`.

    Args:
        bounds: To be replaced when somebody wants something else.
        now_s: Of a clock that does not jump.
        replicas: How many are wanted now.

    Example:
        >>> scaler = Scaler(Bounds(least=0, most=4, zero_s=60), now_s=0.0, replicas=1)
        >>> scaler.decide(30.0, Load(replicas=1)), scaler.decide(61.0, Load(replicas=1))
        (1, 0)
        >>> scaler.decide(70.0, Load(knocks=True))
        1
    """

    def __init__(self, bounds: Bounds, now_s: float, replicas: int) -> None:
        self.bounds, self.replicas = bounds, replicas
        self._asked_s = self._looked_s = now_s
        self._samples: deque[tuple[float, float, float, float]] = deque()  # when, how long, in flight, rows
        self._needs: deque[tuple[float, int]] = deque([(now_s, replicas)])

    def touch(self, now_s: float) -> None:
        """There is something to serve anew: that counts as being asked; one replica at least."""
        self._asked_s = now_s
        self.replicas = max(self.replicas, 1)

    def decide(self, now_s: float, load: Load) -> int:
        """How many replicas there are to be from now on.

        Args:
            now_s: Of the same clock as before.
            load: Measured since the last time.
        """
        bounds = self.bounds
        if load.is_asked:
            self._asked_s = now_s
        self._note(now_s, load)
        wish = need(load, *self._averages(), bounds)
        self._needs.append((now_s, wish))
        while len(self._needs) > 1 and self._needs[0][0] < now_s - bounds.down_s:
            self._needs.popleft()
        if bounds.least == 0 and now_s - self._asked_s >= bounds.zero_s:
            self.replicas = 0
        elif self.replicas == 0:
            self.replicas = int(load.is_asked)
        else:
            self.replicas = self._step(wish, load)
        self.replicas = min(max(self.replicas, bounds.least), bounds.most)
        return self.replicas

    def _step(self, wish: int, load: Load) -> int:
        if wish > self.replicas:
            is_settled = load.replicas >= self.replicas
            return min(wish, 2 * self.replicas) if is_settled else self.replicas
        return min(self.replicas, max(needed for _, needed in self._needs))

    def _note(self, now_s: float, load: Load) -> None:
        lasted_s = now_s - self._looked_s
        self._looked_s = now_s
        self._samples.append((now_s, lasted_s, float(load.waiting + load.running), load.rows))
        while len(self._samples) > 1 and self._samples[0][0] <= now_s - self.bounds.window_s:
            self._samples.popleft()

    def _averages(self) -> tuple[float, float]:
        """Requests in flight and rows per second, over the window."""
        lasted_s = sum(sample[1] for sample in self._samples)
        if lasted_s <= 0:
            return self._samples[-1][2], 0.0
        in_flight = sum(sample[1] * sample[2] for sample in self._samples) / lasted_s
        return in_flight, sum(sample[3] for sample in self._samples) / lasted_s


class Meter:
    """Adds up what the replicas of one endpoint tell. Not thread-safe.

    Example:
        >>> meter = Meter()
        >>> for replica in (1, 2):
        ...     meter.take(replica, TelemetryFrame(waiting=3, row_s=0.1, counters={"rows": 5, "answered": 5}))
        >>> meter.forget(2)
        >>> meter.read(replicas=1)
        Load(waiting=3, running=0, requests=10.0, rows=10.0, row_s=0.1, replicas=1, knocks=False)
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, str], TelemetryFrame] = {}  # by replica and version
        self._answered = self._refused = self._rows = 0.0
        self._row_s = 0.0

    def take(self, replica: int, frame: TelemetryFrame) -> None:
        """Add a frame of a replica."""
        self._last[replica, frame.version] = frame
        self._rows += frame.counters.get("rows", 0)
        self._answered += frame.counters.get("answered", 0)
        self._refused += frame.counters.get("failed", 0)  # for want of room, above all
        if frame.row_s > 0:
            self._row_s = frame.row_s

    def forget(self, replica: int) -> None:
        """It is no more: nothing waits in it."""
        for key in [key for key in self._last if key[0] == replica]:
            del self._last[key]

    def read(self, replicas: int, *, knocks: bool = False) -> Load:
        """The load since the last time; counting starts anew.

        Args:
            replicas: That serve.
            knocks: Whether connections wait that nobody has taken.
        """
        frames = self._last.values()
        known = [frame.row_s for frame in frames if frame.row_s > 0]
        rows_each = self._rows / self._answered if self._answered else 1.0
        load = Load(
            waiting=sum(frame.waiting for frame in frames), running=sum(frame.running for frame in frames),
            requests=self._answered + self._refused, rows=self._rows + self._refused * rows_each,
            row_s=sum(known) / len(known) if known else self._row_s, replicas=replicas, knocks=knocks,
        )  # fmt: skip
        self._answered = self._refused = self._rows = 0.0
        return load
