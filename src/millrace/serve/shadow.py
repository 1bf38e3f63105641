"""A shadow gets copies of the requests that others have answered, and its answers are compared with theirs."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from millrace.formats.signature import Signature
from millrace.serve.batching import RUN_ERRORS, Call
from millrace.serve.dataplane import DataPlane
from millrace.serve.layouts import cores
from millrace.serve.revisions import Revision

MAX_CALLS = 64  # that wait; what comes then is dropped
MAX_BYTES = 16 << 20
DUTY, LONE_DUTY = 0.1, 0.005  # the share of the time that its thread works; where there is only one processor
LOOK_S = 2e-3  # between looks at whether somebody still waits for an answer
PATIENCE_S = 1.0  # where somebody always does, a copy a second runs all the same
TOLERANCE = 1e-3  # relative; two numbers closer than that are the same answer
MIRRORED = ("mirrored_rows", "mirrored_changed", "mirrored_max_difference", "mirrored_dropped", "mirrored_failed")


class Shadow:
    """Runs copies on a thread of its own that rests for most of the time: whoever answers is never held up.

    `take` belongs to the event loop's thread, and costs an append; what no longer fits is dropped.

    Args:
        plane: The candidate; what became of the copies is counted in its metrics.
    """

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._counted = plane.metrics.mirrored = dict.fromkeys(MIRRORED, 0.0)
        self.answering: list[DataPlane] = []  # while a request of theirs waits, copies do
        self._calls: deque[tuple[Call, int]] = deque()
        self._bytes = 0  # waiting; of the loop's thread
        self._done_bytes = 0  # no longer waiting; of this thread
        self._came, self._closed = threading.Event(), threading.Event()
        self._rest = 1 / (DUTY if cores() > 1 else LONE_DUTY) - 1  # after so many times as long as it worked
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()
        plane.closing = self.close

    def take(self, call: Call) -> None:
        """Queue a copy of an answered call, or drop it."""
        size = sum([values.nbytes for values in call.tensors.values()])
        if len(self._calls) >= MAX_CALLS or self._bytes - self._done_bytes + size > MAX_BYTES:
            self._counted["mirrored_dropped"] += _rows_of(call)
            return
        self._bytes += size
        self._calls.append((call, size))
        if not self._came.is_set():
            self._came.set()

    def stop(self) -> None:
        """Stop soon; what waits is forgotten."""
        self._closed.set()
        self._came.set()

    def close(self) -> None:
        """Stop, and wait for the call that runs."""
        self.stop()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._came.wait()
            self._came.clear()
            while self._calls and not self._closed.is_set():
                self._let_pass()
                began = time.perf_counter()
                call, size = self._calls.popleft()
                self._compare(call)
                self._done_bytes += size
                self._closed.wait((time.perf_counter() - began) * self._rest)

    def _let_pass(self) -> None:
        """Who waits for an answer comes first. A low priority would not do: a thread that the kernel sets aside
        while it holds the interpreter's lock holds up everybody."""
        until = time.monotonic() + PATIENCE_S
        while any(plane.admission.waiting for plane in self.answering) and time.monotonic() < until:
            if self._closed.wait(LOOK_S):
                return

    def _compare(self, call: Call) -> None:
        counted, rows = self._counted, _rows_of(call)
        try:
            outputs = self._plane.runtime.infer(call.tensors)
            changed, largest = compare(self._plane.signature, call.outputs, outputs)
        except RUN_ERRORS:  # of the candidate: it would have failed on this request
            counted["mirrored_failed"] += rows
            return
        counted["mirrored_rows"] += rows
        counted["mirrored_changed"] += changed
        counted["mirrored_max_difference"] = max(counted["mirrored_max_difference"], largest)


def _rows_of(call: Call) -> int:
    return len(next(iter(call.tensors.values())))


def compare(
    signature: Signature, answered: Mapping[str, np.ndarray], shadowed: Mapping[str, np.ndarray]
) -> tuple[int, float]:
    """How different a shadow's answers are.

    Args:
        signature: Probabilities are the same answer where the same class is the likeliest.
        answered: Outputs by name.
        shadowed: The shadow's, for the same rows.

    Returns:
        Rows with another answer, and the largest difference of two numbers.

    Raises:
        ValueError: The shadow has no such output, or another number of rows.
    """
    rows = len(next(iter(answered.values())))
    is_changed = np.zeros(rows, dtype=bool)
    largest = 0.0
    likeliest = {spec.name for spec in signature.outputs if spec.semantic == "probabilities"}
    for name, ours in answered.items():
        theirs = shadowed.get(name)
        if theirs is None or len(theirs) != rows:
            raise ValueError(f"output {name!r}: want {rows} rows")
        if theirs.shape != ours.shape:
            is_changed[:] = True
            continue
        if ours.dtype.kind == "f":
            difference = np.abs(ours.astype(np.float64) - theirs)
            is_finite = np.isfinite(difference)
            largest = max(largest, float(difference[is_finite].max(initial=0.0)))
        if name in likeliest and ours.ndim == 2 and ours.shape[1] > 1:
            is_changed |= ours.argmax(axis=1) != theirs.argmax(axis=1)
        elif ours.dtype.kind == "f":
            is_same = np.isclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
            is_changed |= ~is_same.reshape(rows, -1).all(axis=1)
        else:
            is_changed |= (ours != theirs).reshape(rows, math.prod(ours.shape[1:])).any(axis=1)
    return int(is_changed.sum()), largest


class Shadows:
    """The shadows among what a process has loaded. For the event loop's thread."""

    def __init__(self) -> None:
        self._running: WeakKeyDictionary[DataPlane, Shadow] = WeakKeyDictionary()

    def mirror(self, revisions: Sequence[Revision]) -> None:
        """Let the shadow among an endpoint's revisions, if there is one, have copies of what the others answer."""
        planes = [one.plane for one in revisions if one.is_shadow]
        shadow = None
        for one in revisions:
            if one.is_shadow and one.plane not in self._running:
                self._running[one.plane] = Shadow(one.plane)
            elif not one.is_shadow and one.plane in self._running:
                self._running.pop(one.plane).stop()  # it answers for itself now
        if planes:
            shadow = self._running[planes[0]]
            shadow.answering = [one.plane for one in revisions if not one.is_shadow]
        for one in revisions:
            answers = one.weight > 0 and not one.is_shadow
            one.plane.mirror = shadow.take if shadow is not None and answers else None
