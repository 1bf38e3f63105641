"""A process that has imported and done nothing else; it forks a worker per step.

Run as `python -m millrace.compute.forkserver FD`. The control socket carries one MessagePack message per work with
the worker's end of a socket pair attached.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import socket
import sys

import msgspec

from millrace.compute.link import WorkerLink
from millrace.compute.worker import work_and_exit
from millrace.core.ports import Work

MAX_REQUEST = 4_000_000
POLL_MS = 20
_PR_SET_PDEATHSIG = 1


class Request(msgspec.Struct):
    """Start a worker."""

    work: Work
    entry: str


class Started(msgspec.Struct, tag="started"):
    """The answer to a request."""

    pid: int


class Exited(msgspec.Struct, tag="exited"):
    """A worker's process has ended; negative codes are signals."""

    pid: int
    code: int


def main() -> None:
    """Serve until the driver closes the control socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"preload of {module} skipped: {error}", file=sys.stderr)
    children: set[int] = set()
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    while True:
        if waiting.poll(POLL_MS):
            data, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST, 1)
            if not data:
                os._exit(0)
            children.add(_fork(control, data, descriptors[0]))
        _reap(control, children)


def _fork(control: socket.socket, data: bytes, descriptor: int) -> int:
    request = msgspec.msgpack.decode(data, type=Request)
    pid = os.fork()
    if pid == 0:
        control.close()
        work_and_exit(request.work, WorkerLink(socket.socket(fileno=descriptor)), request.entry)
    os.close(descriptor)
    control.send(msgspec.msgpack.encode(Started(pid=pid)))
    return pid


def _reap(control: socket.socket, children: set[int]) -> None:
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.remove(pid)
            control.send(msgspec.msgpack.encode(Exited(pid=pid, code=os.waitstatus_to_exitcode(status))))


if __name__ == "__main__":
    main()
