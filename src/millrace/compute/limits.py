"""Memory of this machine and of a process group."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes that can still be used, by /proc/meminfo.

    Example:
        >>> available_memory() > 0
        True
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _PAGE * os.sysconf("SC_AVPHYS_PAGES")


def group_rss(group: int) -> int:
    """Resident bytes of every process of a process group.

    Args:
        group: Its id.

    Example:
        >>> group_rss(os.getpgrp()) > 0
        True
    """
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            total += _rss_in_group(entry.name, group)
    return total


def _rss_in_group(pid: str, group: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[21]) * _PAGE if int(fields[2]) == group else 0
    except (OSError, IndexError, ValueError):
        return 0
