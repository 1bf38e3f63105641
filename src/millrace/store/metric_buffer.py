"""Metric points wait in memory for at most half a second and are written many at a time."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from millrace.core.errors import MillraceError
from millrace.core.types import MetricPoint
from millrace.store import tracking_sql
from millrace.store.database import Connection, within_int64
from millrace.store.tracking_sql import POINT_COLUMNS, Row, as_row

FLUSH_EVERY_S = 0.4
FLUSH_AT_POINTS = 50_000  # a producer that is quicker than the disk writes itself: memory stays bounded
log = logging.getLogger(__name__)


class MetricBuffer:
    """Collects points from any thread; `flush_now` (given) writes them in a transaction.

    A flush that fails keeps the points and is tried again; meanwhile `append` raises its error, so that
    a full disk is seen by whoever logs and not only by a thread.
    """

    def __init__(self, flush_now: Callable[[], None]) -> None:
        self._flush_now = flush_now
        self._rows: list[Row] = []
        self._lock = threading.Lock()
        self._failure: MillraceError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def append(self, points: Sequence[MetricPoint]) -> None:
        """Take points; they are in a file at most one second later.

        Raises:
            InputError: A point has a name that is no text, or a step or value that is no number.
            MillraceError: The last flush failed; the points of this call were not taken.
        """
        rows = [as_row(point) for point in points]  # a bad point must fail here, not in the flush of all
        failure = self._failure
        if failure is not None:
            raise type(failure)(failure.message, hint=failure.hint, details=failure.details)
        with self._lock:
            self._rows += rows
            waiting = len(self._rows)
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="millrace-metrics", daemon=True)
                self._thread.start()
        if waiting >= FLUSH_AT_POINTS:
            self._flush_now()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._rows

    def write(self, connection: Connection) -> list[Row]:
        """Write what waits inside the connection's transaction; give the rows to `restore` if it fails."""
        with self._lock:
            rows, self._rows = self._rows, []
        if rows:
            try:
                tracking_sql.insert_points(connection, rows)
            except BaseException:
                self.restore(rows)
                raise
        return rows

    def restore(self, rows: list[Row]) -> None:
        """Put rows of a transaction that did not commit back in front."""
        if rows:
            with self._lock:
                self._rows = rows + self._rows

    def stop(self) -> None:
        """End the thread. What waits is the caller's to flush."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_EVERY_S):
            try:
                self._flush_now()  # does nothing when nothing waits, as after a transaction that took it along
            except MillraceError as error:
                if self._failure is None:
                    log.warning("metric points wait in memory: %s", error.message)
                self._failure = error
            else:
                self._failure = None


def read(connection: Connection, run_id: str, name: str | None, since: int, limit: int) -> list[MetricPoint]:
    """A run's points in the order of arrival; see `core.ports.Records.metrics`."""
    sql = f"SELECT {', '.join(POINT_COLUMNS)} FROM metrics WHERE run_id = ?"
    values: list[Any] = [run_id]
    if name is not None:
        sql += " AND name = ?"
        values.append(name)
    rows = connection.execute(
        sql + " ORDER BY id LIMIT ? OFFSET ?", [*values, within_int64(limit), within_int64(max(since, 0))]
    ).fetchall()
    return [
        MetricPoint(run, series, step, math.nan if value is None else value, at)
        for run, series, step, value, at in rows
    ]
