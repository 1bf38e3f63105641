"""The driver's side of the fork server: starts it, asks it for workers, hears of their ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from millrace.compute.forkserver_news import BORN, ENDED, NEWS, REFUSED, REQUEST
from millrace.compute.limits import thread_environment
from millrace.compute.orphans import MARK_VARIABLE
from millrace.core.errors import UnavailableError

END_S = 3.0


class Birth:
    """A worker that was asked for: set first `pid` (or `refused`), then `status`."""

    def __init__(self) -> None:
        self.born = threading.Event()
        self.ended = threading.Event()
        self.pid: int | None = None
        self.refused: int | None = None  # errno of the fork
        self.status: int | None = None  # as os.waitpid gives it; None after the end: the fork server is gone
        self.server_code: int | None = None  # how that ended, negative for a signal


class Launcher:
    """Owns one fork server at a time; starts another when it is gone. Thread-safe.

    Args:
        home: Its messages go to `logs/forkserver.log` there.
        preload: Modules that it imports while nothing is asked of it.
        method: "fork" or "spawn".
    """

    def __init__(self, home: Path, preload: Sequence[str], method: str) -> None:
        self._home, self._preload, self._method = home, tuple(preload), method
        self.mark = f"{MARK_VARIABLE}={secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._server: Server | None = None

    def launch(self, line: socket.socket) -> Birth:
        """Ask for a worker.

        Args:
            line: The worker's end of its line; the caller closes its copy.

        Raises:
            UnavailableError: The fork server cannot be started.
        """
        with self._lock:
            for _ in range(2):  # the one that was running may have been killed
                if self._server is not None and self._server.is_gone:
                    self._server.close()
                    self._server = None
                if self._server is None:
                    self._server = Server(self._home, self._preload, self._method, self.mark)
                birth = self._server.launch(line)
                if birth is not None:
                    return birth
        raise UnavailableError("the fork server ends as soon as it starts", hint=self._hint())

    def close(self) -> None:
        """End the fork server, by its process id."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _hint(self) -> str:
        return f"see {self._home / 'logs' / 'forkserver.log'}"


class Server:
    """One fork server and the thread that listens to it.

    The thread also *starts* it: the kernel ties a death signal to the thread that made a process, and threads
    that submit work come and go.
    """

    def __init__(self, home: Path, preload: Sequence[str], method: str, mark: str) -> None:
        self._command = [method, *preload]
        self._home, self._mark = home, mark
        self._lock = threading.Lock()
        self._births: dict[int, Birth] = {}
        self._count = 0
        self.is_gone = False
        self._control, theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(theirs, started), name="millrace fork server", daemon=True
        )
        self._thread.start()
        started.wait()
        if self._failure is not None:
            raise UnavailableError(f"the fork server cannot be started: {self._failure}") from self._failure

    def launch(self, line: socket.socket) -> Birth | None:
        """Ask for a worker; None when this server is gone."""
        birth = Birth()
        with self._lock:
            if self.is_gone:
                return None
            self._count += 1
            self._births[self._count] = birth
            try:
                socket.send_fds(self._control, [REQUEST.pack(self._count)], [line.fileno()])
            except OSError:
                del self._births[self._count]
                self.is_gone = True
                return None
        return birth

    def close(self) -> None:
        """End it: it ends by itself when the control socket does, else by SIGKILL."""
        with contextlib.suppress(OSError):  # it was first
            self._control.shutdown(socket.SHUT_WR)
        process = self._process
        if process is not None:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join(END_S)
        self._control.close()

    def _run(self, theirs: socket.socket, started: threading.Event) -> None:
        try:
            self._process = self._start(theirs)
        except OSError as error:
            self._failure = error
        finally:
            theirs.close()
            started.set()
        if self._failure is None:
            self._listen()
        self._lose_all()

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        descriptor = theirs.fileno()
        # -P: a file in the working directory must not take the place of a module
        command = [sys.executable, "-P", "-m", "millrace.compute.forkserver", str(descriptor), str(os.getpid())]
        name, _, value = self._mark.partition("=")
        # one thread: libraries that start threads when imported would lose them in the fork;
        # a fixed hash seed: a set of strings has the same order in every worker
        environment = {**os.environ, **thread_environment(1), "PYTHONHASHSEED": "0", name: value}
        log = self._home / "logs" / "forkserver.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                [*command, *self._command], pass_fds=[descriptor], env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def _listen(self) -> None:
        pending = b""
        while True:
            try:
                data = self._control.recv(4096)
            except OSError:
                return
            if not data:
                return
            pending += data
            while len(pending) >= NEWS.size:
                self._hear(*NEWS.unpack(pending[: NEWS.size]))
                pending = pending[NEWS.size :]

    def _hear(self, kind: bytes, number: int, value: int) -> None:
        with self._lock:
            birth = self._births[number] if kind == BORN else self._births.pop(number)
        if kind == BORN:
            birth.pid = value
            birth.born.set()
        elif kind == REFUSED:
            birth.refused = value
            birth.born.set()
            birth.ended.set()
        elif kind == ENDED:
            birth.status = value
            birth.ended.set()

    def _lose_all(self) -> None:
        """The server is gone: nobody will tell how its workers end."""
        with self._lock:
            self.is_gone = True
            births = list(self._births.values())
            self._births.clear()
        code = self._process.wait() if self._process is not None else None
        for birth in births:
            birth.server_code = code
            birth.born.set()
            birth.ended.set()
