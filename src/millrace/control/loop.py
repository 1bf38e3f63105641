"""The loop of a server: one process leads; it seals events, takes up runs whose driver died, keeps endpoints.

Any number of servers may run it over the same records: the leader holds the lease `leader`, and what it
writes carries the lease's token, so that a leader that was replaced while it slept can write nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from millrace.control.backup_schedule import ScheduledBackups
from millrace.control.drivers import Adopter, living_lease
from millrace.control.heads import HeadSigner
from millrace.control.services import Services
from millrace.core.errors import ConflictError, MillraceError
from millrace.core.types import Lease
from millrace.store.leases import LeaseKeeper, acquire, release

LEADER = "leader"
LEASE_TTL_S = 10.0
TICK_S = 0.25
WAKE_S = 0.02  # what wakes it seldom comes alone
ADOPT_EVERY = 8  # ticks
log = logging.getLogger(__name__)


class Reconciler(Protocol):
    """Makes something match what is wanted. Called from the loop's thread only."""

    def __call__(self, lease: Lease) -> None:
        """One round of the leader; writes are to carry the lease."""
        ...

    def close(self) -> None:
        """Let go in order: this server stops. The lease of the last round is still held if it was not lost."""
        ...

    def step_down(self) -> None:
        """Let go without a word: another server leads."""
        ...


class Loop:
    """Runs until told to stop.

    Args:
        services: The home.
        reconcilers: Called at every tick of the leader, with its lease.
        lease_ttl_s: A leader that did not renew its lease for so long is replaced.
    """

    def __init__(
        self, services: Services, reconcilers: Sequence[Reconciler] = (), lease_ttl_s: float = LEASE_TTL_S
    ) -> None:
        self._services = services
        self._reconcilers = reconcilers
        self._lease_ttl_s = lease_ttl_s
        self._adopter = Adopter(services)
        self._backups = ScheduledBackups(services)
        self._heads = HeadSigner(services)
        self._stop = threading.Event()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()  # which a signal handler may use

    def stop(self) -> None:
        """End soon; from any thread or signal handler."""
        self._stop.set()
        self.wake()

    def wake(self) -> None:
        """Begin the next round at once; from any thread or signal handler."""
        self._wakes.put(None)

    def run(self) -> None:
        """Lead whenever nobody else does, until stopped."""
        while not self._stop.is_set():
            try:
                self._follow_or_lead()
            except MillraceError as error:  # the database is away, the disk is full: it will come back
                log.warning("the loop waits: %s", error.message)
            except Exception:  # this process is all that seals and serves: it must not end
                log.exception("the loop failed in a way that it should not, it goes on")
            self._stop.wait(TICK_S * 4)

    def _follow_or_lead(self) -> None:
        self._adopter.adopt()
        lease = take_lead(self._services, self._lease_ttl_s)
        if lease is None:
            for one in self._reconcilers:
                one.step_down()
            return
        log.info("this process leads (token %d)", lease.token)
        with LeaseKeeper(self._services.records, lease, self._services.clock, self._lease_ttl_s) as keeper:
            try:
                self._lead(keeper)
            finally:
                self._backups.close()
                self._heads.close()
            if self._stop.is_set():  # before the lease is let go: nobody else begins until this has ended
                for one in self._reconcilers:
                    one.close()

    def _lead(self, keeper: LeaseKeeper) -> None:
        ticks = 0
        while not keeper.lost and not self._stop.is_set():
            if not self._tick(keeper.lease, ticks):
                return
            ticks += 1
            self._pause()

    def _pause(self) -> None:
        """Until the next round is due, or something wakes it."""
        try:
            self._wakes.get(timeout=TICK_S)
        except queue.Empty:
            return
        self._stop.wait(WAKE_S)
        while not self._wakes.empty():
            self._wakes.get()

    def _tick(self, lease: Lease, ticks: int) -> bool:
        """One round; a part that fails does not keep the others from their turn. False: another one leads."""
        parts: list[Callable[[], object]] = [lambda: self._refuse_replaced(lease)]
        parts.append(lambda: self._services.records.seal(fence=lease.token))
        parts.append(lambda: self._heads(lease))
        parts += [lambda one=one: one(lease) for one in self._reconcilers]
        if ticks % ADOPT_EVERY == 0:
            parts += [self._adopter.adopt, lambda: self._backups(lease)]
        for part in parts:
            try:
                part()
            except ConflictError as error:
                log.warning("a newer leader has taken over: %s", error.message)
                return False
            except MillraceError as error:
                log.warning("a part of the loop failed, it will be tried again: %s", error.message)
            except Exception:
                log.exception("a part of the loop failed in a way that it should not")
        return True

    def _refuse_replaced(self, lease: Lease) -> None:
        """A process that slept for longer than its lease learns here that it was replaced, before it writes."""
        stored = self._services.records.get(Lease, LEADER)
        if stored is None or stored.token != lease.token or not stored.held:
            raise ConflictError(f"the lease {LEADER!r} with token {lease.token} is lost")


def is_led(services: Services) -> bool:
    """Whether a living server leads: only then what is deployed is served."""
    return living_lease(services, LEADER) is not None


def take_lead(services: Services, ttl_s: float = LEASE_TTL_S) -> Lease | None:
    """The leader's lease, or None while another one leads.

    Unlike a run's driver, a leader that lives but has not renewed its lease in time is replaced on its own
    host too: all that it writes carries its token, so that what it writes when it wakes is refused.
    """
    records, clock = services.records, services.clock
    lease = acquire(records, LEADER, clock, ttl_s)
    if lease is not None:
        return lease
    stored = records.get(Lease, LEADER)
    if stored is None or not stored.held or stored.expires_at > clock.now():
        return None
    log.warning("the leader, process %d, is late by %.0f s: replaced", stored.pid, clock.now() - stored.expires_at)
    release(records, stored)
    return acquire(records, LEADER, clock, ttl_s)
