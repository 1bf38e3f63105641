"""Work on this machine: a fork server, a process per work, limits, and nothing left behind."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from millrace.compute.faults import describe_death
from millrace.compute.launcher import Birth, Launcher
from millrace.compute.limits import MemoryCgroup, Watch, delegated_cgroup, machine_capacity, oom_kills
from millrace.compute.link import Cancel, Channel, Order
from millrace.compute.orphans import clean_orphans, kill_leftovers, note_worker
from millrace.compute.processes import kill_session, send_signal, start_time
from millrace.core.errors import CancelledError, CapacityError, MillraceError, StageError, UnavailableError
from millrace.core.ports import Capacity, Frame, HeartbeatFrame, Work, WorkResult

LOG_TAIL_BYTES = 64 << 10
WATCH_S = 0.05
CLOSE_GRACE_S = 1.0
START_TIMEOUT_S = 120.0  # an import in the fork server may take long on a busy machine
STATUS_WAIT_S = 10.0  # between a closed line and the news of the end


class LocalCompute:
    """Implements `core.ports.Compute` with processes of this machine. Thread-safe.

    The fork server starts with the first work. Workers end with this process, however it ends.

    Args:
        home: Notes about workers (`scratch/workers`) and the fork server's log (`logs`) go there.
        entry: "module:function", called in the worker as `(work, link: WorkerLink) -> facts`.
        preload: Modules that the fork server imports in the background, after the entry's.
        heartbeat_timeout_s: Silence of a worker that counts as a hang.
        method: "fork" or "spawn"; by default spawn on macOS, fork elsewhere.
        cgroup: A cgroup folder in which groups may be made; by default the one that systemd has delegated.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     compute = LocalCompute(Path(folder), entry="millrace.testing.compute:answer")
        ...     work = Work(step_id="1", run_id="r", name="x", implementation="", spec=b"{}", params={"do": "hello"})
        ...     result = compute.submit(work, lambda frame: None).wait(30)
        ...     compute.close()
        >>> result.state, result.facts
        ('succeeded', {'said': 'hello'})
    """

    def __init__(
        self,
        home: Path,
        entry: str,
        preload: Sequence[str] = (),
        *,
        heartbeat_timeout_s: float = 60.0,
        method: str | None = None,
        cgroup: Path | None = None,
    ) -> None:
        self._home, self._entry = Path(home).absolute(), entry
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._cgroup = cgroup or delegated_cgroup()
        modules = (entry.partition(":")[0], *preload)  # every worker needs the first
        self._launcher = Launcher(self._home, modules, method or ("spawn" if sys.platform == "darwin" else "fork"))
        self._works: set[LocalHandle] = set()
        self._changed = threading.Condition()
        self._is_closed = False
        self._watcher: threading.Thread | None = None
        clean_orphans(self._home)

    def capacity(self) -> Capacity:
        """What this process may use now."""
        return machine_capacity()

    def submit(
        self, work: Work, on_frame: Callable[[Frame], None], secrets: Mapping[str, str] | None = None
    ) -> LocalHandle:
        """Start a work; returns before the worker has been forked.

        `on_frame` gets every frame in order from one thread; the last one is the result if the worker has sent one.

        Raises:
            UnavailableError: Closed, or the fork server cannot be started.
        """
        ours, theirs = socket.socketpair()
        with contextlib.closing(theirs), self._changed:
            if self._is_closed:
                ours.close()
                raise UnavailableError("this compute is closed: no work can be submitted to it")
            try:
                birth = self._launcher.launch(theirs)
            except BaseException:
                ours.close()
                raise
            handle = LocalHandle(self, work, birth, Channel(ours), on_frame)
            handle.secrets = dict(secrets or {})
            self._works.add(handle)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="millrace limits", daemon=True)
                self._watcher.start()
            self._changed.notify_all()
        handle.start()
        return handle

    def close(self) -> None:
        """Cancel what runs, wait for it, and end the fork server. Idempotent."""
        with self._changed:
            self._is_closed = True
            works = list(self._works)
            self._changed.notify_all()
        for work in works:
            work.cancel(CLOSE_GRACE_S)
        for work in works:
            work.wait_unless_own(CLOSE_GRACE_S + STATUS_WAIT_S)
        self._launcher.close()
        for work in works:
            work.join(STATUS_WAIT_S)

    def _watch(self) -> None:
        """Limits of every running work, in one thread; ends when closed and idle."""
        while True:
            with self._changed:
                while not self._works and not self._is_closed:
                    self._changed.wait()
                if not self._works:
                    return
                works = list(self._works)
            now = time.monotonic()
            for work in works:
                work.check(now)
            time.sleep(WATCH_S)

    def _forget(self, handle: LocalHandle) -> None:
        with self._changed:
            self._works.discard(handle)

    def _order(self, work: Work, secrets: Mapping[str, str]) -> Order:
        path = [os.path.abspath(folder) for folder in sys.path]
        return Order(
            entry=self._entry, work=work, environment=dict(os.environ), import_path=path, secrets=dict(secrets)
        )


class LocalHandle:
    """Implements `core.ports.WorkHandle`. Thread-safe; made by `LocalCompute.submit`."""

    def __init__(
        self, compute: LocalCompute, work: Work, birth: Birth, channel: Channel, on_frame: Callable[[Frame], None]
    ) -> None:
        self._compute, self._work, self._birth, self._channel = compute, work, birth, channel
        self._on_frame = on_frame
        self.secrets: dict[str, str] = {}  # until the worker has them
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._result: WorkResult | None = None
        self._watch = Watch(work, compute._heartbeat_timeout_s)
        self._started = ""  # the worker's start time
        self._broken: StageError | None = None  # the limit for which it was killed
        self._is_cancelled = False
        self._kill_at: float | None = None
        self._group: MemoryCgroup | None = None
        self._oom_kills = oom_kills()
        self._thread = threading.Thread(target=self._run, name=f"millrace work {work.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """The worker's process id, once it is forked."""
        return self._birth.pid

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def wait_unless_own(self, timeout_s: float) -> None:
        """Wait for the result, except inside this work's `on_frame`, which is on the way to it."""
        if threading.current_thread() is not self._thread:
            self._done.wait(timeout_s)

    def join(self, timeout_s: float) -> None:
        """Wait until the worker is gone and its note removed."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def wait(self, timeout_s: float | None = None) -> WorkResult | None:
        """The result, or None when it is not there within the time."""
        self._done.wait(timeout_s)
        return self._result

    def logs(self, offset: int = 0) -> bytes:
        """What the step has printed from byte `offset` on; empty where there is nothing yet."""
        if not self._work.log_path:
            return b""
        try:
            with open(self._work.log_path, "rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def cancel(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after the grace; the shortest grace counts. After the end: nothing."""
        with self._lock:
            if self._done.is_set():
                return
            is_first, self._is_cancelled = not self._is_cancelled, True
            kill_at = time.monotonic() + grace_s
            self._kill_at = kill_at if self._kill_at is None else min(self._kill_at, kill_at)
            if is_first and self._started:
                self._ask_to_end()
        if grace_s <= 0:
            self._kill()

    def check(self, now: float) -> None:
        """Kill the worker if it has broken a limit or its grace is over."""
        if self._done.is_set() or self._birth.ended.is_set():
            return
        pid = self.pid
        if pid is None:
            if now - self._watch.started_at > START_TIMEOUT_S and self._broken is None:
                self._broken = StageError(f"step {self._work.name} has not started: the fork server does not answer")
                self._channel.shutdown()
                self._birth.born.set()
            return
        broken = self._watch.check(pid, now)
        if broken is not None and self._broken is None:
            self._broken = broken
            self._kill()
        elif self._kill_at is not None and now >= self._kill_at:
            self._kill()

    def _ask_to_end(self) -> None:
        """By both ways: the signal for user code, the message for a main thread that is in native code."""
        if self.pid is not None:
            send_signal(self.pid, self._started, signal.SIGTERM)
        threading.Thread(target=self._channel.send, args=(Cancel(),), daemon=True).start()

    def _kill(self) -> None:
        if self.pid is not None and not self._birth.ended.is_set():
            kill_session(self.pid, self._started)

    def _run(self) -> None:
        """The thread of this work: order, frames, result."""
        note: Path | None = None
        result = self._lost("the driver's own code failed while it listened to the step")
        try:
            self._birth.born.wait()
            if self.pid is None:
                result = self._unborn()
            else:
                note = self._adopt(self.pid)
                result = self._listen()
        finally:  # also when `on_frame` raises: whoever waits must get an answer
            self._end(result, note)

    def _adopt(self, pid: int) -> Path:
        """Note the worker, limit it, and tell it what to do."""
        started = start_time(pid)
        note = note_worker(self._compute._home, pid, self._compute._launcher.mark, self._work.step_id)
        limit, parent = self._work.memory_limit_bytes, self._compute._cgroup
        if limit is not None and parent is not None:
            self._group = MemoryCgroup.create(parent, f"millrace-{pid}", limit)
            if self._group is not None:
                self._group.add(pid)
        self._watch.started_at = time.monotonic()
        self._watch.beat()
        self._channel.send(self._compute._order(self._work, self.secrets))
        self.secrets = {}
        with self._lock:
            self._started = started
            if self._is_cancelled:
                self._ask_to_end()
        return note

    def _listen(self) -> WorkResult:
        while True:
            try:
                frame = self._channel.receive()
            except ValueError as error:  # the step has written to the line itself
                self._kill()
                return self._lost(f"step {self._work.name} broke its line to the driver: {error}")
            if isinstance(frame, WorkResult):
                return self._finish(frame)
            if frame is None:
                return self._explain_end()
            self._watch.beat(frame.rss_bytes if isinstance(frame, HeartbeatFrame) else 0)
            if not isinstance(frame, Order | Cancel):
                self._watch.beat_at = math.inf  # as long as the driver does not listen, silence proves nothing
                self._on_frame(frame)
                self._watch.beat()

    def _finish(self, frame: WorkResult) -> WorkResult:
        peak = max(self._watch.peak_bytes, frame.peak_rss_bytes)
        result = msgspec.structs.replace(frame, peak_rss_bytes=peak)
        self._on_frame(result)
        return result

    def _explain_end(self) -> WorkResult:
        """The line is closed and there is no result: by whom, and why?"""
        if not self._birth.ended.wait(1.0):
            self._kill()  # it has closed its line and lives on
            self._birth.ended.wait(STATUS_WAIT_S)
        if self._broken is not None:
            return self._failed(self._broken)
        if self._is_cancelled:
            error = CancelledError(f"step {self._work.name} was cancelled").to_dict()
            return WorkResult(state="cancelled", error=error, peak_rss_bytes=self._watch.peak_bytes)
        if self._birth.status == signal.SIGKILL and self._is_out_of_memory():
            return self._failed(self._watch.memory_error("was killed by the kernel for lack of memory"))
        if self._birth.status is None and self.pid is not None:
            kill_leftovers(self.pid, self._compute._launcher.mark)
        return self._failed(describe_death(self._birth.status, self._work, self._end_of_log(), self._birth.server_code))

    def _is_out_of_memory(self) -> bool:
        return (self._group is not None and self._group.kills() > 0) or oom_kills() > self._oom_kills

    def _end_of_log(self) -> bytes:
        if not self._work.log_path or not os.path.exists(self._work.log_path):
            return b""
        return self.logs(max(0, os.path.getsize(self._work.log_path) - LOG_TAIL_BYTES))

    def _unborn(self) -> WorkResult:
        if self._birth.refused is not None:
            reason = os.strerror(self._birth.refused)
            return self._failed(CapacityError(f"no process can be made for step {self._work.name}: {reason}"))
        return self._failed(self._broken or describe_death(None, self._work, b"", self._birth.server_code))

    def _failed(self, error: MillraceError) -> WorkResult:
        return WorkResult(state="failed", error=error.to_dict(), peak_rss_bytes=self._watch.peak_bytes)

    def _lost(self, message: str) -> WorkResult:
        return self._failed(StageError(message, details={"log": self._work.log_path}))

    def _end(self, result: WorkResult, note: Path | None) -> None:
        with self._lock:
            self._result = result
            self._done.set()
        self._channel.shutdown()
        # the rest is after the result, so that nobody waits for it: see the worker off
        if self.pid is not None and not self._birth.ended.wait(1.0):
            self._kill()
            self._birth.ended.wait(STATUS_WAIT_S)
        self._channel.close()
        if self._work.scratch_dir:  # an isolated step cannot remove its own folder; what it keeps stays
            with contextlib.suppress(OSError):
                os.rmdir(self._work.scratch_dir)
        if note is not None:
            note.unlink(missing_ok=True)
        if self._group is not None:
            self._group.remove()
        self._compute._forget(self)
