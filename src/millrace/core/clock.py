"""Time: UTC, always injected, so that no test waits."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from. Implementations are thread-safe."""

    def now(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back, for durations."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Return after `duration_s` seconds of this clock."""
        ...


class SystemClock:
    """The machine's clock.

    Example:
        >>> SystemClock().now() > 1_700_000_000
        True
    """

    def now(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Sleep for real."""
        time.sleep(duration_s)


class FakeClock:
    """A clock that moves only when told to: for tests of anything that waits.

    Example:
        >>> clock = FakeClock(100.0)
        >>> clock.sleep(2.5)
        >>> clock.now()
        102.5
    """

    def __init__(self, start_s: float = 1_700_000_000.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """The time it was last moved to."""
        return self._now_s

    def monotonic(self) -> float:
        """The same time."""
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        """Move on by `duration_s` without waiting."""
        self._now_s += duration_s
