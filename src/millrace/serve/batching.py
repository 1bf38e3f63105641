"""Greedy batching without a wait: what has come in while the model was busy is the next batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from millrace.core.errors import DeadlineError
from millrace.core.types import Struct
from millrace.serve.calibrate import TICK_LIMIT_S, Cost, Infer, Tensors, calibrate
from millrace.serve.clients import Client
from millrace.serve.layouts import Plan, Switch

__all__ = ["Batcher", "Call", "Cost", "Infer", "Job", "Outputs", "Packing", "Tensors", "calibrate", "finish_jobs"]
YIELD_AFTER_S = 5e-3  # the loop gets its turn between inline batches after so long
RUN_ERRORS = (Exception,)  # what a runtime may raise for an input: one batch fails, never the server


class Packing(Struct, frozen=True):
    """A model's only input where it is float32 [rows, width]: jobs bring its bytes, a batch is the bytes joined.

    Example:
        >>> Packing(name="x", width=2, row_bytes=8).tensors(bytes(16))["x"].shape
        (2, 2)
    """

    name: str
    width: int
    row_bytes: int

    def tensors(self, data: bytes) -> Tensors:
        """Whole rows of bytes as the tensor that they are."""
        return {self.name: np.frombuffer(data, dtype=np.float32).reshape(-1, self.width)}


class Outputs:
    """What one call answered, shared by its jobs.

    The other attributes are forms of all its rows, made when the first job wants one and cut for each.

    Args:
        tensors: Outputs by name; the first dimension is the row.
    """

    __slots__ = ("answers", "blob", "end_ns", "json", "start_ns", "tensors")

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.start_ns = self.end_ns = 0  # of the call, on `time.perf_counter_ns`; 0: there was none
        self.blob: bytes | None = None  # of the only output
        self.json: list[bytes] | None = None  # each row of the only output
        self.answers: list[Any] | None = None


class Job:
    """One request in the queue: its rows, then its share of the outputs or its error.

    A transport derives its own, with what it needs to answer. `done` is called once on the event loop,
    never for a cancelled job.

    Args:
        tensors: Inputs by name; the first dimension is the row. None: `data` stands for them.
        size_bytes: Of the request, for the queue's bound.
        packing: What `data` is.
        data: Whole rows, at least one.

    `deadline_ns`: on `time.perf_counter_ns`, what cannot be answered by then is not begun; 0: none.
    `digest`: of its tensors, where answers are kept; empty: not to be kept.
    `client`: who asks, where that matters.
    """

    __slots__ = (
        "_tensors",
        "client",
        "data",
        "deadline_ns",
        "digest",
        "enqueued_ns",
        "error",
        "is_cancelled",
        "is_done",
        "packing",
        "rows",
        "shared",
        "size_bytes",
        "start",
    )

    def __init__(
        self, tensors: Tensors | None, size_bytes: int = 0, packing: Packing | None = None, data: bytes | None = None
    ) -> None:
        self._tensors = tensors
        self.size_bytes = size_bytes
        self.packing = packing
        self.data = data
        if packing is not None and data is not None:
            self.rows = len(data) // packing.row_bytes
        elif tensors:
            self.rows = len(next(iter(tensors.values())))
        self.shared: Outputs  # set by the call that succeeds, with
        self.start: int  # its first row in them
        self.error: Exception | None = None
        self.is_cancelled = False
        self.is_done = False
        self.enqueued_ns = 0
        self.deadline_ns = 0
        self.client: Client | None = None
        self.digest = b""

    @property
    def tensors(self) -> Tensors:
        """Inputs by name."""
        if self._tensors is None:
            assert self.packing is not None
            assert self.data is not None
            self._tensors = self.packing.tensors(self.data)
        return self._tensors

    @property
    def outputs(self) -> Tensors:
        """Outputs by name: its own rows; only when there is no error."""
        end = self.start + self.rows
        return {name: values[self.start : end] for name, values in self.shared.tensors.items()}

    def done(self) -> None:
        """`outputs` or `error` is set."""
        raise NotImplementedError  # pragma: no cover - every transport has its own


class Batcher:
    """Collects jobs into batches and runs them, inline or on runner threads.

    Inline: the jobs of one tick of the loop are one batch, run by a callback of the same loop, without
    a lock or a hand-off. Otherwise runner threads take whatever is queued when they are free, in the layout
    that suits the queue's depth. Nobody ever waits for a batch to fill. `submit`, `adopt` and every `done`
    belong to the event loop's thread.

    Args:
        infer: The model; called from runner threads unless inline.
        cost: The calibration.
        max_batch: Rows in one call at most, lowered to where a row is cheapest; a larger request runs in
            slices.
        call_soon: The loop's `call_soon`.
        call_from_thread: The loop's `call_soon_threadsafe`.
        runners: Threads.
    """

    def __init__(
        self,
        infer: Infer,
        cost: Cost,
        max_batch: int,
        call_soon: Callable[..., Any],
        call_from_thread: Callable[..., Any],
        runners: int = 1,
    ) -> None:
        self.cost = cost
        self.max_batch = min(max_batch, cost.best_rows or max_batch)
        self.is_inline = cost.is_inline
        self.finish: Callable[[list[Job], list[Call]], None] = finish_jobs  # on the loop, after each batch
        self._plan = Plan(infer, cost, self.max_batch, runners)
        self._switch = Switch(self._plan, self._plan)
        self._inline_rows = cost.rows_within(TICK_LIMIT_S) if self.is_inline else 0  # of a job that runs on the loop
        self._call_soon = call_soon
        self._call_from_thread = call_from_thread
        self._busy = 0  # calls that runner threads are in
        self._queue: deque[Job] = deque()
        self._is_scheduled = False
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._ready = threading.Condition()
        self._thread_queue: deque[Job] = deque()

    def __len__(self) -> int:
        """Jobs that no call has taken yet."""
        return len(self._queue) + len(self._thread_queue)

    def submit(self, job: Job) -> None:
        """Queue a job; its `done` is called later, never from here."""
        job.enqueued_ns = time.perf_counter_ns()
        if job.rows > self._inline_rows:
            self._hand_over(job)
            return
        self._queue.append(job)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._call_soon(self._flush)

    def adopt(self, shallow: Plan, deep: Plan) -> None:
        """Make calls otherwise from now on; those that run go on, nothing that is queued is lost.

        Args:
            shallow: What answers one request soonest.
            deep: What answers the most in a second.
        """
        with self._ready:
            self.cost, self.max_batch = shallow.cost, deep.rows
            self._plan = deep
            self._switch = Switch(shallow, deep)
            if self.is_inline:
                self._inline_rows = deep.cost.rows_within(TICK_LIMIT_S)
            self._ready.notify_all()

    @property
    def is_deep(self) -> bool:
        """Whether the queue is so deep that calls follow the plan that answers the most."""
        return self._switch.is_deep

    def close(self, wait_s: float = 5.0) -> None:
        """Stop the threads once their queue is empty; a call that takes longer than `wait_s` is left behind."""
        with self._ready:
            self._is_closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join(wait_s)

    def _flush(self) -> None:
        self._is_scheduled = False
        start = time.perf_counter()
        queue = self._queue
        limit = min(self.max_batch, self._inline_rows)
        while queue:
            batch, late = _take(queue, limit, self.cost)
            if late:
                self.finish(late, [])
            if batch:
                self.finish(batch, self._execute(batch, self._plan))
            if queue and time.perf_counter() - start > YIELD_AFTER_S:
                self._is_scheduled = True
                self._call_soon(self._flush)
                return

    # ------------------------------------------------------------------ threads

    def _hand_over(self, job: Job) -> None:
        with self._ready:
            self._thread_queue.append(job)
            if len(self._threads) < self._switch.callers:
                name = f"runner-{len(self._threads)}"
                thread = threading.Thread(target=self._run_forever, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._ready.notify()

    def _run_forever(self) -> None:
        while True:
            taken = self._next_batch()
            if taken is None:
                return
            plan, batch, late = taken
            try:
                if late:
                    self._call_from_thread(self.finish, late, [])
                calls = self._execute(batch, plan) if batch else []
                with self._ready:
                    self._busy -= 1
                if batch:
                    self._call_from_thread(self.finish, batch, calls)
            except RuntimeError:
                return  # the loop is closed: the drain's time was up
            del taken, batch, late, calls  # not kept until the next one comes

    def _next_batch(self) -> tuple[Plan, list[Job], list[Job]] | None:
        """Wait for a turn, then take jobs for one call; None: it is over."""
        queue = self._thread_queue
        with self._ready:
            while True:
                was_deep = self._switch.is_deep
                plan = self._switch.next(len(queue), self._busy) if queue else None
                if plan is not None:
                    break
                if self._is_closed and not queue:
                    self._ready.notify_all()
                    return None
                self._ready.wait()
            if self._switch.is_deep and not was_deep:
                self._ready.notify_all()  # those that had no turn so far
            self._busy += 1
            return plan, *_take(queue, plan.limit(len(queue)), plan.cost)

    # ------------------------------------------------------------------ one batch

    def _execute(self, batch: list[Job], plan: Plan) -> list[Call]:
        """Run a batch; when it fails, each of its jobs alone, so that only the guilty one fails.

        Jobs whose rows differ in shape are never in one call.
        """
        start_ns = time.perf_counter_ns()
        try:
            tensors = _join(batch)
            joined_ns = time.perf_counter_ns()
            outputs = plan.infer(tensors) if batch[-1].rows <= plan.rows else _run_slices(tensors, plan)
            _share_out(batch, outputs)
        except RUN_ERRORS as error:
            if len(batch) == 1:
                batch[0].error = error
                return []
            return [call for part in _by_shape(batch) for call in self._execute(part, plan)]
        shared = batch[0].shared
        shared.start_ns, shared.end_ns = start_ns, time.perf_counter_ns()
        return [Call(tensors, outputs, batch, start_ns, shared.end_ns, joined_ns)]


class Call(NamedTuple):
    """A call of the model that succeeded."""

    tensors: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    jobs: Sequence[Job]
    start_ns: int
    end_ns: int
    joined_ns: int = 0  # when its jobs were put together


def _take(queue: deque[Job], limit: int, cost: Cost) -> tuple[list[Job], list[Job]]:
    """Jobs from the front up to `limit` rows, at least one, without those that were cancelled; and who is too late.

    Too late is whose deadline passes before a call of the rows up to its own is predicted to end.
    """
    batch: list[Job] = []
    late: list[Job] = []
    rows = now_ns = 0
    while queue:
        job = queue[0]
        if batch and rows + job.rows > limit:
            break
        queue.popleft()
        if job.is_cancelled:
            continue
        if job.deadline_ns:
            now_ns = now_ns or time.perf_counter_ns()
            if now_ns + cost.predict_s(rows + job.rows) * 1e9 > job.deadline_ns:
                waited = f"it waited {(now_ns - job.enqueued_ns) / 1e9:.3g} s"
                job.error = DeadlineError(f"the deadline would have passed before the answer: {waited}")
                late.append(job)
                continue
        batch.append(job)
        rows += job.rows
    return batch, late


def _join(batch: list[Job]) -> Tensors:
    first = batch[0]
    if len(batch) == 1:
        return first.tensors
    if first.packing is not None:
        parts = [job.data for job in batch if job.data is not None]
        if len(parts) == len(batch):
            return first.packing.tensors(b"".join(parts))
    return {name: np.concatenate([job.tensors[name] for job in batch]) for name in first.tensors}


def _by_shape(batch: list[Job]) -> list[list[Job]]:
    """Jobs whose rows have one shape together; where all have, each alone."""
    parts: dict[tuple[tuple[int, ...], ...], list[Job]] = {}
    for job in batch:
        parts.setdefault(tuple([values.shape[1:] for values in job.tensors.values()]), []).append(job)
    return list(parts.values()) if len(parts) > 1 else [[job] for job in batch]


def _run_slices(tensors: Mapping[str, np.ndarray], plan: Plan) -> Tensors:
    rows = len(next(iter(tensors.values())))
    parts = [
        plan.infer({name: values[start : start + plan.rows] for name, values in tensors.items()})
        for start in range(0, rows, plan.rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _share_out(batch: list[Job], outputs: Mapping[str, np.ndarray]) -> None:
    """Each job gets its rows.

    Raises:
        ValueError: An output has not one row per row of the input.
    """
    rows = sum([job.rows for job in batch])
    for name, values in outputs.items():
        if values.ndim == 0 or len(values) != rows:
            raise ValueError(f"output {name!r} has shape {list(values.shape)}: want {rows} rows")
    shared = Outputs(outputs)
    start = 0
    for job in batch:
        job.shared = shared
        job.start = start
        start += job.rows


def finish_jobs(batch: list[Job], calls: list[Call]) -> None:
    """Tell the jobs of a batch."""
    for job in batch:
        if not job.is_cancelled:
            job.is_done = True
            job.done()
