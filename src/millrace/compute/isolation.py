"""A step's process in a user and a mount namespace of its own: the home's keys and other steps' scratch are not there.

Two things follow. What is mounted over cannot be seen or uncovered, for the process keeps no right over mounts, and in
a namespace below its own they are locked together. And processes outside, those of other steps too, cannot be looked
into: memory, environment and open files of a process are closed to a namespace that is not an ancestor of its own.
Everything else is as before: records, blobs, logs, the network.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63


def isolate(home: Path, own: Path, project: Path, *, keeps_keys: bool = False) -> str:
    """Move this process, which has one thread, away from what is not its own; for good.

    Args:
        home: Of the server.
        own: The step's folder, below `home/scratch/steps` unless it is elsewhere; made when absent.
        project: The folder of the spec, which may lie in the home.
        keeps_keys: The step needs the key that blobs are encrypted with: the signing key alone is hidden.

    Returns:
        What holds from now on, as a line for the log.
    """
    if sys.platform != "linux":
        return "not isolated: there are no user namespaces on this system"
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_possible(home):
        return "not isolated: the system lets this user make no namespaces"
    libc = _enter()
    try:
        for folder, kept in ((home / "scratch" / "steps", own), (home / "projects", project)):
            _cover_others(libc, folder, kept)
        keys = home / "keys"
        for path in (keys / "signing.key" if keeps_keys else keys, home / "scratch" / "uploads"):
            _hide(libc, path)
    finally:
        _drop_rights(libc)
    return "isolated: the home's keys, and scratch and processes of other steps, are out of reach"


def _is_possible(home: Path) -> bool:
    """Tried in a child: a system may let half of it be done, and that cannot be undone."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _mount(_enter(), "tmpfs", str(home), "tmpfs", _NOSUID | _NODEV)
            code = 0
        except OSError:
            code = 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _enter() -> ctypes.CDLL:
    """New namespaces, in which this user is who they were, and mounts are theirs alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    _checked(libc.unshare(_NEWUSER | _NEWNS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    _mount(libc, "none", "/", None, _REC | _PRIVATE)
    return libc


def _cover_others(libc: ctypes.CDLL, folder: Path, kept: Path) -> None:
    """Of what is in a folder, only what is kept remains, if that is in it at all."""
    if not folder.is_dir():
        return
    top = folder / kept.relative_to(folder).parts[0] if folder in kept.parents else None
    place = None if top is None else os.open(top, os.O_PATH | os.O_DIRECTORY)
    _mount(libc, "tmpfs", str(folder), "tmpfs", _NOSUID | _NODEV, "mode=0700,size=1m")
    if top is not None and place is not None:
        top.mkdir(mode=0o700)
        _mount(libc, f"/proc/self/fd/{place}", str(top), None, _BIND | _REC)
        os.close(place)


def _hide(libc: ctypes.CDLL, path: Path) -> None:
    if path.is_dir():
        _mount(libc, "tmpfs", str(path), "tmpfs", _RDONLY | _NOSUID | _NODEV | _NOEXEC, "mode=0500,size=4k")
    elif path.exists():
        _mount(libc, os.devnull, str(path), None, _BIND)


def _drop_rights(libc: ctypes.CDLL) -> None:
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # those that this kernel does not know fail
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.capset(struct.pack("II", _CAPABILITY_VERSION_3, 0), struct.pack("6I", *[0] * 6)))


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    _checked(libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), data.encode() or None))


def _checked(code: int) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
