"""What deployed endpoints have answered: frames of the serving processes, added up into the endpoint's record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from millrace.serve.telemetry import TelemetryFrame

WRITE_S = 10.0  # what was counted since is lost when the loop dies
RECENT_S = 300.0  # how far back "now" reaches
COUNTED = ("status_2xx", "status_4xx", "status_5xx", "rows", "latency_s")


class Traffic:
    """Adds up what endpoints answer. Not thread-safe.

    Args:
        write: Called with an endpoint's name and what to add to its counters.
    """

    def __init__(self, write: Callable[[str, dict[str, float]], None]) -> None:
        self._write = write
        self._counted: dict[str, Counter[str]] = {}
        self._due_at = 0.0

    def take(self, name: str, frame: TelemetryFrame) -> None:
        """Add a frame."""
        counted = self._counted.setdefault(name, Counter())
        for key in COUNTED:
            counted[key] += frame.counters.get(key, 0)  # type: ignore[assignment]

    def tick(self, *, is_last: bool = False) -> None:
        """Write what was counted, if it is time to."""
        if not self._counted or (time.monotonic() < self._due_at and not is_last):
            return
        self._due_at = time.monotonic() + WRITE_S
        for name, counted in self._counted.items():
            self._write(name, dict(counted))
        self._counted = {}


def added(traffic: dict[str, Any], more: dict[str, float], now: float) -> dict[str, Any]:
    """Counters with what has been counted since. `recent`: when, and how many requests, of the last minutes.

    Args:
        traffic: As it was stored; {} before the first.
        more: Requests by class of status, rows, and the seconds that answering took, together.
        now: In seconds since 1970.

    Example:
        >>> added({"since": 1.0, "until": 2.0, "rows": 3}, {"rows": 4, "status_2xx": 2}, 9.0)
        {'since': 1.0, 'until': 9.0, 'rows': 7, 'status_2xx': 2, 'recent': [[9.0, 2]]}
    """
    counters = {key: traffic.get(key, 0) + value for key, value in more.items() if value}
    requests = sum(value for key, value in more.items() if key.startswith("status_"))
    recent = [[at, count] for at, count in traffic.get("recent", []) if now - at < RECENT_S]
    return {"since": now, **traffic, "until": now, **counters, "recent": [*recent, [now, requests]]}


def requests_per_min(traffic: Mapping[str, Any], now: float) -> float:
    """The rate of the last minutes; 0 where nothing came.

    Args:
        traffic: As it was stored.
        now: In seconds since 1970.

    Example:
        >>> requests_per_min({"recent": [[100.0, 50], [130.0, 50]]}, 150.0)
        100.0
    """
    recent = [(at, count) for at, count in traffic.get("recent", []) if now - at < RECENT_S]
    if not recent:
        return 0.0
    return 60.0 * sum(count for _, count in recent) / max(now - recent[0][0] + WRITE_S, WRITE_S)
