"""The loop of a server: one process leads; it seals events, takes up runs whose driver died, keeps endpoints.

Any number of servers may run it over the same records: the leader holds the lease `leader`, and what it
writes carries the lease's token, so that a leader that was replaced while it slept can write nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from millrace.control.drivers import adopt_runs
from millrace.control.services import Services
from millrace.core.errors import ConflictError, MillraceError
from millrace.core.types import Lease
from millrace.store.leases import LeaseKeeper, acquire

LEADER = "leader"
LEASE_TTL_S = 10.0
TICK_S = 0.25
ADOPT_EVERY = 8  # ticks
Reconciler = Callable[[Lease], None]
log = logging.getLogger(__name__)


class Loop:
    """Runs until told to stop.

    Args:
        services: The home.
        reconcilers: Called at every tick of the leader, with its lease.
    """

    def __init__(self, services: Services, reconcilers: Sequence[Reconciler] = ()) -> None:
        self._services = services
        self._reconcilers = reconcilers
        self._stop = threading.Event()

    def stop(self) -> None:
        """End soon; from any thread or signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Lead whenever nobody else does, until stopped."""
        while not self._stop.is_set():
            try:
                self._follow_or_lead()
            except MillraceError as error:  # the database is away, the disk is full: it will come back
                log.warning("the loop waits: %s", error.message)
            self._stop.wait(TICK_S * 4)

    def _follow_or_lead(self) -> None:
        adopt_runs(self._services)
        lease = acquire(self._services.records, LEADER, self._services.clock, LEASE_TTL_S)
        if lease is None:
            return
        log.info("this process leads (token %d)", lease.token)
        with LeaseKeeper(self._services.records, lease, self._services.clock, LEASE_TTL_S) as keeper:
            self._lead(keeper)

    def _lead(self, keeper: LeaseKeeper) -> None:
        ticks = 0
        while not keeper.lost and not self._stop.is_set():
            self._tick(keeper.lease, ticks)
            ticks += 1
            self._stop.wait(TICK_S)

    def _tick(self, lease: Lease, ticks: int) -> None:
        """One round; a part that fails does not keep the others from their turn."""
        parts: list[Callable[[], object]] = [lambda: self._services.records.seal(fence=lease.token)]
        parts += [lambda one=one: one(lease) for one in self._reconcilers]
        if ticks % ADOPT_EVERY == 0:
            parts.append(lambda: adopt_runs(self._services))
        for part in parts:
            try:
                part()
            except ConflictError as error:
                log.warning("a newer leader has taken over: %s", error.message)
                return
            except MillraceError as error:
                log.warning("a part of the loop failed, it will be tried again: %s", error.message)
