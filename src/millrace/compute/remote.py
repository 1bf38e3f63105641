"""Work on other machines: put where their workers ask for it, and listened to through the records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from millrace.core.clock import Clock
from millrace.core.errors import CancelledError, MillraceError, StageError, UnavailableError
from millrace.core.ids import new_id
from millrace.core.ports import (
    Capacity,
    Compute,
    Frame,
    HeartbeatFrame,
    LogFrame,
    ProgressFrame,
    Records,
    Transaction,
    Work,
    WorkHandle,
    WorkResult,
)
from millrace.core.types import Artifact, Token, WorkFrame, WorkItem

POLL_S = 0.2
MAX_ATTEMPTS = 3  # of one work, whose workers vanish
PATIENCE_S = 2.0  # before people are told that a work waits
STORED = Frame | LogFrame


class RemoteCompute:
    """Implements `core.ports.Compute` with whichever workers ask this home's server for work. Thread-safe.

    A worker that falls silent loses its work to the next one, which begins again; a work whose workers have
    vanished three times fails. Works end with this process: a report is then answered with "stop".

    Args:
        records: Where works wait and frames arrive.
        clock: The time.
        home: Does what must not leave this machine.
        stays_home: Implementations that must not.
        pack: Stores a spec's folder, so that workers can have its code.
        silence_s: A worker not heard for so long is given up.
    """

    def __init__(
        self,
        records: Records,
        clock: Clock,
        home: Compute,
        *,
        stays_home: frozenset[str],
        pack: Callable[[Path], Artifact],
        silence_s: float,
    ) -> None:
        self.records, self.clock, self.silence_s = records, clock, silence_s
        self._home, self._stays_home, self._pack = home, stays_home, pack
        self._packed: dict[str, Artifact] = {}
        self._works: set[RemoteHandle] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def capacity(self) -> Capacity:
        """This machine's: how many workers will ask is not known."""
        return self._home.capacity()

    def submit(
        self, work: Work, on_frame: Callable[[Frame], None], secrets: Mapping[str, str] | None = None
    ) -> WorkHandle:
        """Let a work wait for a worker, which gets its secrets when it claims it: they are not stored with it.

        Raises:
            UnavailableError: This compute is closed.
        """
        if work.implementation in self._stays_home:
            return self._home.submit(work, on_frame, secrets)
        with self._lock:
            if self._is_closed:
                raise UnavailableError("this compute is closed: no work can be submitted to it")
            tree = self._packed.get(work.project_dir)
            if tree is None:
                tree = self._packed[work.project_dir] = self._pack(Path(work.project_dir))
            handle = RemoteHandle(self, work, tree, on_frame)
            self._works.add(handle)
        handle.start()
        return handle

    def close(self) -> None:
        """Tell the workers to stop; idempotent."""
        with self._lock:
            self._is_closed = True
            works = list(self._works)
        for work in works:
            work.cancel(0.0)
        for work in works:
            work.wait(10.0)
        self._home.close()

    def forget(self, handle: RemoteHandle) -> None:
        """It has ended."""
        with self._lock:
            self._works.discard(handle)


class RemoteHandle:
    """Implements `core.ports.WorkHandle`; made by `RemoteCompute.submit`."""

    def __init__(self, compute: RemoteCompute, work: Work, tree: Artifact, on_frame: Callable[[Frame], None]) -> None:
        self._compute, self._work, self._on_frame = compute, work, on_frame
        self._records, self._clock = compute.records, compute.clock
        self._done = threading.Event()
        self._woken = threading.Event()
        self._result: WorkResult | None = None
        self._grace_s: float | None = None  # once it is to end
        self._kill_at: float | None = None
        self._told = -1  # the attempt of which people have been told
        self._began = self._clock.monotonic()
        self._item = WorkItem(
            id=new_id(), created_at=self._clock.now(), run_id=work.run_id, name=work.name,
            work=msgspec.to_builtins(work), project_tree=tree,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name=f"millrace remote work {work.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """None: it is another machine's."""
        return None

    def start(self) -> None:
        """Store the work, without those that a killed driver of the same run has left; then listen."""
        with self._records.transaction() as transaction:
            for left in transaction.find(WorkItem, {"run_id": self._work.run_id}):
                if left.name == self._work.name:
                    _remove(transaction, left.id)
            transaction.put(self._item, expect_version=0)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> WorkResult | None:
        """The result, or None when it is not there within the time."""
        self._done.wait(timeout_s)
        return self._result

    def logs(self, offset: int = 0) -> bytes:
        """What the step has printed from byte `offset` on, as far as it has arrived."""
        path = Path(self._work.log_path)
        if not self._work.log_path or not path.is_file():
            return b""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()

    def cancel(self, grace_s: float = 5.0) -> None:
        """Tell the worker to end the work; after the grace nobody waits for it. Idempotent."""
        if self._grace_s is None or grace_s < self._grace_s:
            self._grace_s = grace_s
            self._kill_at = self._clock.monotonic() + grace_s
        self._woken.set()

    def _run(self) -> None:
        result = self._failed(StageError("the driver's own code failed while it listened to the step"))
        try:
            result = self._listen()
        except MillraceError as error:  # the records cannot be reached any more
            result = self._failed(error)
        finally:
            self._result = result
            self._compute.forget(self)
            self._done.set()

    def _listen(self) -> WorkResult:
        while True:
            result = self._take_frames()
            if result is not None and result.state == "cancelled" and self._grace_s is None:
                self._put_back()
                result = None
            elif result is None:
                result = self._look()
            if result is not None:
                with self._records.transaction() as transaction:
                    _remove(transaction, self._item.id)
                self._on_frame(result)
                return result
            self._woken.wait(POLL_S)
            self._woken.clear()

    def _take_frames(self) -> WorkResult | None:
        """Pass on what has arrived; the result if it is among it."""
        stored = self._records.find(WorkFrame, {"work_id": self._item.id}, order="number")
        for batch in stored:
            for one in batch.frames:
                frame = msgspec.convert(one, STORED)
                if isinstance(frame, LogFrame):
                    self._append_log(frame.data)
                elif isinstance(frame, WorkResult):
                    return frame
                elif not isinstance(frame, HeartbeatFrame):
                    self._on_frame(frame)
        if stored:
            with self._records.transaction() as transaction:
                for batch in stored:
                    transaction.delete(WorkFrame, batch.id)
        return None

    def _look(self) -> WorkResult | None:
        """Whether somebody works on it, and whether that is still wanted."""
        item = self._records.get(WorkItem, self._item.id)
        if item is None:
            return self._failed(StageError(f"the work of step {self._work.name} was removed by another driver"))
        if self._grace_s is not None:
            return self._end(item)
        if item.state == "claimed" and self._clock.now() - item.seen_at > self._compute.silence_s:
            return self._give_up(item)
        if item.attempt > self._told and item.state == "claimed":
            self._told = item.attempt
            self._on_frame(ProgressFrame(done=0.0, total=0.0, text=f"on {item.worker}"))
        elif item.state == "queued" and self._told < 0 and self._clock.monotonic() - self._began > PATIENCE_S:
            self._told = 0
            text = "waits for a worker: `millrace worker URL` on another machine takes it"
            self._on_frame(ProgressFrame(done=0.0, total=0.0, text=text))
        return None

    def _end(self, item: WorkItem) -> WorkResult | None:
        """Cancelled: at once where nobody works on it, else after the grace."""
        assert self._kill_at is not None
        error = CancelledError(f"step {self._work.name} was cancelled").to_dict()
        if item.state == "queued" or self._clock.monotonic() >= self._kill_at:
            return WorkResult(state="cancelled", error=error)
        if not item.cancel:
            self._change(item, cancel="ask")
        return None

    def _give_up(self, item: WorkItem) -> WorkResult | None:
        """Its worker is silent: another one may take it."""
        silence = f"the worker {item.worker!r} was not heard for {self._compute.silence_s:g} s"
        if item.attempt >= MAX_ATTEMPTS:
            return self._failed(
                StageError(
                    f"step {self._work.name} was lost {item.attempt} times: {silence}",
                    hint="see the worker's own log: it may have run out of memory",
                    details={"log": self._work.log_path},
                )
            )
        self._append_log(f"\n[{silence}: the step begins again on another one]\n".encode())
        self._change(item, state="queued", worker="")
        return None

    def _put_back(self) -> None:
        """Its worker was told to stop, the run was not: the next one takes it. Counts as no attempt."""
        with self._records.transaction() as transaction:
            item = transaction.get(WorkItem, self._item.id)
            if item is not None and item.state == "ended":
                self._append_log(
                    f"\n[the worker {item.worker!r} was stopped: the step goes on on another one]\n".encode()
                )
                for frame in transaction.find(WorkFrame, {"work_id": item.id}):
                    transaction.delete(WorkFrame, frame.id)
                transaction.put(msgspec.structs.replace(item, state="queued", worker=""), item.version)

    def _change(self, item: WorkItem, **changes: Any) -> None:
        """Change it, unless it has moved on meanwhile: the next look sees that."""
        with self._records.transaction() as transaction:
            stored = transaction.get(WorkItem, item.id)
            if stored is None or (stored.state, stored.attempt, stored.seen_at) != (
                item.state, item.attempt, item.seen_at,
            ):  # fmt: skip
                return
            transaction.put(msgspec.structs.replace(stored, **changes), stored.version)

    def _append_log(self, data: bytes) -> None:
        if self._work.log_path:
            with open(self._work.log_path, "ab") as file:
                file.write(data)

    def _failed(self, error: MillraceError) -> WorkResult:
        return WorkResult(state="failed", error=error.to_dict())


def _remove(transaction: Transaction, work_id: str) -> None:
    """The work with its frames and tokens: what is said of it later is refused."""
    for frame in transaction.find(WorkFrame, {"work_id": work_id}):
        transaction.delete(WorkFrame, frame.id)
    for token in transaction.find(Token, {"work_id": work_id}):
        transaction.delete(Token, token.id)
    transaction.delete(WorkItem, work_id)
