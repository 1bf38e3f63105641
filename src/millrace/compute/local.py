"""Work on this machine: a fork server, and a process per step with limits."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from millrace.compute.forkserver import MAX_REQUEST, Exited, Request, Started
from millrace.compute.limits import available_memory, group_rss
from millrace.compute.link import receive
from millrace.compute.orphans import clean_orphans, forget_worker, note_worker
from millrace.core.errors import MillraceError, StageError, StepMemoryError, StepTimeoutError, UnavailableError
from millrace.core.ports import Capacity, Frame, HeartbeatFrame, Work, WorkHandle, WorkResult

WATCH_S = 0.1
START_TIMEOUT_S = 120.0
BUFFER_BYTES = 4_000_000


class LocalCompute:
    """Implements `core.ports.Compute` with processes of this machine. Thread-safe.

    Args:
        home: For notes about workers, so that orphans can be found.
        entry: "module:function" called in the worker as `(work, link) -> {"facts": …, "outputs": …}`.
        preload: Modules that the fork server imports before the first work.
        heartbeat_timeout_s: A worker silent for so long is hung.
    """

    def __init__(self, home: Path, entry: str, preload: Sequence[str] = (), heartbeat_timeout_s: float = 60.0) -> None:
        self._home, self._entry, self._preload = home, entry, tuple(preload)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._answers: queue.Queue[Started] = queue.Queue()
        self._handles: dict[int, LocalHandle] = {}
        self._early: dict[int, int] = {}
        clean_orphans(home)
        with self._lock:
            self._start()

    def capacity(self) -> Capacity:
        """Processors this process may use, and free memory."""
        return Capacity(cpus=len(os.sched_getaffinity(0)), memory_bytes=available_memory())

    def submit(self, work: Work, on_frame: Callable[[Frame], None]) -> WorkHandle:
        """Fork a worker for the work."""
        ours, theirs = socket.socketpair()
        request = msgspec.msgpack.encode(Request(work=work, entry=self._entry))
        with self._lock:
            if self._control is None or self._server is None or self._server.poll() is not None:
                self._start()
            assert self._control is not None
            socket.send_fds(self._control, [request], [theirs.fileno()])
            theirs.close()
            try:
                pid = self._answers.get(timeout=START_TIMEOUT_S).pid
            except queue.Empty:
                raise UnavailableError("the fork server does not answer", hint="see its output above") from None
            handle = LocalHandle(work, pid, ours, on_frame, self._heartbeat_timeout_s)
            self._handles[pid] = handle
            note_worker(self._home, pid, work.step_id)
            code = self._early.pop(pid, None)
        if code is not None:
            handle.exited(code)
        handle.start(lambda: self._forget(pid))
        return handle

    def close(self) -> None:
        """Cancel what runs and end the fork server."""
        with self._lock:
            handles = list(self._handles.values())
            control, self._control = self._control, None
            server, self._server = self._server, None
        for handle in handles:
            handle.cancel(grace_s=0.0)
        for handle in handles:
            handle.wait(5.0)
        if control is not None:
            control.shutdown(socket.SHUT_RDWR)
            control.close()
        if server is not None:
            try:
                server.wait(1.0)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _forget(self, pid: int) -> None:
        forget_worker(self._home, pid)
        with self._lock:
            self._handles.pop(pid, None)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        command = [sys.executable, "-m", "millrace.compute.forkserver", str(theirs.fileno()), *self._preload]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self._server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        theirs.close()
        self._control = ours
        threading.Thread(target=self._listen, args=(ours,), name="fork server", daemon=True).start()

    def _listen(self, control: socket.socket) -> None:
        decoder = msgspec.msgpack.Decoder(Started | Exited)
        while True:
            try:
                data = control.recv(MAX_REQUEST)
            except OSError:
                return
            if not data:
                return
            message = decoder.decode(data)
            if isinstance(message, Started):
                self._answers.put(message)
                continue
            handle = self._handles.get(message.pid)
            if handle is None:
                self._early[message.pid] = message.code
            else:
                handle.exited(message.code)


class LocalHandle:
    """Implements `core.ports.WorkHandle`."""

    def __init__(
        self,
        work: Work,
        pid: int,
        connection: socket.socket,
        on_frame: Callable[[Frame], None],
        heartbeat_timeout_s: float,
    ) -> None:
        self._work, self._pid, self._connection, self._on_frame = work, pid, connection, on_frame
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._result: WorkResult | None = None
        self._done = threading.Event()
        self._ended = threading.Event()
        self._code: int | None = None
        self._cancelled = False
        self._verdict: MillraceError | None = None
        self._peak_bytes = 0
        self._beat_at = time.monotonic()

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._pid

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to read and to watch."""
        threading.Thread(target=self._read, args=(on_end,), name=f"work {self._work.name}", daemon=True).start()
        threading.Thread(target=self._watch, name=f"watch {self._work.name}", daemon=True).start()

    def wait(self, timeout_s: float | None = None) -> WorkResult | None:
        """The result, or None."""
        self._done.wait(timeout_s)
        return self._result

    def logs(self, offset: int = 0) -> bytes:
        """What was printed from an offset."""
        path = Path(self._work.log_path)
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()

    def cancel(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after the grace."""
        if self._done.is_set():
            return
        self._cancelled = True
        if grace_s <= 0:
            self._kill()
            return
        self._signal(signal.SIGTERM)
        timer = threading.Timer(grace_s, self._kill)
        timer.daemon = True
        timer.start()

    def exited(self, code: int) -> None:
        """Told by the fork server."""
        self._code = code
        self._ended.set()

    def _signal(self, number: int) -> None:
        if self._ended.is_set():
            return
        try:
            os.kill(self._pid, number)
        except ProcessLookupError:
            return

    def _kill(self) -> None:
        """The worker and its children: they share its process group."""
        if self._done.is_set():
            return
        try:
            os.killpg(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            self._signal(signal.SIGKILL)

    def _read(self, on_end: Callable[[], None]) -> None:
        result: WorkResult | None = None
        while (frame := receive(self._connection)) is not None:
            self._beat_at = time.monotonic()
            if isinstance(frame, WorkResult):
                result = frame
                break
            if isinstance(frame, HeartbeatFrame):
                self._peak_bytes = max(self._peak_bytes, frame.rss_bytes)
            else:
                self._on_frame(frame)
        self._ended.wait(2.0)
        self._reap_group()
        self._result = self._judge(result)
        on_end()
        self._connection.close()
        self._done.set()

    def _reap_group(self) -> None:
        try:
            os.killpg(self._pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def _judge(self, result: WorkResult | None) -> WorkResult:
        if self._verdict is not None:
            return WorkResult(state="failed", error=self._verdict.to_dict(), peak_rss_bytes=self._peak_bytes)
        if self._cancelled and (result is None or result.state != "succeeded"):
            return WorkResult(state="cancelled", peak_rss_bytes=self._peak_bytes)
        if result is not None:
            return msgspec.structs.replace(result, peak_rss_bytes=self._peak_bytes)
        return WorkResult(state="failed", error=self._death().to_dict(), peak_rss_bytes=self._peak_bytes)

    def _death(self) -> StageError:
        details = {"log": self._work.log_path}
        code = self._code
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            text = f"the worker of step {self._work.name} was ended by {name}"
            if code == -signal.SIGKILL:
                text += ": killed from outside, or out of memory"
            return StageError(text, details=details)
        return StageError(f"the worker of step {self._work.name} ended early with code {code}", details=details)

    def _watch(self) -> None:
        """Limits: memory of the process group, wall time, heartbeat."""
        started = time.monotonic()
        work, details = self._work, {"log": self._work.log_path}
        while not self._done.wait(WATCH_S):
            if work.memory_limit_bytes is not None:
                rss = group_rss(self._pid)
                self._peak_bytes = max(self._peak_bytes, rss)
                if rss > work.memory_limit_bytes:
                    self._verdict = StepMemoryError(
                        f"step {work.name} used {rss // 10**6} MB; its limit is {work.memory_limit_bytes // 10**6} MB",
                        details=details,
                    )
            now = time.monotonic()
            if work.wall_time_s is not None and now - started > work.wall_time_s:
                self._verdict = StepTimeoutError(
                    f"step {work.name} ran longer than its limit of {work.wall_time_s:g} s", details=details
                )
            elif now - self._beat_at > self._heartbeat_timeout_s:
                self._verdict = StepTimeoutError(
                    f"step {work.name} has not answered for {self._heartbeat_timeout_s:g} s: it hangs", details=details
                )
            if self._verdict is not None:
                self._kill()
                return
