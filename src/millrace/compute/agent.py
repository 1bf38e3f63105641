"""A worker of another machine: asks a server for works, does them here, tells how they go."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from millrace.core.errors import (
    ConflictError,
    DeniedError,
    InputError,
    MillraceError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from millrace.core.operations.works import ReportAnswer, WorkOrder
from millrace.core.ports import (
    Compute,
    Frame,
    HeartbeatFrame,
    LogFrame,
    StepBlobs,
    Transport,
    Work,
    WorkHandle,
    WorkResult,
)

POLL_S = 0.5
MAX_POLL_S = 10.0  # between questions to a server that does not answer
REPORT_S = 0.4
LOG_BYTES = 256 << 10  # of one report
FRAMES = 100  # of one report
STOP_GRACE_S = 10.0
LOST = (ConflictError, NotFoundError, DeniedError, UnauthenticatedError, InputError)
log = logging.getLogger("millrace.worker")


class Agent:
    """One work at a time.

    Args:
        server: Asked for works.
        open_order: The transport of one work's token, and its blobs; told the folder where the worker process
            finds how to reach the same.
        compute: Does them.
        folder: Everything that is written here goes below it.
        name: What people call this worker.
        version: This Millrace's.
    """

    def __init__(
        self,
        server: Transport,
        open_order: Callable[[WorkOrder, Path], tuple[Transport, StepBlobs]],
        compute: Compute,
        *,
        folder: Path,
        name: str,
        version: str,
    ) -> None:
        self._server, self._open_order, self._compute = server, open_order, compute
        self._folder, self._name, self._version = folder.absolute(), name, version
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End what is being done, give it back, and return from `run`. Async-signal-safe enough: takes no lock."""
        self._stopping.set()

    def run(self, on_event: Callable[[str], None]) -> None:
        """Until `stop`.

        Args:
            on_event: Called with a line for people.

        Raises:
            UnauthenticatedError: The server does not know the token.
            DeniedError: The token is not a worker's.
            InputError: The server has another version of Millrace.
        """
        pause_s = POLL_S
        while not self._stopping.is_set():
            order = None
            try:
                order = self._server.call("work.claim", {"worker": self._name, "version": self._version})
                if pause_s > POLL_S:
                    on_event("the server answers again")
                pause_s = POLL_S
            except UnavailableError as error:
                if pause_s <= POLL_S:
                    on_event(f"{error.message}; asking again")
                pause_s = min(pause_s * 2, MAX_POLL_S)
            if order is None:
                self._stopping.wait(pause_s * random.uniform(0.75, 1.25))
                continue
            on_event(f"step {order.work.name} of run {order.work.run_id[:8]}, attempt {order.attempt}")
            on_event(f"step {order.work.name}: {self._do(order)}")

    def _do(self, order: WorkOrder) -> str:
        place = self._folder / "works" / f"{order.id}-{order.attempt}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, mode=0o700)
        server, blobs = self._open_order(order, place)
        reporter = _Reporter(order, server)
        try:
            try:
                work = self._localized(order, place, blobs)
            except LOST as error:
                return f"lost: {error.message}"
            except MillraceError as error:  # its files cannot be had, or not be written
                return reporter.tell_end(WorkResult(state="failed", error=error.to_dict()))
            handle = self._compute.submit(work, reporter.take, order.secrets)
            return self._follow(handle, reporter)
        finally:
            server.close()
            shutil.rmtree(place, ignore_errors=True)

    def _localized(self, order: WorkOrder, place: Path, blobs: StepBlobs) -> Work:
        """The same work in folders of this machine. Checkpoints stay here, for a next attempt."""
        project = place / "project"
        if order.project_tree is not None:
            blobs.materialize(order.project_tree.digest, place / "tree")
            shutil.copytree(place / "tree", project, copy_function=shutil.copyfile)
        project.mkdir(exist_ok=True)
        scratch = self._folder / "steps" / Path(order.work.scratch_dir or order.id).name
        return msgspec.structs.replace(
            order.work, project_dir=str(project), home_dir=str(place), scratch_dir=str(scratch),
            log_path=str(place / "step.log"),
        )  # fmt: skip

    def _follow(self, handle: WorkHandle, reporter: _Reporter) -> str:
        while True:
            result = handle.wait(REPORT_S)
            if self._stopping.is_set():
                handle.cancel(STOP_GRACE_S)
            if result is not None:
                reporter.log_from(handle)
                return reporter.tell_end(result)
            reporter.log_from(handle)
            try:
                answer = reporter.report()
            except LOST as error:
                handle.cancel(0.0)
                handle.wait(STOP_GRACE_S)
                return f"lost: {error.message}"
            except UnavailableError as error:
                if reporter.is_silent_too_long():
                    handle.cancel(0.0)
                    handle.wait(STOP_GRACE_S)
                    return f"given up: {error.message}"
                continue
            if answer.cancel:
                handle.cancel(0.0 if answer.cancel == "now" else STOP_GRACE_S)


class _Reporter:
    """Frames that the server has not confirmed yet."""

    def __init__(self, order: WorkOrder, server: Transport) -> None:
        self._order, self._server = order, server
        self._lock = threading.Lock()
        self._frames: list[Frame | LogFrame] = []
        self._first = 0  # how many are confirmed
        self._log_offset = 0
        self._heard_at = time.monotonic()

    def take(self, frame: Frame) -> None:
        """A frame of the step. Beats are this reporter's own; the result comes last, by `tell_end`."""
        if not isinstance(frame, HeartbeatFrame | WorkResult):
            with self._lock:
                self._frames.append(frame)

    def log_from(self, handle: WorkHandle) -> None:
        """What the step has printed since."""
        data = handle.logs(self._log_offset)[:LOG_BYTES]
        if data:
            self._log_offset += len(data)
            with self._lock:
                self._frames.append(LogFrame(data=data))

    def is_silent_too_long(self) -> bool:
        """Whether the driver must have given this work to another worker."""
        return time.monotonic() - self._heard_at > self._order.silence_s

    def report(self) -> ReportAnswer:
        """One report: the oldest frames, or only that this worker lives.

        Raises:
            ConflictError: Another worker has the work.
            UnavailableError: The server cannot be reached.
        """
        with self._lock:
            frames = self._frames[:FRAMES]
        answer: ReportAnswer = self._server.call(
            "work.report",
            {"work": self._order.id, "attempt": self._order.attempt, "first": self._first, "frames": frames},
        )
        with self._lock:
            del self._frames[: answer.received - self._first]
            self._first = answer.received
        self._heard_at = time.monotonic()
        return answer

    def tell_end(self, result: WorkResult) -> str:
        """All that is left, the result last; however long the server takes to come back, up to the silence."""
        with self._lock:
            self._frames.append(result)
        while True:
            try:
                while self._frames:
                    self.report()
            except UnavailableError as error:
                if self.is_silent_too_long():
                    return f"given up: {error.message}"
                time.sleep(POLL_S)
            except LOST as error:
                # The answer to the last report may be what was lost: then the work has ended and its token too.
                return f"lost: {error.message}"
            except MillraceError as error:
                return f"not told: {error.message}"
            else:
                return result.state
