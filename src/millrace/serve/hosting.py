"""A serving process that hosts many models at one address: its parent's side."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

import msgspec

from millrace.core.errors import StageError, UnavailableError, from_dict
from millrace.core.spec import Cache, Capture
from millrace.core.types import Struct
from millrace.serve.access import Caller, Denied
from millrace.serve.service import HttpLimits
from millrace.serve.telemetry import TelemetryFrame, read_frames

HOST_COMMAND = (sys.executable, "-m", "millrace.serve.host")


class HostConfig(Struct, frozen=True, kw_only=True):
    """What a host is told when it starts: the first line of its stdin.

    With `wants_token` every request but those for health must bring a token that may call the model; with
    `tls_client_ca` every client a certificate of that authority. A host that is not loopback wants one of the two,
    and a certificate or, with tokens, `proxies`: networks of proxies that end TLS; then nobody else but this machine
    is answered. `listen_fd`: a listening socket that was inherited, and is shared with the other processes of a group,
    whose counts are found in the folder `peers`; with `is_patient` it takes no connection before everything that it is
    first told to serve is loaded, or cannot be. `queue_s`: of every model; 0: each has its own.
    """

    host: str = "127.0.0.1"
    port: int = 0
    listen_fd: int = -1
    peers: str = ""
    is_patient: bool = False
    grpc_port: int | None = None
    allowed_hosts: list[str] = []
    wants_token: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    proxies: list[str] = []
    limits: HttpLimits = HttpLimits()
    queue_s: float = 0.0
    drain_s: float = 10.0
    telemetry_interval_s: float = 0.5
    access_log: str = ""
    trace_share: float = 0.0
    telemetry_fd: int = -1
    parent_pid: int = 0


class HostedModel(Struct, frozen=True, kw_only=True):
    """A model to be served: requests name `endpoint` as their model.

    Several with the same endpoint are its revisions: `weight` and `is_shadow` as of `revisions.Revision`.
    """

    endpoint: str
    project: str = "default"
    bundle_dir: str
    digest: str
    version: str
    weight: float = 1.0
    is_shadow: bool = False
    variant: str
    asked_variant: str = ""
    threads: int = 0
    max_batch: int = 64
    queue: int = 1024
    queue_s: float = 1.0
    slo_p99_ms: float | None = None
    calibrations: str = ""
    cache: Cache = Cache()
    capture: Capture = Capture()
    captures: str = ""
    reference: dict[str, Any] | None = None


class Hosted(Struct, frozen=True, kw_only=True):
    """Every further line of a host's stdin: all models to serve, or all tokens to believe, from now on."""

    models: list[HostedModel] | None = None
    callers: list[Caller] | None = None


class ModelState(Struct, frozen=True, kw_only=True):
    """What became of a model that a host was told to serve; `error` as `MillraceError.to_dict`."""

    endpoint: str
    version: str
    error: dict[str, Any] | None = None


class HostProcess:
    """Starts a host, tells it what to serve, reads what became of it and its telemetry.

    Args:
        config: Where it listens; the pipe and the parent are set here.
        on_frame: Called with an endpoint's telemetry, from a thread of its own.
        on_state: Called for every model of every `apply`, from a thread of its own.
        on_denied: Called with requests that were denied, from the same thread.
        command: Reads a `HostConfig` and then `Hosted` lines from stdin.
        listener: A listening socket that it is to share with others of its group.
    """

    def __init__(
        self,
        config: HostConfig,
        on_frame: Callable[[str, TelemetryFrame], None],
        on_state: Callable[[ModelState], None],
        on_denied: Callable[[Denied], None] = lambda denied: None,
        command: Sequence[str] = HOST_COMMAND,
        listener: socket.socket | None = None,
    ) -> None:
        read_fd, write_fd = os.pipe()
        listen_fd = -1 if listener is None else listener.fileno()
        passed = (write_fd,) if listener is None else (write_fd, listen_fd)
        try:
            config = msgspec.structs.replace(
                config, telemetry_fd=write_fd, parent_pid=os.getpid(), listen_fd=listen_fd
            )  # fmt: skip
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=passed
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._config = config
        self._on_state, self._on_denied = on_state, on_denied
        self._port = 0
        self._failure: dict[str, Any] | None = None
        self._told = threading.Event()
        frames = threading.Thread(target=_read_telemetry, args=(read_fd, on_frame), name="telemetry", daemon=True)
        lines = threading.Thread(target=self._read_lines, name="host", daemon=True)
        self._readers = (frames, lines)
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The host's process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_ready(self, timeout_s: float = 60.0) -> int:
        """The port, once the host listens.

        Raises:
            MillraceError: What it reported: a busy port.
            StageError: It died without a word.
            UnavailableError: It was not ready in time; it is stopped.
        """
        self._send(self._config)
        if not self._told.wait(timeout_s):
            self.kill()
            self.wait()
            raise UnavailableError(f"the serving process was not ready within {timeout_s:g} s")
        if self._port:
            return self._port
        code = self.wait()
        if self._failure is not None:
            raise from_dict(self._failure)
        raise StageError(f"the serving process ended with code {code} before it was ready", hint="its log is above")

    def apply(self, models: Sequence[HostedModel]) -> None:
        """Serve these models and no others. New ones are loaded beside the old, then take their place."""
        self._send(Hosted(models=list(models)))

    def believe(self, callers: Sequence[Caller]) -> None:
        """These tokens live, and no others. To be said again well within `access.BELIEVED_S`."""
        self._send(Hosted(callers=list(callers)))

    def terminate(self) -> None:
        """SIGTERM: it drains."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, wait for the drain and the last telemetry; SIGKILL after the time. The exit code."""
        self.terminate()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once it has ended and everything that it said is read; SIGKILL after the time."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                _close(stream)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def _send(self, message: Struct) -> None:
        """One line; a host that has died does not read it, and its exit code tells."""
        assert self._process.stdin is not None
        data = msgspec.json.encode(message) + b"\n"
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            self._process.poll()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = msgspec.json.decode(line)
            if "port" in message:
                self._port = message["port"]
            elif message.get("failed"):
                self._failure = message["failed"]
            elif "statuses" in message:
                self._on_denied(msgspec.convert(message, Denied))
                continue
            else:
                self._on_state(msgspec.convert(message, ModelState))
                continue
            self._told.set()
        self._told.set()


def _read_telemetry(fd: int, on_frame: Callable[[str, TelemetryFrame], None]) -> None:
    with os.fdopen(fd, "rb", buffering=0):
        for frame in read_frames(fd):
            on_frame(frame.endpoint, frame)


def _close(stream: IO[bytes]) -> None:
    """Bytes that a dead process never read are nobody's any more."""
    try:
        stream.close()
    except BrokenPipeError:
        stream.close()
