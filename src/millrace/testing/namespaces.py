"""Hosts of one machine: network namespaces on a bridge that is itself in one, removed at the end. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType


def can_make() -> bool:
    """Whether namespaces can be made here."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


class Hosts:
    """Hosts 1 to `count`, with the addresses 10.77.0.1 and so on, which reach one another and nothing else.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._mark = f"mr{os.getpid()}"
        self.numbers = range(1, count + 1)

    def __enter__(self) -> Hosts:
        switch = f"{self._mark}s"
        self._ip("netns", "add", switch)
        self._ip("-n", switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", switch, "link", "set", "br0", "up")
        for number in self.numbers:
            host, port = self._name(number), f"p{number}"
            self._ip("netns", "add", host)
            self._ip("-n", host, "link", "set", "lo", "up")
            self._ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", switch)
            self._ip("-n", switch, "link", "set", port, "master", "br0", "up")
            self._ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            self._ip("-n", host, "link", "set", "eth0", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (*(self._name(number) for number in self.numbers), f"{self._mark}s"):
            self._ip("netns", "del", name)

    def address(self, number: int) -> str:
        """A host's address."""
        return f"10.77.0.{number}"

    def prefix(self, number: int) -> tuple[str, ...]:
        """What makes a command run on a host; the process keeps its pid."""
        return ("ip", "netns", "exec", self._name(number))

    def cut(self, number: int) -> None:
        """Pull a host's plug."""
        self._ip("-n", f"{self._mark}s", "link", "set", f"p{number}", "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        self._ip("-n", f"{self._mark}s", "link", "set", f"p{number}", "up")

    def _name(self, number: int) -> str:
        return f"{self._mark}h{number}"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)
