"""Notes about living workers, so that those whose driver died can be ended, and only those."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any


def _folder(home: Path) -> Path:
    return home / "scratch" / "workers"


def process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty when it is gone.

    Example:
        >>> process_start(os.getpid()) != ""
        True
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def boot_id() -> str:
    """This boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def note_worker(home: Path, pid: int, step_id: str) -> None:
    """Write down that a worker lives, and who drives it."""
    folder = _folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    note = {
        "pid": pid,
        "started": process_start(pid),
        "driver": os.getpid(),
        "driver_started": process_start(os.getpid()),
        "boot": boot_id(),
        "step": step_id,
    }
    part = folder / f"{pid}.part"
    part.write_text(json.dumps(note))
    part.rename(folder / f"{pid}.json")


def forget_worker(home: Path, pid: int) -> None:
    """The worker has ended."""
    (_folder(home) / f"{pid}.json").unlink(missing_ok=True)


def clean_orphans(home: Path) -> list[int]:
    """End workers that are proven to have lost their driver; their process ids."""
    ended = []
    for path in _folder(home).glob("*.json"):
        try:
            note: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if note["boot"] == boot_id() and process_start(note["driver"]) == note["driver_started"]:
            continue
        if note["boot"] == boot_id() and process_start(note["pid"]) == note["started"] != "":
            os.killpg(note["pid"], signal.SIGKILL)
            ended.append(note["pid"])
        path.unlink(missing_ok=True)
    return ended
