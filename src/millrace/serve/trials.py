"""Measures a race's cells with sessions of their own, until somebody asks for the processors."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from millrace.core.errors import CapacityError, MillraceError
from millrace.core.ports import Runtime
from millrace.formats.signature import Signature
from millrace.serve.calibrate import Infer, Tensors, repeated
from millrace.serve.dataplane import CheckedInfer
from millrace.serve.layouts import Layout, free_bytes
from millrace.serve.racing import Cell, Race

NICENESS = 10  # not 19: on a busy machine whoever holds the interpreter must get a turn before long
LEAST_S = 0.02  # of calls are timed at least, so that quick ones are timed often
MOST_CALLS = 20
TRIES = 3
WITH_OTHERS = 0.6  # of the share, where the calling thread also waits for others of its call
MEMORY_SHARE = 0.25  # of the free memory that one more session may take
_log = logging.getLogger(__name__)


@runtime_checkable
class SupportsLayouts(Runtime, Protocol):
    """A runtime whose model can be opened with other threads."""

    @property
    def threads(self) -> int:
        """Threads inside one call of the first session."""
        ...

    @property
    def is_fixed(self) -> bool:
        """The user gave the threads: nothing else is tried."""
        ...

    @property
    def layout_key(self) -> str:
        """What a calibration of it is kept by, besides the machine."""
        ...

    @property
    def size_bytes(self) -> int:
        """About what a further session of it takes."""
        ...

    def reopened(self, threads: int, is_spinning: bool = False) -> Runtime:
        """The same model in a session of its own."""
        ...


class Sessions:
    """The sessions of one model by threads and spinning; the first one is the runtime itself, with one thread.

    Args:
        runtime: Loaded.
        signature: What it reads.
    """

    def __init__(self, runtime: SupportsLayouts, signature: Signature) -> None:
        self._runtime, self._signature = runtime, signature
        self._opened: dict[tuple[int, bool], tuple[Runtime, Infer]] = {
            (1, False): (runtime, CheckedInfer(runtime, signature))
        }

    def infer(self, layout: Layout) -> Infer:
        """A layout's calls; opens a session where there is none yet.

        Raises:
            CapacityError: There is too little memory for one more.
            CorruptError: With so many threads the golden answers differ.
        """
        key = (layout.threads, layout.is_spinning)
        if key not in self._opened:
            size, free = self._runtime.size_bytes, free_bytes()
            if size > free * MEMORY_SHARE:
                raise CapacityError(f"{layout} wants about {size >> 20} MiB more, and {free >> 20} MiB are free")
            opened = self._runtime.reopened(layout.threads, layout.is_spinning)
            self._opened[key] = (opened, CheckedInfer(opened, self._signature))
        return self._opened[key][1]

    def close(self) -> None:
        """Free all but the first; calls that run keep theirs until they end."""
        for key in [key for key in self._opened if key != (1, False)]:
            self._opened.pop(key)[0].unload()


class Trial:
    """Runs a race; the sessions live as long as `run`.

    Args:
        runtime: Loaded, with one thread.
        signature: What it reads.
        sample: A right row.
        is_disturbed: Asked between any two calls: whether to stop at once.
        least_share: Of a processor that the calling thread must have had, or others wanted it: that is a
            disturbance too.
    """

    def __init__(
        self, runtime: SupportsLayouts, signature: Signature, sample: Mapping[str, np.ndarray],
        is_disturbed: Callable[[], bool] = lambda: False, least_share: float = 0.0,
    ) -> None:  # fmt: skip
        self._runtime, self._signature, self._sample = runtime, signature, sample
        self._is_disturbed, self._least_share = is_disturbed, least_share

    def run(self, race: Race) -> bool:
        """Measure until it is decided: True; or until disturbed: False, to be run again some time.

        A layout that cannot be opened or fails drops out; the first one is in use and never does.
        """
        sessions = Sessions(self._runtime, self._signature)
        try:
            while (cell := race.next) is not None:
                if self._is_disturbed():
                    return False
                begin = time.perf_counter()
                try:
                    row_s = self._tried(sessions.infer(cell.layout), cell)
                except MillraceError as error:
                    if cell.layout == Layout():
                        raise
                    _log.info("not used: %s: %s", cell.layout, error.message)
                    race.drop(cell.layout)
                    continue
                if row_s is None:
                    return False
                race.tell(cell, row_s, time.perf_counter() - begin)
            return True
        finally:
            sessions.close()

    def _tried(self, infer: Infer, cell: Cell) -> float | None:
        """As `_row_s`; where others had the processors for a moment, once more."""
        for _ in range(TRIES):
            if (row_s := self._row_s(infer, cell)) is not None or self._is_disturbed():
                return row_s
        return None

    def _row_s(self, infer: Infer, cell: Cell) -> float | None:
        """Seconds per row, all callers together; None when disturbed: what was timed counts for nothing."""
        tensors = repeated(self._sample, cell.rows)
        start = time.perf_counter()
        infer(tensors)  # the first call of a shape allocates
        calls = max(2, min(MOST_CALLS, int(LEAST_S / max(1e-6, time.perf_counter() - start))))
        callers = cell.layout.callers
        if callers == 1:
            took_s = self._time_calls(infer, tensors, calls, cell.layout)
            return None if took_s is None else min(took_s) / cell.rows
        barrier = threading.Barrier(callers)

        def call() -> tuple[float, float] | None:
            barrier.wait()
            begin = time.perf_counter()
            done = self._time_calls(infer, tensors, calls, cell.layout)
            return None if done is None else (begin, time.perf_counter())

        with ThreadPoolExecutor(callers) as pool:
            spans = [span for span in pool.map(lambda _: call(), range(callers)) if span is not None]
        if len(spans) < callers:
            return None
        wall_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return wall_s / (calls * callers * cell.rows)

    def _time_calls(self, infer: Infer, tensors: Tensors, calls: int, layout: Layout) -> list[float] | None:
        took_s: list[float] = []
        begin_cpu_s = time.thread_time()
        for _ in range(calls):
            if self._is_disturbed():
                return None
            start = time.perf_counter()
            infer(tensors)
            took_s.append(time.perf_counter() - start)
        share = (time.thread_time() - begin_cpu_s) / sum(took_s)
        least = self._least_share if layout.threads == 1 else self._least_share * WITH_OTHERS
        return took_s if share >= least else None


def step_back() -> None:
    """Give this thread, and those that it starts, a lower priority, where the system can."""
    if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except OSError as error:
            _log.info("calibration runs at the usual priority: %s", error)
