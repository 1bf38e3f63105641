"""Counters of the data plane and their Prometheus text."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from millrace.stats.latency import MAX_BIN, bins_of

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
    "millrace_queue_seconds": ("histogram", "How long a request waited for a call of the model."),
    "millrace_batch_seconds": ("histogram", "Putting the requests of one call together."),
    "millrace_compute_seconds": ("histogram", "One call of the model."),
    "millrace_serialize_seconds": ("histogram", "Writing the answers of what ended together."),
    "millrace_queue_requests": ("gauge", "Requests that wait or run now."),
    "millrace_late_total": ("counter", "Requests not begun, since their deadline would have passed before the answer."),
    "millrace_queue_limit": ("gauge", "Requests that may wait or run at once; more are refused."),
    "millrace_connections": ("gauge", "Open connections of the server."),
    "millrace_queue_predicted_seconds": ("gauge", "How long what waits or runs now is predicted to take."),
    "millrace_breaker_open": ("gauge", "1 while the model is not asked, since it only failed; else 0."),
    "millrace_cache_hits_total": ("counter", "Requests answered from the response cache."),
    "millrace_cache_misses_total": ("counter", "Requests that were looked for in the response cache in vain."),
    "millrace_cache_entries": ("gauge", "Answers in the response cache."),
    "millrace_cache_bytes": ("gauge", "What they take."),
    "millrace_captured_rows_total": ("counter", "Rows that were kept with their answers."),
    "millrace_capture_dropped_total": ("counter", "Rows that were to be kept and were not: no room, or a full disk."),
    "millrace_access_log_dropped_total": ("counter", "Lines of the access log that the disk did not take."),
    "millrace_ready": ("gauge", "1 when ready, 0 while starting or draining."),
}
SERVER_METRICS = frozenset({"millrace_connections", "millrace_access_log_dropped_total"})  # of no model
LATENCY_BOUNDS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STEP_BOUNDS_S = (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, *LATENCY_BOUNDS_S)
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FOLD_AT = 4096
_MOST_SIZES = 1024  # of batches that are told apart


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
        self.folded: Callable[[np.ndarray], None] | None = None  # gets the values too, in bulk

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
        self._count(values)

    def add_array(self, values: np.ndarray) -> None:
        """Count many values at once."""
        self._count(values.astype(np.float64))

    def _count(self, values: np.ndarray) -> None:
        if self.folded is not None and len(values):
            self.folded(values)
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
        self.queue = BucketCounts(STEP_BOUNDS_S)
        self.batch = BucketCounts(STEP_BOUNDS_S)
        self.compute = BucketCounts(STEP_BOUNDS_S)
        self.serialize = BucketCounts(STEP_BOUNDS_S)
        self._rows = 0
        self._batches: Counter[int] = Counter()  # calls by rows
        self._batch_ns: Counter[int] = Counter()  # time in the model by rows
        self._last_end_ns = 0
        self._pending: list[tuple[int, int, int, int, int]] = []  # calls, folded in bulk
        self._waits_ns: list[int] = []
        self.hits = self.misses = 0  # of the response cache
        self.hit_ns = self.miss_ns = 0  # looking them up
        self.failures = 0
        self.late = 0  # requests that were not begun, for their deadline
        self.mirrored: dict[str, float] = {}  # of a shadow: what became of the copies that it got
        self._bins = np.zeros(MAX_BIN + 1, dtype=np.int64)  # latencies, as `stats.latency.bins_of`
        self.latency.folded = self._count_bins

    def _count_bins(self, latencies_s: np.ndarray) -> None:
        self._bins += np.bincount(bins_of(latencies_s), minlength=MAX_BIN + 1)

    def take_bins(self) -> dict[int, int]:
        """Latencies by bin since the last `take_bins`."""
        taken = {int(place): int(self._bins[place]) for place in np.flatnonzero(self._bins)}
        self._bins[:] = 0
        return taken

    def observe_call(
        self, rows: int, waits_ns: list[int], start_ns: int, joined_ns: int, end_ns: int, serialize_ns: int
    ) -> None:
        """Count one call of the model.

        Args:
            rows: In it.
            waits_ns: How long each of its requests waited.
            start_ns: When the requests were begun to be put together, on `time.perf_counter_ns`.
            joined_ns: When the model was called.
            end_ns: When it had answered.
            serialize_ns: Writing the answers of all that ended together; -1 for all but one call of those.
        """
        self._waits_ns.extend(waits_ns)
        self._pending.append((rows, start_ns, joined_ns, end_ns, serialize_ns))
        if len(self._pending) >= _FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        if not self._pending:
            return
        calls = np.array(self._pending, dtype=np.int64)
        waits_ns = np.array(self._waits_ns, dtype=np.int64)
        self._pending.clear()
        self._waits_ns.clear()
        rows, start, joined, end, serialize = calls.T
        self._last_end_ns = int(end[-1])
        self._rows += int(rows.sum())
        self.queue.add_array(waits_ns * 1e-9)
        self.batch.add_array((joined - start) * 1e-9)
        self.compute.add_array((end - joined) * 1e-9)
        self.serialize.add_array(serialize[serialize >= 0] * 1e-9)
        self.batch_rows.add_array(rows)
        sizes, places, counts = np.unique(rows, return_inverse=True, return_counts=True)
        took_ns = np.bincount(places.reshape(-1), weights=end - joined)
        for size, count, total_ns in zip(sizes.tolist(), counts.tolist(), took_ns.tolist(), strict=True):
            if size in self._batches or len(self._batches) < _MOST_SIZES:
                self._batches[size] += count
                self._batch_ns[size] += int(total_ns)

    @property
    def rows(self) -> int:
        """That the model has answered."""
        self._fold()
        return self._rows

    @property
    def calls(self) -> int:
        """Of the model."""
        self._fold()
        return self.compute.total

    @property
    def batches(self) -> dict[int, tuple[int, int]]:
        """Calls by their rows, and the nanoseconds that they took together."""
        self._fold()
        return {rows: (count, self._batch_ns[rows]) for rows, count in self._batches.items()}

    @property
    def last_inference_ms(self) -> int:
        """When the last call ended, since 1970; 0: there was none."""
        self._fold()
        if not self._last_end_ns:
            return 0
        return (time.time_ns() - (time.perf_counter_ns() - self._last_end_ns)) // 1_000_000

    @property
    def split(self) -> dict[str, BucketCounts]:
        """Where the time of requests went: `queue`, `batch`, `compute`, `serialize`."""
        self._fold()
        return {"queue": self.queue, "batch": self.batch, "compute": self.compute, "serialize": self.serialize}

    def counters(self) -> dict[str, float]:
        """Growing numbers for the parent; a window is the difference of two of these."""
        counted: dict[str, float] = {
            "rows": self.rows,
            "calls": self.calls,
            "model_s": self.compute.sum,
            "queue_s": self.queue.sum,
            "latency_s": self.latency.sum,
            **self.mirrored,
        }
        for (route, status), count in self.requests.items():
            keys = [f"status_{status // 100}xx"]
            if route != "other" and status // 100 in (2, 5):
                keys.append("answered" if status < 300 else "failed")
            for key in keys:
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
            "millrace_cache_hits_total": self.hits,
            "millrace_cache_misses_total": self.misses,
            "millrace_late_total": self.late,
            **gauges,
        }
        buckets = {"millrace_request_seconds": self.latency, "millrace_batch_rows": self.batch_rows}
        buckets |= {f"millrace_{step}_seconds": counts for step, counts in self.split.items()}
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


def server_lines(answered: Mapping[int, int], connections: int, dropped: int = 0) -> str:
    """What no model answered, as Prometheus text.

    Args:
        answered: Requests by status.
        connections: Open ones.
        dropped: Lines of the access log that the disk did not take.

    Example:
        >>> server_lines({404: 2}, 1).splitlines()[2]
        'millrace_requests_total{model="",version="",route="other",code="404"} 2'
    """
    lines = _head_lines("millrace_requests_total")
    labels = 'model="",version="",route="other"'
    lines += [
        f'millrace_requests_total{{{labels},code="{status}"}} {count}' for status, count in sorted(answered.items())
    ]
    for name, value in (("millrace_connections", connections), ("millrace_access_log_dropped_total", dropped)):
        lines += [*_head_lines(name), f"{name} {value}"]
    return "\n".join(lines) + "\n"


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
