"""Logging from user code: `with millrace.track("name") as t: t.log_metric("loss", 0.1)`."""

from __future__ import annotations

import atexit
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from millrace.core.ports import Transport
from millrace.core.types import MetricPoint

FLUSH_POINTS = 512
FLUSH_S = 0.25


class Tracker:
    """A run of the user's own script. Thread-safe.

    Points reach the store in batches: at most a second of them is lost on kill -9, none on exit.
    """

    def __init__(self, transport: Transport, *, name: str, params: dict[str, Any], project: str) -> None:
        self._transport = transport
        run = transport.call("run.track", {"name": name, "params": params, "project": project})
        self.id: str = run.id
        self._points: list[MetricPoint] = []
        self._lock = threading.Lock()
        self._steps: dict[str, int] = {}
        self._stop = threading.Event()
        # A script that pauses logs nothing more by itself: what it logged must not wait for its next point.
        threading.Thread(target=self._flush_regularly, name="tracker", daemon=True).start()
        atexit.register(self.end)

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """One point.

        Args:
            name: The metric.
            value: A number; NaN and infinities are kept.
            step: Counts up by itself per metric when absent.
        """
        with self._lock:
            if step is None:
                step = self._steps.get(name, -1) + 1
            self._steps[name] = step
            self._points.append(MetricPoint(self.id, name, step, float(value), time.time()))
            is_full = len(self._points) >= FLUSH_POINTS
        if is_full:
            self.flush()

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Several points of one step."""
        for name, value in values.items():
            self.log_metric(name, value, step)

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters of the run; a name that exists is replaced."""
        self._transport.call("run.log", {"run": self.id, "params": params})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Tags of the run."""
        self._transport.call("run.log", {"run": self.id, "tags": tags})

    def log_artifact(self, path: str | Path, name: str | None = None, *, data_subject: str = "") -> str:
        """Keep a file or folder; its digest. With `data_subject`, `millrace keys erase` makes it unreadable."""
        body = {"run": self.id, "name": name or Path(path).name, "path": str(Path(path).absolute())}
        body |= {"data_subject": data_subject} if data_subject else {}
        return self._transport.call("run.artifact", body).outputs[body["name"]].digest

    def flush(self) -> None:
        """Hand the points over now."""
        with self._lock:
            points, self._points = self._points, []
        if points:
            self._transport.call("run.log", {"run": self.id, "points": points})

    def _flush_regularly(self) -> None:
        while not self._stop.wait(FLUSH_S):
            self.flush()

    def end(self, state: str = "succeeded", error: dict[str, Any] | None = None) -> None:
        """End the run; called by the `with` block and at exit."""
        if self._stop.is_set():
            return
        self._stop.set()
        self.flush()
        self._transport.call("run.end", {"run": self.id, "state": state, "error": error})
        atexit.unregister(self.end)
        close = getattr(self._transport, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            described = {
                "code": "stage.failed",
                "message": f"{type(error).__name__}: {error}",
                "hint": "",
                "details": {},
            }
            self.end("failed", described)

    def __repr__(self) -> str:
        return f"Tracker({self.id[:12]!r})"
