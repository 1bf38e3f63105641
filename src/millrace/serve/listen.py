"""Binding the server's socket: loopback only where nobody is asked who they are; and who holds a busy port."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from millrace.core.addresses import loopback_address
from millrace.core.errors import InputError, UnavailableError

_LISTEN_STATE = "0A"
BACKLOG = 1024


def bind(host: str, port: int, *, is_guarded: bool = False, is_shared: bool = False) -> socket.socket:
    """A listening socket; one that is shared listens once it is told to.

    Args:
        host: A loopback address or `localhost`; where it is guarded any of this machine.
        port: 0 takes a free one.
        is_guarded: Whether every request is asked for a token, and none travels in the open.
        is_shared: Other processes of this user may listen there too; the system deals connections out.

    Raises:
        InputError: The host is not loopback, or not of this machine, or the port may not be used.
        UnavailableError: The port is busy; names who holds it where /proc tells.
    """
    address = _address(host) if is_guarded else loopback_address(host)
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address, port))
        if not is_shared:  # the system deals out connections from then on
            listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise busy(port) from error
        raise InputError(f"cannot listen on {address}:{port}: {error.strerror}", hint="choose another port") from error
    return listener


def _address(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise InputError(f"{host!r} is not an address of this machine: {error}") from None


def busy(port: int) -> UnavailableError:
    """The error for a port that somebody else holds."""
    holder = holder_of(port)
    by = f": process {holder[0]} holds it ({holder[1]})" if holder else ""
    return UnavailableError(
        f"port {port} is busy{by}",
        hint="stop that process, or choose another port (--port 0 takes a free one)",
        details={"port": port, "pid": holder[0] if holder else None},
    )


def holder_of(port: int) -> tuple[int, str] | None:
    """Process id and command line of who listens on a port; None when unknown."""
    inodes = set(_listening_inodes(port))
    if not inodes:
        return None
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and not inodes.isdisjoint(_socket_inodes(folder / "fd")):
            return int(folder.name), _command(folder)
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.is_file():
            continue
        for line in table.read_text(encoding="ascii", errors="replace").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN_STATE and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _socket_inodes(folder: Path) -> Iterator[str]:
    try:
        for link in folder.iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:
        return  # not ours to look at, or gone meanwhile


def _command(folder: Path) -> str:
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "unknown command"
    command = b" ".join(words).decode("utf-8", "replace").strip()
    return command if len(command) <= 100 else command[:97] + "…"
