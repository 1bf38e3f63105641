"""Counters of the data plane and their Prometheus text."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

METRICS: dict[str, tuple[str, str]] = {
    "millrace_requests_total": (
        "counter",
        "Answered requests by route and status code; of no model: with an empty one.",
    ),
    "millrace_denied_total": ("counter", "Requests refused for want of a token that may call the model."),
    "millrace_rows_total": ("counter", "Rows that the model has answered."),
    "millrace_calls_total": ("counter", "Calls of the model; rows / calls is the mean batch."),
    "millrace_request_seconds": ("histogram", "From a complete request to its answer, inference only."),
    "millrace_batch_rows": ("histogram", "Rows in one call of the model."),
    "millrace_model_seconds_total": ("counter", "Time inside the model."),
    "millrace_queue_seconds_total": ("counter", "Time that requests waited for the model."),
    "millrace_queue_requests": ("gauge", "Requests that wait or run now."),
    "millrace_queue_limit": ("gauge", "Requests that may wait or run at once; more are refused."),
    "millrace_connections": ("gauge", "Open connections of the server."),
    "millrace_ready": ("gauge", "1 when ready, 0 while starting or draining."),
}
SERVER_METRICS = frozenset({"millrace_connections"})  # of no model
LATENCY_BOUNDS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FOLD_AT = 4096


class BucketCounts:
    """Counts below fixed bounds, with the sum: a Prometheus histogram.

    Example:
        >>> counts = BucketCounts((1.0, 2.0))
        >>> for value in (0.5, 1.0, 5.0):
        ...     counts.add(value)
        >>> counts.cumulative(), counts.total, counts.sum
        ([2, 2], 3, 6.5)
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._pending: list[float] = []  # folded in bulk: an append costs a tenth of a search

    def add(self, value: float) -> None:
        """Count one value."""
        self._pending.append(value)
        if len(self._pending) >= _FOLD_AT:
            self._fold()

    def extend(self, values: Iterable[float]) -> None:
        """Count several."""
        self._pending.extend(values)
        if len(self._pending) >= _FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        values = np.array(self._pending, dtype=np.float64)
        self._pending.clear()
        places = np.searchsorted(self.bounds, values, side="left")
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(values.sum())

    def cumulative(self) -> list[int]:
        """How many values are at most each bound."""
        self._fold()
        return np.cumsum(self._counts)[:-1].tolist()

    @property
    def total(self) -> int:
        """How many values."""
        return int(self._counts.sum()) + len(self._pending)

    @property
    def sum(self) -> float:
        """Their sum."""
        self._fold()
        return self._sum

    def quantile(self, share: float) -> float:
        """The upper bound of the bucket in which a share of the values is reached; 0 when empty."""
        cumulative = self.cumulative()
        if not self.total:
            return 0.0
        place = bisect.bisect_left(cumulative, share * self.total)
        return float(self.bounds[min(place, len(self.bounds) - 1)])


class Metrics:
    """What the data plane counts. For the event loop's thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.latency = BucketCounts(LATENCY_BOUNDS_S)
        self.batch_rows = BucketCounts(BATCH_BOUNDS)
        self.batches: Counter[int] = Counter()  # rows → calls, for Triton's statistics; at most 1,024 sizes
        self.batch_ns: Counter[int] = Counter()
        self.rows = 0
        self.calls = 0
        self.model_ns = 0
        self.queue_ns = 0
        self.failures = 0
        self.last_inference_ms = 0  # since 1970

    def observe_call(self, rows: int, model_ns: int, queue_ns: int) -> None:
        """Count one call of the model."""
        self.rows += rows
        self.calls += 1
        self.model_ns += model_ns
        self.queue_ns += queue_ns
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.batch_rows.add(rows)
        if rows in self.batches or len(self.batches) < 1024:
            self.batches[rows] += 1
            self.batch_ns[rows] += model_ns

    def counters(self) -> dict[str, float]:
        """Growing numbers for the parent; a window is the difference of two of these."""
        counted: dict[str, float] = {
            "rows": self.rows,
            "calls": self.calls,
            "model_s": self.model_ns / 1e9,
            "queue_s": self.queue_ns / 1e9,
            "latency_s": self.latency.sum,
        }
        for (_, status), count in self.requests.items():
            key = f"status_{status // 100}xx"
            counted[key] = counted.get(key, 0) + count
        return counted

    def render(self, model: str, version: str, gauges: Mapping[str, float]) -> str:
        """Prometheus text, format 0.0.4.

        Args:
            model: Name for the label.
            version: Of the model.
            gauges: Metric name → value now.

        Example:
            >>> "millrace_rows_total{model=\\"digits\\",version=\\"1\\"} 0" in Metrics().render("digits", "1", {})
            True
        """
        labels = f'model="{_escaped(model)}",version="{_escaped(version)}"'
        values: dict[str, float] = {
            "millrace_rows_total": self.rows,
            "millrace_calls_total": self.calls,
            "millrace_model_seconds_total": self.model_ns / 1e9,
            "millrace_queue_seconds_total": self.queue_ns / 1e9,
            **gauges,
        }
        buckets = {"millrace_request_seconds": self.latency, "millrace_batch_rows": self.batch_rows}
        lines: list[str] = []
        for name in METRICS:
            if name in SERVER_METRICS:
                continue
            lines += _head_lines(name)
            if name == "millrace_requests_total":
                lines += [
                    f'{name}{{{labels},route="{route}",code="{status}"}} {count}'
                    for (route, status), count in sorted(self.requests.items())
                ]
            elif name in buckets:
                lines += _bucket_lines(name, labels, buckets[name])
            else:
                lines.append(f"{name}{{{labels}}} {values.get(name, 0):.10g}")
        return "\n".join(lines) + "\n"


def server_lines(answered: Mapping[int, int], connections: int) -> str:
    """What no model answered, as Prometheus text.

    Args:
        answered: Requests by status.
        connections: Open ones.

    Example:
        >>> server_lines({404: 2}, 1).splitlines()[2]
        'millrace_requests_total{model="",version="",route="other",code="404"} 2'
    """
    lines = _head_lines("millrace_requests_total")
    labels = 'model="",version="",route="other"'
    lines += [
        f'millrace_requests_total{{{labels},code="{status}"}} {count}' for status, count in sorted(answered.items())
    ]
    return "\n".join([*lines, *_head_lines("millrace_connections"), f"millrace_connections {connections}"]) + "\n"


def _head_lines(name: str) -> list[str]:
    kind, text = METRICS[name]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _bucket_lines(name: str, labels: str, counts: BucketCounts) -> list[str]:
    lines = [
        f'{name}_bucket{{{labels},le="{bound:g}"}} {count}'
        for bound, count in zip(counts.bounds, counts.cumulative(), strict=True)
    ]
    lines.append(f'{name}_bucket{{{labels},le="+Inf"}} {counts.total}')
    return [*lines, f"{name}_sum{{{labels}}} {counts.sum:.10g}", f"{name}_count{{{labels}}} {counts.total}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
