"""Requests a second of projects."""

from __future__ import annotations

import threading
import time

from millrace.control.services import Services
from millrace.core.errors import QuotaError
from millrace.core.types import Quota

READ_S = 2.0  # how long quotas are believed


class Rates:
    """Requests a second of projects: a bucket each, of one second's requests. Thread-safe; one per API process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}
        self._quotas: dict[str, float] = {}
        self._read_at = -READ_S

    def admit(self, services: Services, where: frozenset[str]) -> None:
        """Count a request of somebody who works in these projects.

        Raises:
            QuotaError: One of them has had its requests of this second.
        """
        now = time.monotonic()
        with self._lock:
            if now - self._read_at > READ_S:
                self._read_at = now
                found = services.records.find(Quota) if services.is_used else []
                self._quotas = {one.id: one.requests_per_s for one in found if one.requests_per_s is not None}
            for project in where & self._quotas.keys():
                rate = self._quotas[project]
                at, left = self._buckets.get(project, (now, max(rate, 1.0)))
                left = min(max(rate, 1.0), left + (now - at) * rate)
                if left < 1.0:
                    raise QuotaError(f"the project {project!r} may send {rate:g} requests a second")
                self._buckets[project] = (now, left - 1.0)
