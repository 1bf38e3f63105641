"""Several processes that serve one bundle at one port: for models so small that one core is the bound.

All take connections from one socket, which their parent holds: what a process that dies or drains has not taken
another one takes. Queues and quotas are each process's own; metrics and statistics are added up, and telemetry is told
to the parent as that of one server.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from millrace.core.errors import MillraceError
from millrace.serve.child import ChildConfig
from millrace.serve.listen import bind
from millrace.serve.peers import fold
from millrace.serve.process import ServerProcess
from millrace.serve.telemetry import TelemetryFrame, TelemetryWriter

_log = logging.getLogger(__name__)
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
STEADY_S = 30.0  # who has lived so long begins anew with the waiting
LOOK_S = 0.05


def wait_before(crashes: int) -> float:
    """Seconds until a process that has died so often in a row is started again.

    Example:
        >>> [wait_before(crashes) for crashes in (1, 2, 100)]
        [0.0, 0.5, 10.0]
    """
    return BACKOFF_S[min(crashes, len(BACKOFF_S)) - 1]


class Member:
    """One process of a group, started again when it dies.

    Args:
        config: What it serves.
        on_frame: Called with its telemetry, from a thread of its own.
        listener: Where connections come from.
    """

    def __init__(
        self, config: ChildConfig, on_frame: Callable[[TelemetryFrame], None], listener: socket.socket
    ) -> None:  # fmt: skip
        self._config, self._on_frame, self._listener = config, on_frame, listener
        self._process: ServerProcess | None = None
        self._crashes = 0
        self._is_ready = self._is_stopping = False
        self._started_s = self._due_s = 0.0
        self._starting: threading.Thread | None = None

    def start(self) -> None:
        """Begin it; ready once `wait_ready` says so."""
        self._started_s, self._is_ready = time.monotonic(), False
        self._process = ServerProcess(self._config, self._on_frame, listener=self._listener)

    def wait_ready(self) -> None:
        """Wait until it answers.

        Raises:
            MillraceError: It cannot.
        """
        assert self._process is not None
        self._process.wait_ready()
        self._is_ready = True

    def look(self, now_s: float) -> None:
        """Start it again if it has died, as soon as that is due."""
        if self._starting is not None:
            if self._starting.is_alive():
                return
            self._starting = None
        if self._process is not None and self._process.exit_code is not None:
            code = self._process.wait()
            fold(Path(self._config.server.peers), self._process.pid)
            self._process = None
            self._crashes = 1 if now_s - self._started_s >= STEADY_S else self._crashes + 1
            self._due_s = now_s + wait_before(self._crashes)
            _log.error("a serving process ended with code %d; it is started again", code)
        if self._process is None and now_s >= self._due_s:
            self.start()
            self._starting = threading.Thread(target=self._start_again, name="restart", daemon=True)
            self._starting.start()

    def _start_again(self) -> None:
        try:
            self.wait_ready()
        except MillraceError as error:
            if not self._is_stopping:
                _log.error("a serving process cannot be started again: %s", error)

    def terminate(self) -> None:
        """Let it drain."""
        self._is_stopping = True
        if self._process is not None and self._process.exit_code is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """The exit code, once it has ended; it is killed after the time."""
        if self._process is None:
            return 0
        code = self._process.wait(timeout_s)
        if self._starting is not None:
            self._starting.join()
        return code if self._is_ready else 0  # who was not yet ready has lost nothing


def serve_group(config: ChildConfig) -> int:
    """Serve a bundle by several processes until SIGTERM; blocks.

    One line goes to stdout when all of them are ready, as of `run_server`.

    Args:
        config: With `processes`.

    Returns:
        0 after a graceful drain of all, else 1.

    Raises:
        MillraceError: One of them cannot serve, or the port is busy.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = config.server
    forward = _forwarding(config.telemetry_fd)
    with (
        bind(server.host, server.port, is_guarded=server.is_guarded) as listener,
        tempfile.TemporaryDirectory(prefix="millrace-") as peers,
    ):
        port = listener.getsockname()[1]
        each = msgspec.structs.replace(
            config, processes=1, server=msgspec.structs.replace(server, port=port, peers=peers)
        )
        members = [Member(each, forward, listener) for _ in range(config.processes)]
        try:
            for member in members:
                member.start()
            for member in members:
                member.wait_ready()
            print(json.dumps({"ready": True, "port": port, "grpc_port": server.grpc_port or 0}), flush=True)
            while not stop.wait(LOOK_S):
                if server.parent_pid is not None and os.getppid() != server.parent_pid:
                    break
                now_s = time.monotonic()
                for member in members:
                    member.look(now_s)
        finally:
            for member in members:
                member.terminate()
            codes = [member.wait(server.drain_s + 5.0) for member in members]
    return 1 if any(codes) else 0


def _forwarding(fd: int | None) -> Callable[[TelemetryFrame], None]:
    """Tells the parent what the processes tell: their frames hold what is new, so that all of them add up."""
    if fd is None:
        return lambda frame: None
    writer, lock = TelemetryWriter(fd), threading.Lock()

    def forward(frame: TelemetryFrame) -> None:
        with lock:
            try:
                if writer.flush():
                    writer.send(frame)
                    writer.flush()
            except BrokenPipeError:
                _log.warning("the parent has died")

    return forward
