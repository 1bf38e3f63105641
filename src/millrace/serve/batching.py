"""Greedy batching without a wait: what has come in while the model was busy is the next batch."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from millrace.core.errors import MillraceError
from millrace.core.types import Struct

INLINE_LIMIT_S = 200e-6  # a call of one row quicker than this runs on the event loop
TICK_LIMIT_S = 2e-3  # a batch predicted to take longer never does: it would hold up every connection
CHEAP_ENOUGH = 0.05  # a batch is large enough when a row costs at most so much more than at the best size
YIELD_AFTER_S = 5e-3  # the loop gets its turn between inline batches after so long
# what a runtime may raise for an input: one batch fails, never the server
RUN_ERRORS = (MillraceError, ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


Tensors = dict[str, np.ndarray]


class Infer(Protocol):
    """Outputs by name for tensors by name."""

    def __call__(self, tensors: Mapping[str, np.ndarray], /) -> Tensors: ...


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

    __slots__ = ("answers", "blob", "json", "tensors")

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors
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
    """

    __slots__ = (
        "_tensors",
        "data",
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


class Cost(Struct, frozen=True, kw_only=True):
    """How long a call takes: `base_s` + rows x `per_row_s`, measured; and where a row is cheapest.

    `best_rows`: larger calls are no cheaper per row, so nobody is kept waiting for them.

    Example:
        >>> round(Cost(base_s=1e-5, per_row_s=1e-6).predict_s(10), 9)
        2e-05
    """

    base_s: float
    per_row_s: float
    best_rows: int | None = None

    def predict_s(self, rows: int) -> float:
        """Seconds for a call of so many rows."""
        return self.base_s + rows * self.per_row_s

    @property
    def is_inline(self) -> bool:
        """Whether one row is quicker than handing it to a thread would be worth."""
        return self.predict_s(1) < INLINE_LIMIT_S


def calibrate(infer: Infer, sample: Mapping[str, np.ndarray], max_batch: int, budget_s: float = 0.15) -> Cost:
    """Time calls of 1 row and, where that is quick, of 2, 4, 8 … `max_batch` rows.

    Args:
        infer: The model.
        sample: Real tensors of at least one row.
        max_batch: Rows of the largest call.
        budget_s: For all repetitions together.

    Returns:
        The line through the quickest calls of one row and of the best size: noise only ever adds. A slow
        model is taken to cost as much per row: being ready matters more than knowing better.

    Raises:
        MillraceError: The model failed.
    """
    sizes = [1, *(2**power for power in range(1, max_batch.bit_length()) if 2**power < max_batch), max_batch]
    quickest_s: dict[int, float] = {}
    for size in dict.fromkeys(sizes):
        tensors = {name: np.repeat(values[:1], size, axis=0) for name, values in sample.items()}
        quickest_s[size] = _quickest(infer, tensors, budget_s / len(sizes))
        if quickest_s[size] > TICK_LIMIT_S:
            break
    single_s = quickest_s[1]
    if len(quickest_s) == 1:
        return Cost(base_s=0.0, per_row_s=single_s, best_rows=None if single_s > TICK_LIMIT_S else 1)
    cheapest_s = min(took_s / size for size, took_s in quickest_s.items())
    best = next(size for size, took_s in quickest_s.items() if took_s / size <= cheapest_s * (1 + CHEAP_ENOUGH))
    reach = max(best, 2)
    per_row_s = max(0.0, (quickest_s[reach] - single_s) / (reach - 1))
    return Cost(base_s=max(0.0, single_s - per_row_s), per_row_s=per_row_s, best_rows=best)


def _quickest(infer: Infer, tensors: Mapping[str, np.ndarray], budget_s: float) -> float:
    begin = time.perf_counter()
    infer(tensors)  # the first call of a shape allocates
    quickest = time.perf_counter() - begin
    if quickest > budget_s:
        return quickest
    for _ in range(30):
        start = time.perf_counter()
        infer(tensors)
        end = time.perf_counter()
        quickest = min(quickest, end - start)
        if end - begin > budget_s:
            break
    return quickest


def _rows_within(cost: Cost, limit_s: float) -> int:
    """The most rows whose call is predicted to take no longer; a row that is itself slower still runs."""
    if cost.per_row_s <= 0:
        return sys.maxsize
    return max(1, int((limit_s - cost.base_s) / cost.per_row_s))


class Batcher:
    """Collects jobs into batches and runs them, inline or on runner threads.

    Inline: the jobs of one tick of the loop are one batch, run by a callback of the same loop, without
    a lock or a hand-off. Otherwise runner threads take whatever is queued when they are free. Nobody
    ever waits for a batch to fill. `submit` and every `done` belong to the event loop's thread.

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
        self._infer = infer
        self._inline_rows = _rows_within(cost, TICK_LIMIT_S) if self.is_inline else 0  # of a job that runs on the loop
        self._call_soon = call_soon
        self._call_from_thread = call_from_thread
        self._runners = runners
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
            batch = _take(queue, limit)
            if batch:
                self.finish(batch, self._execute(batch))
            if queue and time.perf_counter() - start > YIELD_AFTER_S:
                self._is_scheduled = True
                self._call_soon(self._flush)
                return

    # ------------------------------------------------------------------ threads

    def _hand_over(self, job: Job) -> None:
        with self._ready:
            self._thread_queue.append(job)
            if len(self._threads) < self._runners:
                name = f"runner-{len(self._threads)}"
                thread = threading.Thread(target=self._run_forever, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._ready.notify()

    def _run_forever(self) -> None:
        while True:
            with self._ready:
                while not self._thread_queue and not self._is_closed:
                    self._ready.wait()
                if not self._thread_queue:
                    return
                batch = _take(self._thread_queue, self.max_batch)
            if batch:
                calls = self._execute(batch)
                try:
                    self._call_from_thread(self.finish, batch, calls)
                except RuntimeError:
                    return  # the loop is closed: the drain's time was up

    # ------------------------------------------------------------------ one batch

    def _execute(self, batch: list[Job]) -> list[Call]:
        """Run a batch; when it fails, each of its jobs alone, so that only the guilty one fails."""
        start_ns = time.perf_counter_ns()
        try:
            tensors = _join(batch)
            outputs = self._infer(tensors) if batch[-1].rows <= self.max_batch else self._run_slices(tensors)
            _share_out(batch, outputs)
        except RUN_ERRORS as error:
            if len(batch) == 1:
                batch[0].error = error
                return []
            return [call for job in batch for call in self._execute([job])]
        return [Call(tensors, outputs, batch, start_ns, time.perf_counter_ns())]

    def _run_slices(self, tensors: Mapping[str, np.ndarray]) -> Tensors:
        rows = len(next(iter(tensors.values())))
        parts = [
            self._infer({name: values[start : start + self.max_batch] for name, values in tensors.items()})
            for start in range(0, rows, self.max_batch)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Call(NamedTuple):
    """A call of the model that succeeded."""

    tensors: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    jobs: Sequence[Job]
    start_ns: int
    end_ns: int


def _take(queue: deque[Job], limit: int) -> list[Job]:
    """Jobs from the front up to `limit` rows; at least one, without those that were cancelled."""
    batch: list[Job] = []
    rows = 0
    while queue:
        job = queue[0]
        if batch and rows + job.rows > limit:
            break
        queue.popleft()
        if not job.is_cancelled:
            batch.append(job)
            rows += job.rows
    return batch


def _join(batch: list[Job]) -> Tensors:
    first = batch[0]
    if len(batch) == 1:
        return first.tensors
    if first.packing is not None:
        parts = [job.data for job in batch if job.data is not None]
        if len(parts) == len(batch):
            return first.packing.tensors(b"".join(parts))
    return {name: np.concatenate([job.tensors[name] for job in batch]) for name in first.tensors}


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
