"""Finds out while nobody asks how a model is best called, keeps the result, and lets the plane go over to it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.core.errors import MillraceError
from millrace.formats.cpu import cpu_flags
from millrace.serve.calibrate import Cost
from millrace.serve.dataplane import DataPlane
from millrace.serve.layouts import Layout, Plan, cores, layouts_of
from millrace.serve.racing import BUDGET_S, Calibration, Race
from millrace.serve.trials import Sessions, SupportsLayouts, Trial, step_back

IDLE_S = 3.0
LEAST_SHARE = 0.8
YIELDED = 0.75  # of that share is enough the next time: on a machine that is always busy a rough measure is one too
LOWEST_SHARE = 0.3
HEAVY_S = 2e-3  # a call that takes so long is quicker by all processors, whatever the model
KEPT = 200
FAILED_PAUSE_S = 60.0
BUSY_PAUSE_S = 20.0  # other programs want the processors
_CPUINFO = Path("/proc/cpuinfo")
_log = logging.getLogger(__name__)


class Calibrations:
    """Calibrations that were measured earlier: a small JSON file each.

    Args:
        folder: Where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, runtime: SupportsLayouts, max_rows: int) -> Calibration | None:
        """What is known of this model on this machine; damaged files and impossible layouts are nothing."""
        if self._folder is None:
            return None
        try:
            found = msgspec.json.decode(self._path(self._folder, runtime, max_rows).read_bytes(), type=Calibration)
        except (OSError, msgspec.MsgspecError):
            return None
        if not _is_possible(found, max_rows):
            return None
        return msgspec.structs.replace(found, source="stored")

    def put(self, runtime: SupportsLayouts, max_rows: int, calibration: Calibration) -> None:
        """Keep one; a full disk costs only that."""
        if self._folder is None:
            return
        path = self._path(self._folder, runtime, max_rows)
        temp = ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, temp = tempfile.mkstemp(dir=self._folder, prefix=".new-")
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(calibration))
            os.replace(temp, path)
            self._forget(self._folder)
        except OSError as error:
            _log.warning("the calibration is not kept: %s", error)
            with contextlib.suppress(OSError):
                os.unlink(temp)

    def _path(self, folder: Path, runtime: SupportsLayouts, max_rows: int) -> Path:
        parts = [runtime.layout_key, processor(), cpu_flags(), cores(), max_rows]
        return folder / f"{hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]}.json"

    def _forget(self, folder: Path) -> None:
        files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[KEPT:]:
            path.unlink(missing_ok=True)


def processor() -> str:
    """The processor's name, or the machine's where it has none.

    Example:
        >>> processor() == processor() != ""
        True
    """
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_possible(found: Calibration, max_rows: int) -> bool:
    costs = (found.shallow_cost, found.deep_cost)
    numbers = [number for cost in costs for number in (cost.base_s, cost.per_row_s)]
    return (
        found.shallow.callers == 1
        and all(one.threads >= 1 and one.callers >= 1 for one in (found.shallow, found.deep))
        and all(one.threads * one.callers <= cores() for one in (found.shallow, found.deep))
        and all(math.isfinite(number) and number >= 0 for number in numbers)
        and 1 <= (found.deep_cost.best_rows or 1) <= max_rows
    )


def rows_of(cost: Cost, max_rows: int, slo_s: float | None) -> int:
    """Rows of a call at most: where a row is cheapest, and within half of the objective where there is one.

    The other half is for the wait: a request that comes when a call has just begun waits for that one first.

    Example:
        >>> cost = Cost(base_s=0.01, per_row_s=0.002, best_rows=32)
        >>> rows_of(cost, 64, None), rows_of(cost, 64, 0.1), rows_of(cost, 64, 0.001)
        (32, 20, 1)
    """
    rows = min(max_rows, cost.best_rows or max_rows)
    return rows if slo_s is None else min(rows, cost.rows_within(slo_s / 2))


class Tuner:
    """One plane's. `tick` and `stop` belong to the loop's thread; what takes time runs on threads of its own.

    Args:
        plane: Serves already, with the runtime's own session.
        runtime: Of the plane.
        sample: A right row.
        max_rows: Of a call.
        kept: Where results go.
        loop: Where requests are answered.
        slo_s: 99 of 100 requests are to be answered within that; None: there is no objective.
        idle_s: Nobody must have asked for so long.
        budget_s: Of all measurements.
        least_share: Of a processor that a measurement must have had, at first: while others keep the machine busy
            nothing is measured; where they always do, less is enough.
    """

    def __init__(
        self, plane: DataPlane, runtime: SupportsLayouts, sample: Mapping[str, np.ndarray], max_rows: int,
        kept: Calibrations, loop: asyncio.AbstractEventLoop, *, slo_s: float | None = None, idle_s: float = IDLE_S,
        budget_s: float = BUDGET_S, least_share: float = LEAST_SHARE,
    ) -> None:  # fmt: skip
        self._plane, self._runtime, self._sample = plane, runtime, sample
        self._max_rows, self._kept, self._slo_s = max_rows, kept, slo_s
        self._loop, self._idle_s, self._least_share = loop, idle_s, least_share
        layouts = [Layout()] if plane.batcher.is_inline else layouts_of(cores())
        self._race = Race(layouts, max_rows, budget_s)
        self._sessions = Sessions(runtime, plane.signature)
        self._seen = -1
        self._quiet_since_s = 0.0
        self._is_stopped = False
        self._thread: threading.Thread | None = None
        self.is_done = budget_s <= 0

    @property
    def is_running(self) -> bool:
        """Whether it measures, or opens what won."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def answered(self) -> int:
        """Requests so far; changes when somebody asks."""
        return self._plane.metrics.latency.total

    def adopt_stored(self, calibration: Calibration) -> None:
        """Go over to what was measured earlier, without measuring anything."""
        self.is_done = True
        self._start(self._go_over, calibration)

    def adopt_sound(self, cost: Cost) -> None:
        """Until a heavy model is measured: a lone call has all processors, of many each has one."""
        if cost.predict_s(1) >= HEAVY_S and cores() > 1:
            shallow, deep = Layout(threads=cores()), Layout(callers=cores())
            self._start(self._go_over, Calibration(shallow=shallow, deep=deep, shallow_cost=cost, deep_cost=cost))

    def tick(self, now_s: float, is_alone: bool) -> None:
        """Begin, or go on, when it has been quiet for long enough.

        Args:
            now_s: On `time.monotonic`.
            is_alone: No other model of this process answers or is measured.
        """
        busy = self._plane.admission.waiting > 0 or self.answered != self._seen or not is_alone
        if busy:
            self._seen = self.answered
            self._quiet_since_s = now_s
        elif not self.is_done and not self.is_running and now_s - self._quiet_since_s >= self._idle_s:
            self._start(self._measure)

    def stop(self, wait_s: float = 1.0) -> None:
        """No more measurements; frees what it opened. A call that takes longer is left behind."""
        self._is_stopped = self.is_done = True
        if self._thread is not None:
            self._thread.join(wait_s)
        self._sessions.close()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(target=work, args=arguments, name="tuner", daemon=True)
        self._thread.start()

    def _is_disturbed(self) -> bool:
        plane = self._plane
        return self._is_stopped or plane.admission.waiting > 0 or self.answered != self._seen

    def _measure(self) -> None:
        """On a thread of low priority."""
        step_back()
        trial = Trial(self._runtime, self._plane.signature, self._sample, self._is_disturbed, self._least_share)
        try:
            is_decided = trial.run(self._race)
        except MillraceError as error:
            if not self._is_stopped:
                _log.warning("calibration of %r failed: %s", self._plane.info.name, error.message)
                self._quiet_since_s = time.monotonic() + FAILED_PAUSE_S
            return
        if not is_decided and self._is_disturbed():
            self._quiet_since_s = time.monotonic()
        elif not is_decided:
            self._quiet_since_s = time.monotonic() + BUSY_PAUSE_S
            self._least_share = min(self._least_share, max(LOWEST_SHARE, self._least_share * YIELDED))
        elif not self._is_stopped:
            calibration = self._race.result()
            self._kept.put(self._runtime, self._max_rows, calibration)
            self._call_from_thread(self._decided, calibration)

    def _decided(self, calibration: Calibration) -> None:
        """On the loop, whose priority the threads of the sessions inherit."""
        if not self._is_stopped:
            self.is_done = True
            self._start(self._go_over, calibration)

    def _go_over(self, calibration: Calibration) -> None:
        try:
            deep, shallow = self._sessions.infer(calibration.deep), self._sessions.infer(calibration.shallow)
        except MillraceError as error:
            _log.warning("%r is served as before: %s", self._plane.info.name, error.message)
            return
        self._call_from_thread(
            adopt, self._plane, calibration,
            Plan(shallow, calibration.shallow_cost, self._rows(calibration.shallow_cost)),
            Plan(deep, calibration.deep_cost, self._rows(calibration.deep_cost), calibration.deep.callers),
        )  # fmt: skip
        _log.info("%r: alone %s, many %s", self._plane.info.name, calibration.shallow, calibration.deep)

    def _call_from_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _rows(self, cost: Cost) -> int:
        return rows_of(cost, self._max_rows, self._slo_s)


def adopt(plane: DataPlane, calibration: Calibration, shallow: Plan, deep: Plan) -> None:
    """Let a plane's calls follow these plans from now on; what waits and what runs is answered all the same."""
    plane.admission.seconds_per_row = deep.cost.predict_s(deep.rows) / deep.rows / deep.callers
    plane.batcher.adopt(shallow, deep)
    plane.calibration = calibration
