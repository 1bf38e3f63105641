"""Leases: who may write something, proven by the kernel on one host, by time across hosts.

A lease is a record whose `token` only grows. A holder on this host is dead when its process is gone:
boot id (with the pid namespace: two containers do not see each other's processes), pid and the time the
process started say so exactly, and it is replaced at once; a live one is never replaced. A holder that
this host cannot see is believed until `expires_at`.
"""

from __future__ import annotations

import logging
import os
import threading
from functools import cache
from pathlib import Path

import msgspec

from millrace.core.clock import Clock
from millrace.core.errors import ConflictError, MillraceError
from millrace.core.ports import Records, Transaction
from millrace.core.types import Lease

log = logging.getLogger(__name__)


def acquire(records: Records, name: str, clock: Clock, ttl_s: float) -> Lease | None:
    """Take a lease if nobody holds it.

    Args:
        records: Where leases are kept.
        name: What is leased, for example `run/<id>`.
        clock: The time.
        ttl_s: How long a host that cannot see this process must believe in it without a renewal.

    Returns:
        The lease with a token larger than any before, or None while another one holds it.

    Example:
        >>> import tempfile
        >>> from millrace.core.clock import FakeClock
        >>> from millrace.store.records_sql import open_records
        >>> with tempfile.TemporaryDirectory() as home:
        ...     records, clock = open_records(Path(home) / "records.db"), FakeClock()
        ...     first = acquire(records, "run/1", clock, 10.0)
        ...     again = acquire(records, "run/1", clock, 10.0)
        ...     released = release(records, first)
        ...     second = acquire(records, "run/1", clock, 10.0)
        ...     records.close()
        >>> first.token, again, released, second.token
        (1, None, True, 2)
    """
    if not _is_free(records.get(Lease, name), clock):  # waiting for a lease must not take the write lock
        return None
    with records.transaction() as transaction:
        stored = transaction.get(Lease, name)
        if not _is_free(stored, clock):
            return None
        old = stored or Lease(id=name, created_at=clock.now())
        taken = msgspec.structs.replace(
            old,
            boot_id=host_id(),
            pid=os.getpid(),
            process_started=process_start(os.getpid()) or "",
            token=old.token + 1,
            expires_at=clock.now() + ttl_s,
            held=True,
        )
        return transaction.put(taken, expect_version=old.version)


def renew(records: Records, lease: Lease, clock: Clock, ttl_s: float) -> Lease | None:
    """Put the end off; None when somebody else holds the lease by now."""
    with records.transaction() as transaction:
        stored = transaction.get(Lease, lease.id)
        if stored is None or stored.token != lease.token or not stored.held:
            return None
        return transaction.put(msgspec.structs.replace(stored, expires_at=clock.now() + ttl_s), stored.version)


def release(records: Records, lease: Lease) -> bool:
    """Let go; False when it was no longer held with this token. The token is kept: it must only grow."""
    with records.transaction() as transaction:
        stored = transaction.get(Lease, lease.id)
        if stored is None or stored.token != lease.token or not stored.held:
            return False
        transaction.put(msgspec.structs.replace(stored, held=False), stored.version)
        return True


def check_fence(transaction: Transaction, lease: Lease) -> None:
    """Refuse, inside a write, a holder that has been replaced.

    Raises:
        ConflictError: The stored token is another one.
    """
    stored = transaction.get(Lease, lease.id)
    if stored is None or stored.token != lease.token or not stored.held:
        newest = "nobody" if stored is None or not stored.held else f"token {stored.token}"
        raise ConflictError(f"the lease {lease.id!r} with token {lease.token} is lost: {newest} holds it now")


def holder_is_dead(lease: Lease) -> bool:
    """Whether the holder's process is proven to be gone; False when this host cannot know.

    Example:
        >>> holder_is_dead(Lease(id="x", boot_id="another host", pid=1, process_started="1", held=True))
        False
    """
    if not lease.boot_id or lease.boot_id != host_id():
        return False
    return process_start(lease.pid) != lease.process_started


@cache
def host_id() -> str:
    """This boot of this machine and its pid namespace; empty where the kernel does not say (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return f"{boot}/{namespace}"


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`); None: it is gone.

    A zombie is gone: it does nothing any more and waits only to be counted by its parent.

    Example:
        >>> process_start(os.getpid()) == process_start(os.getpid()), process_start(2**22 + 1)
        (True, None)
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return None if fields[0] in ("Z", "X", "x") else fields[19]


def _is_free(lease: Lease | None, clock: Clock) -> bool:
    if lease is None or not lease.held or holder_is_dead(lease):
        return True
    if lease.boot_id and lease.boot_id == host_id():
        return False  # alive, perhaps only suspended: never stolen
    return lease.expires_at <= clock.now()


class LeaseKeeper:
    """Renews a lease in a thread while the `with` block runs, and lets go of it at the end.

    Args:
        records: Where leases are kept.
        lease: The lease just acquired.
        clock: The time.
        ttl_s: As for `acquire`; renewed three times within it.
    """

    def __init__(self, records: Records, lease: Lease, clock: Clock, ttl_s: float) -> None:
        self._records, self._clock, self._ttl_s = records, clock, ttl_s
        self.lease = lease
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._release_tried = threading.Event()
        self._pause = threading.Event()  # never set
        self._thread = threading.Thread(target=self._run, name=f"lease {lease.id}", daemon=True)

    @property
    def lost(self) -> bool:
        """True once somebody else holds the lease, or may: stop writing."""
        return self._lost.is_set()

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._release_tried.wait()

    def _run(self) -> None:
        try:
            self._keep()
        finally:
            self._release_tried.set()

    def _keep(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            self._renew()
        # A release that fails (the disk is full) is tried again as long as the process lives: on this
        # host nobody takes a lease from a live process.
        while not self._release():
            self._release_tried.set()
            self._pause.wait(self._ttl_s / 3)

    def _renew(self) -> None:
        try:
            renewed = renew(self._records, self.lease, self._clock, self._ttl_s)
        except MillraceError as error:
            log.warning("the lease %s could not be renewed: %s", self.lease.id, error.message)
            if self.lease.expires_at <= self._clock.now():
                self._lost.set()
            return
        if renewed is None:
            self._lost.set()
        else:
            self.lease = renewed

    def _release(self) -> bool:
        try:
            release(self._records, self.lease)
        except MillraceError as error:
            log.warning("the lease %s could not be released yet: %s", self.lease.id, error.message)
            return False
        return True
