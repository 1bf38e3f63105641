"""Driver processes: one per run that nobody drives in the foreground; taken up again when one died."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from millrace.control.services import Services
from millrace.core.types import Lease, Run
from millrace.store.leases import holder_is_dead, host_id

FRESH_S = 15.0  # a run submitted so recently will get the driver that its submitter is starting


def live_lease(services: Services, run: Run) -> Lease | None:
    """The lease of a living driver of this run, or None."""
    lease = services.records.get(Lease, f"run/{run.id}")
    if lease is None or not lease.held or holder_is_dead(lease):
        return None
    # On this host a process that is not proven dead lives, even if it is suspended; elsewhere time decides.
    return lease if lease.boot_id == host_id() or lease.expires_at > services.clock.now() else None


def spawn_driver(services: Services, run: Run) -> None:
    """A driver of its own session, so that it outlives this terminal."""
    log = services.home / "logs" / run.id / "driver.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "millrace", "--home", str(services.home), "--embedded", "drive", run.id]
    with log.open("ab") as output:
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            cwd=Path(run.spec_path).parent,
        )  # fmt: skip
    # Where this process goes on (a notebook), an ended driver must not stay a zombie.
    threading.Thread(target=driver.wait, name="driver", daemon=True).start()


def adopt_runs(services: Services) -> list[str]:
    """Start drivers for runs that have lost theirs on this host; the ids of the runs.

    Two servers may adopt the same run at once: the run's lease lets one driver work, the other follows.
    """
    if not services.is_used:
        return []
    adopted = []
    for state in ("running", "pending"):
        for run in services.records.find(Run, {"state": state}):
            if run.spec_path and Path(run.spec_path).is_file() and _is_orphan(services, run):
                spawn_driver(services, run)
                adopted.append(run.id)
    return adopted


def _is_orphan(services: Services, run: Run) -> bool:
    lease = services.records.get(Lease, f"run/{run.id}")
    if lease is None:
        return services.clock.now() - run.created_at > FRESH_S
    if lease.held:
        return lease.boot_id == host_id() and holder_is_dead(lease)
    return lease.boot_id == host_id() and services.clock.now() - lease.expires_at > FRESH_S
