"""A server in a process of its own, seen from its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from millrace.core.errors import StageError, UnavailableError, from_dict
from millrace.serve.child import ChildConfig
from millrace.serve.telemetry import TelemetryFrame, read_frames

CHILD_COMMAND = (sys.executable, "-m", "millrace.serve.child", "--config", "-")


class ServerProcess:
    """Starts a child, reads its ready line and its telemetry, stops it.

    Args:
        config: What it serves; `telemetry_fd` and `parent_pid` are set here.
        on_frame: Called with every telemetry frame, from a thread of its own.
        command: Reads a `ChildConfig` as JSON from stdin and serves it.
        listener: A listening socket that it is to share.
    """

    def __init__(
        self,
        config: ChildConfig,
        on_frame: Callable[[TelemetryFrame], None] | None = None,
        command: Sequence[str] = CHILD_COMMAND,
        listener: socket.socket | None = None,
    ) -> None:
        read_fd, write_fd = os.pipe()
        listen_fd = -1 if listener is None else listener.fileno()
        passed = (write_fd,) if listener is None else (write_fd, listen_fd)
        try:
            server = msgspec.structs.replace(config.server, parent_pid=os.getpid(), listen_fd=listen_fd)
            config = msgspec.structs.replace(config, telemetry_fd=write_fd, server=server)
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=passed
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._reader = threading.Thread(target=_read, args=(read_fd, on_frame), name="telemetry", daemon=True)
        self._reader.start()
        self._config = msgspec.json.encode(config)
        self.port = self.grpc_port = 0

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_ready(self, timeout_s: float = 60.0) -> int:
        """Hand over the configuration; the port once the child says that it is ready.

        Raises:
            MillraceError: What the child reported: a busy port, a failed self-test.
            StageError: It died without a word.
            UnavailableError: It was not ready in time; it is stopped.
        """
        timer = threading.Timer(timeout_s, self.kill)
        timer.start()
        assert self._process.stdout is not None
        try:
            is_read = self._hand_over()
            line = self._process.stdout.readline()
        finally:
            is_late = not timer.is_alive()
            timer.cancel()
        if not line:
            code = self.wait()
            if is_late:
                raise UnavailableError(f"the server was not ready within {timeout_s:g} s")
            when = "before it was ready" if is_read else "before it had read its configuration"
            raise StageError(f"the server ended with code {code} {when}", hint="its log is above")
        message = msgspec.json.decode(line)
        if not message.get("ready"):
            self.wait()
            raise from_dict(message["error"])
        self.port = message["port"]
        self.grpc_port = message.get("grpc_port", 0)
        return self.port

    def _hand_over(self) -> bool:
        """Whether the child took its configuration; one that has died says why by its output or exit code."""
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.write(self._config)
        except BrokenPipeError:
            return False
        return True

    def stop(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, wait for the drain and the last telemetry; SIGKILL after the time. The exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once the child has ended and its telemetry is read; SIGKILL after the time."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def _read(fd: int, on_frame: Callable[[TelemetryFrame], None] | None) -> None:
    with os.fdopen(fd, "rb", buffering=0):
        for frame in read_frames(fd):
            if on_frame is not None:
                on_frame(frame)
