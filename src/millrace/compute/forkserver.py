"""A process that has imported and done nothing else; it forks a worker per work.

    python -P -m millrace.compute.forkserver CONTROL_FD DRIVER_PID fork|spawn [MODULE …]

A child of a process that has *used* torch or Polars may hang; a child of one that has only imported them does not.
Modules are imported one after another while nothing is asked; a request waits for the import in progress at most.
Everything happens in the main thread, for a fork takes only the thread that forks along.

What is said on the control socket is in `forkserver_news`; its end is the order to stop.
"""

from __future__ import annotations

import array
import contextlib
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence

from millrace.compute.forkserver_news import BORN, ENDED, NEWS, REFUSED, REQUEST
from millrace.compute.processes import die_with_parent, kill_session
from millrace.compute.worker import run_worker

HELD = {signal.SIGCHLD, signal.SIGTERM}  # while forking: a child begins with them blocked, and without our handlers
WORKERS_END_S = 0.7  # workers see their driver's end by themselves; those that hang are killed after this


class ForkServer:
    """The loop of the process.

    Args:
        control: Our end of the control socket.
        method: "fork", or "spawn" where forking after imports is not safe (macOS).
    """

    def __init__(self, control: socket.socket, method: str) -> None:
        self._control = control
        self._method = method
        self._children: dict[int, int] = {}
        self._is_busy = False  # the children are being changed
        self._has_news = False  # a child may have ended

    def serve(self, modules: Sequence[str]) -> None:
        """Import the modules and start workers until the driver is gone."""
        signal.signal(signal.SIGCHLD, self._on_child)
        for module in modules:
            while select.select([self._control], [], [], 0)[0]:
                self._serve_one()
            _import(module)
        gc.collect()
        gc.freeze()  # collections in workers do not touch, and so do not copy, what was imported
        while True:
            self._serve_one()

    def end(self, *_: object) -> None:
        """Stop: every worker ends within a second. Also the handler of SIGTERM."""
        self._is_busy = True
        deadline = time.monotonic() + WORKERS_END_S
        while self._children and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.01)
        for pid in self._children:
            kill_session(pid, "")
        os._exit(0)

    def _serve_one(self) -> None:
        number, descriptor = _receive(self._control)
        if descriptor is None:
            self.end()
            return
        self._is_busy = True
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            pid = self._start(descriptor)
            self._children[pid] = number
            self._tell(BORN, number, pid)
        except OSError as error:  # no process or memory left
            self._tell(REFUSED, number, error.errno or 0)
        finally:
            os.close(descriptor)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
            self._is_busy = False
        self._reap_news()

    def _start(self, descriptor: int) -> int:
        if self._method == "spawn":
            os.set_inheritable(descriptor, True)
            command = [sys.executable, "-P", "-m", "millrace.compute.worker", str(descriptor), str(os.getpid())]
            defaults = [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM]
            return os.posix_spawn(sys.executable, command, os.environ, setsigmask=[], setsigdef=defaults)
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self._control.close()
            run_worker(descriptor, parent)
        finally:
            os._exit(70)  # whatever happens, a child never returns into this loop

    def _on_child(self, *_: object) -> None:
        """The handler of SIGCHLD. It may come at any time, even while blocked: an imported package may have started
        a thread that takes the signal, and Python runs the handler here all the same."""
        self._has_news = True
        self._reap_news()

    def _reap_news(self) -> None:
        while self._has_news and not self._is_busy:
            self._is_busy, self._has_news = True, False
            self._reap()
            self._is_busy = False  # news that came since are seen by the loop, later ones by their own handler

    def _reap(self) -> None:
        """Collect the workers that have ended, and tell."""
        for pid in list(self._children):
            try:
                status = _collect(pid)
            except ChildProcessError:  # SIGTERM came between its collection and the next line
                self._children.pop(pid, None)
                continue
            if status is not None:
                self._tell(ENDED, self._children.pop(pid), status)

    def _tell(self, kind: bytes, number: int, value: int) -> None:
        try:
            self._control.sendall(NEWS.pack(kind, number, value))
        except OSError:  # the driver is gone: the next receive says so
            return


def main(arguments: Sequence[str]) -> None:
    """Serve the driver that has started this process; ends with it, also when it is killed."""
    control, driver, method, *modules = arguments
    faulthandler.enable()
    server = ForkServer(socket.socket(fileno=int(control)), method)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, server.end)
    die_with_parent(signal.SIGTERM, int(driver))
    server.serve(modules)


def _receive(control: socket.socket) -> tuple[int, int | None]:
    """The next request: its number and the descriptor that came with it; (0, None) when the driver is gone."""
    try:
        data, ancillary, _, _ = control.recvmsg(REQUEST.size, socket.CMSG_SPACE(array.array("i", [0]).itemsize))
    except ConnectionError:
        return 0, None
    if len(data) < REQUEST.size or not ancillary:
        return 0, None
    descriptors = array.array("i", ancillary[0][2])
    return REQUEST.unpack(data)[0], descriptors[0]


def _collect(pid: int) -> int | None:
    """The wait status of a child that has ended, after the end of what it left behind; None while it lives."""
    if hasattr(os, "waitid"):  # not on macOS before Python 3.13
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        _kill_group(pid)  # as long as the child is not collected, its id cannot be another's
        return os.waitpid(pid, 0)[1]
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return None
    _kill_group(pid)
    return status


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):  # nobody is left
        os.killpg(pid, signal.SIGKILL)


def _import(module: str) -> None:
    """Import ahead of time; what fails here fails again, and clearly, in the step that needs it."""
    try:
        importlib.import_module(module)
    except Exception:  # noqa: BLE001 - a border: a broken optional package must not end the server
        print(f"{module} was not imported ahead of time:", file=sys.stderr)
        traceback.print_exc()


if __name__ == "__main__":
    main(sys.argv[1:])
