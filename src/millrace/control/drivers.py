"""Driver processes: one per run that nobody drives in the foreground; taken up again when one died."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from millrace.control.services import Services
from millrace.core.types import Lease, Run
from millrace.store.leases import holder_is_dead, host_id

FRESH_S = 15.0  # a run submitted so recently will get the driver that its submitter is starting
BACKOFF_S = (5.0, 10.0, 30.0, 60.0, 300.0)  # between drivers of one run that keep dying
log = logging.getLogger(__name__)


def live_lease(services: Services, run: Run) -> Lease | None:
    """The lease of a living driver of this run, or None."""
    return living_lease(services, f"run/{run.id}")


def living_lease(services: Services, name: str) -> Lease | None:
    """A lease whose holder lives, as far as this host can know; or None."""
    lease = services.records.get(Lease, name)
    if lease is None or not lease.held or holder_is_dead(lease):
        return None
    # On this host a process that is not proven dead lives, even if it is suspended; elsewhere time decides.
    return lease if lease.boot_id == host_id() or lease.expires_at > services.clock.now() else None


def spawn_driver(services: Services, run: Run) -> subprocess.Popen[Any]:
    """A driver of its own session, so that it outlives this terminal."""
    log_path = services.home / "logs" / run.id / "driver.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "millrace", "--home", str(services.home), "--embedded", "drive", run.id]
    with log_path.open("ab") as output:
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            cwd=Path(run.spec_path).parent,
        )  # fmt: skip
    # Where this process goes on (a notebook), an ended driver must not stay a zombie.
    threading.Thread(target=driver.wait, name="driver", daemon=True).start()
    return driver


class Adopter:
    """Starts drivers for runs that have lost theirs, and remembers whom it started. Not thread-safe.

    Any number of servers may adopt the same run at once: the run's lease lets one driver work, the others follow.

    Args:
        services: The home.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._drivers: dict[str, subprocess.Popen[Any]] = {}
        self._deaths: dict[str, int] = {}
        self._due_at: dict[str, float] = {}

    def adopt(self) -> list[str]:
        """One look; the ids of the runs that got a driver."""
        if not self._services.is_used:
            return []
        runs = [
            run
            for state in ("running", "pending")
            for run in self._services.records.find(Run, {"state": state})
            if run.spec_path and Path(run.spec_path).is_file()
        ]
        self._forget_all_but({run.id for run in runs})
        return [run.id for run in runs if _is_orphan(self._services, run) and self._start(run)]

    def _start(self, run: Run) -> bool:
        """Start a driver, unless one is starting, or the last ones died so soon that it must wait."""
        now = self._services.clock.monotonic()
        driver = self._drivers.get(run.id)
        if driver is not None:
            if driver.poll() is None:
                return False
            del self._drivers[run.id]
            deaths = self._deaths[run.id] = self._deaths.get(run.id, 0) + 1
            # The first time at once: it was killed. Then later and later: something kills them all.
            self._due_at[run.id] = now + (0.0 if deaths == 1 else BACKOFF_S[min(deaths - 2, len(BACKOFF_S) - 1)])
        if now < self._due_at.get(run.id, now):
            return False
        try:
            self._drivers[run.id] = spawn_driver(self._services, run)
        except OSError as error:  # a full disk, no process to be had
            log.warning("no driver could be started for the run %s: %s", run.id, error)
            self._due_at[run.id] = now + BACKOFF_S[0]
            return False
        log.info("the run %s has lost its driver: process %d goes on", run.id, self._drivers[run.id].pid)
        return True

    def _forget_all_but(self, open_runs: set[str]) -> None:
        for known in (self._drivers, self._deaths, self._due_at):
            for run_id in known.keys() - open_runs:
                del known[run_id]


def _is_orphan(services: Services, run: Run) -> bool:
    """Whether nobody drives it. Of a holder before this machine's last start, as of another host's, time decides."""
    lease = services.records.get(Lease, f"run/{run.id}")
    now = services.clock.now()
    if lease is None:
        return now - run.created_at > FRESH_S
    if not lease.held:
        return now - lease.expires_at > FRESH_S
    return holder_is_dead(lease) or (lease.boot_id != host_id() and lease.expires_at <= now)
