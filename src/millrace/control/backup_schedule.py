"""Backups by the clock: the leading loop starts a command for each, and tells when one fails.

A command of its own: it may take hours and use threads, and the loop has other things to do.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from typing import Any

import msgspec

from millrace.control.services import Services
from millrace.core.types import Alert, Event, Lease
from millrace.store.leases import check_fence

ALERT_ID = "backup"
RETRY_S = 900.0  # after a failure, if the next one is not due before
STOP_S = 10.0
TOLD_CHARACTERS = 400
log = logging.getLogger(__name__)


def destination(services: Services) -> str:
    """The setting `backup_to`; a relative folder is one below the home."""
    to = str(services.setting("backup_to"))
    return to if "://" in to or not to else str(services.home / to)


def reason(text: str) -> str:
    """The line of a command's output that says why it failed: its error, else its last one.

    Example:
        >>> reason("INFO x\\nerror: the disk is full\\n  hint: free some"), reason("Traceback\\nKeyError: 1")
        ('the disk is full', 'KeyError: 1')
    """
    lines = text.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[0] if errors else lines[-1]


class ScheduledBackups:
    """Called by the leader, often; does nothing most of the time. Not thread-safe.

    Args:
        services: The home; its settings `backup_to` and `backup_every_s` say whether and when.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._to = destination(services)
        self._every_s = float(services.setting("backup_every_s"))
        self._process: subprocess.Popen[Any] | None = None
        self._due_at: float | None = None

    def __call__(self, lease: Lease) -> None:
        """One look."""
        if not self._to or self._every_s <= 0:
            return
        now = self._services.clock.now()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._process = None
            self._due_at = now + (self._every_s if code == 0 else min(self._every_s, RETRY_S))
            self._tell(lease, code)
        if self._due_at is None:
            self._due_at = self._last() + self._every_s
        if now >= self._due_at:
            self._start(now)

    def close(self) -> None:
        """End the command that runs: what it has written is used by the next one."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _last(self) -> float:
        """When the last backup to this destination was made, by the events; 0: never."""
        found, since = 0.0, 0
        while events := self._services.records.events(since, f"backup:{self._to}"):
            since = events[-1].seq or 0
            good = [one.at for one in events if one.verb == "system.backup" and one.detail.get("outcome") == "ok"]
            found = max([found, *good])
        return found

    def _start(self, now: float) -> None:
        included = str(self._services.setting("backup_include")).replace(",", " ").split()
        flags = [f"--include-{one}" for one in ("keys", "logs") if one in included]
        command = [sys.executable, "-m", "millrace", "--home", str(self._services.home), "--embedded"]
        command += ["system", "backup", self._to, "--prune", *flags]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            log.warning("the backup could not be started: %s", error)
            self._due_at = now + min(self._every_s, RETRY_S)

    @property
    def _log(self) -> Any:
        return self._services.home / "logs" / "backup.log"

    def _tell(self, lease: Lease, code: int) -> None:
        """Open an alert for a failure, close it after a success; a killed command has left no event of its own."""
        now = self._services.clock.now()
        with self._services.records.transaction() as transaction:
            check_fence(transaction, lease)
            found = transaction.get(Alert, ALERT_ID)
            if code == 0:
                if found is not None and found.state == "open":
                    transaction.put(msgspec.structs.replace(found, state="resolved"), found.version)
                return
            text = self._log.read_text(errors="replace").strip()[-TOLD_CHARACTERS:] or f"it ended with {code}"
            title = f"the backup to {self._to} failed: {reason(text)}"
            log.warning("%s", title)
            alert = Alert(
                id=ALERT_ID, created_at=now, endpoint="", model="", number=0, signal="backup", score=1.0, threshold=0.0,
                title=title, facts={"to": self._to, "exit_code": code, "log": text},
            )  # fmt: skip
            transaction.put(msgspec.structs.replace(alert, version=found.version if found else 0))
            if code < 0:
                transaction.append(
                    Event(at=now, actor="loop", verb="system.backup", subject=f"backup:{self._to}",
                          detail={"outcome": "killed", "signal": -code})
                )  # fmt: skip
