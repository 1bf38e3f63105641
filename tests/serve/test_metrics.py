"""Counters, their Prometheus text, and telemetry frames."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import CorruptError
from millrace.serve.metrics import METRICS, BucketCounts, Metrics
from millrace.serve.telemetry import (
    BUFFER_ROWS,
    Collector,
    FrameDecoder,
    TelemetryFrame,
    TelemetryWriter,
    read_frames,
)
from millrace.stats.histogram import Feature, Histograms, Layout

LINE = re.compile(r'^[a-z_]+(\{([a-z_]+="[^"\n]*",?)*\})? [0-9.e+-]+$')
LAYOUT = Layout(
    inputs=[Feature(name="a", kind="number", tensor="x", column=0, edges=[-1.0, 0.0, 1.0])],
    outputs=[Feature(name="prediction", kind="category", tensor="y", categories=["n", "y"])],
)


def test_every_metric_of_a_live_server_is_documented_and_well_formed(digits: Any) -> None:
    assert digits.call("POST", "/v1/models/digits:predict", {"instances": [[1.0] * 64]})[0] == 200
    status, text = digits.call("GET", "/metrics")
    assert status == 200
    seen = set()
    for line in text.splitlines():
        if line.startswith("#"):
            seen.add(line.split()[2])
        else:
            assert LINE.match(line), line
    assert seen == set(METRICS)
    assert 'millrace_ready{model="digits",version="3"} 1' in text
    assert re.search(r'millrace_requests_total\{model="digits",version="3",route="predict",code="200"\} [1-9]', text)


def test_the_counters_add_up(digits: Any) -> None:
    def read() -> dict[str, float]:
        _, text = digits.call("GET", "/metrics")
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}

    labels = 'model="digits",version="3"'
    before = read()
    for rows in (1, 3):
        digits.call("POST", "/v1/models/digits:predict", {"instances": [[1.0] * 64] * rows})
    digits.call("POST", "/v1/models/digits:predict", {"instances": []})
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown(f"millrace_rows_total{{{labels}}}") == 4
    assert grown(f"millrace_calls_total{{{labels}}}") == 2
    assert grown(f'millrace_requests_total{{{labels},route="predict",code="200"}}') == 2
    assert grown(f'millrace_requests_total{{{labels},route="predict",code="400"}}') == 1
    assert grown(f"millrace_request_seconds_count{{{labels}}}") == 2
    for step in ("queue", "batch", "compute", "serialize"):
        assert grown(f"millrace_{step}_seconds_count{{{labels}}}") == 2
        assert 0 < grown(f"millrace_{step}_seconds_sum{{{labels}}}") < 5
    assert grown(f'millrace_batch_rows_bucket{{{labels},le="1"}}') == 1
    assert grown(f'millrace_batch_rows_bucket{{{labels},le="4"}}') == 2


@given(st.lists(st.floats(0, 10, allow_nan=False), max_size=200))
def test_buckets_count_what_is_at_most_their_bound(values: list[float]) -> None:
    counts = BucketCounts((0.5, 1.0, 5.0))
    for value in values:
        counts.add(value)
    assert counts.cumulative() == [sum(value <= bound for value in values) for bound in counts.bounds]
    assert counts.total == len(values)
    assert counts.sum == pytest.approx(sum(values))


def test_labels_are_escaped() -> None:
    text = Metrics().render('a"b\\c\nd', "1", {})
    assert 'model="a\\"b\\\\c\\nd"' in text


def test_the_parent_can_add_the_windows_up(digits: Any) -> None:
    digits.call("POST", "/v1/models/digits:predict", {"instances": [[2.0] * 64] * 5})
    deadline = threading.Event()
    for _ in range(200):
        rows = sum(frame.rows for frame in digits.frames)
        _, text = digits.call("GET", "/metrics")
        total = float(re.search(r"millrace_rows_total\{[^}]*\} (\d+)", text).group(1))  # type: ignore[union-attr]
        if rows == total:
            break
        deadline.wait(0.02)
    assert rows == total > 0
    merged: Histograms | None = None
    for frame in digits.frames:
        if frame.histograms is not None:
            window = Histograms.from_dict(frame.histograms)
            merged = window if merged is None else merged
            if merged is not window:
                merged.merge(window)
    assert merged is not None
    assert merged.rows == total
    assert sum(frame.counters["rows"] for frame in digits.frames) == total


@given(st.lists(st.integers(1, BUFFER_ROWS), max_size=6))
def test_a_collector_counts_every_row_once(sizes: list[int]) -> None:
    collector, whole = Collector(LAYOUT), Histograms(LAYOUT)
    rng = np.random.default_rng(1)
    merged = Histograms(LAYOUT)
    for index, size in enumerate(sizes):
        tensors = {"x": rng.normal(size=(size, 1)).astype(np.float32)}
        outputs = {"y": rng.random((size, 2)).astype(np.float32)}
        collector.add(tensors, outputs)
        whole.add(tensors, outputs)
        if index % 2:
            merged.merge(collector.take())
    merged.merge(collector.take())
    assert merged.rows == whole.rows == sum(sizes)
    assert [counts.tolist() for counts in merged.counts] == [counts.tolist() for counts in whole.counts]
    assert collector.take().rows == 0


def test_a_collector_takes_rows_of_ever_new_shapes() -> None:
    collector = Collector(LAYOUT)
    for width in (1, 3, 2):
        row = {"x": np.full((2, width), 0.5, np.float32), "tokens": np.zeros((2, 7 * width), np.int64)}
        collector.add(row, {"y": np.full((2, 2), 0.5, np.float32), "scores": np.zeros((2, width), np.float32)})
    assert collector.take().rows == 6


@given(st.lists(st.integers(0, 10**6), max_size=8), st.integers(1, 40))
def test_frames_survive_any_cutting(rows: list[int], step: int) -> None:
    data = b""
    for count in rows:
        body = msgspec.msgpack.encode(TelemetryFrame(rows=count, counters={"rows": count}))
        data += len(body).to_bytes(4, "big") + body
    decoder = FrameDecoder()
    found = [frame.rows for start in range(0, len(data), step) for frame in decoder.feed(data[start : start + step])]
    assert found == rows


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\x03abc", b"\0\0\0\0"])
def test_bytes_that_are_no_frames(data: bytes) -> None:
    with pytest.raises(CorruptError, match="telemetry"):
        list(FrameDecoder().feed(data))


def test_a_writer_never_blocks_and_loses_nothing() -> None:
    read_fd, write_fd = os.pipe()
    writer = TelemetryWriter(write_fd)
    sent = 0
    big = {f"counter_{i}": float(i) for i in range(1000)}
    while writer.has_room:  # until the pipe is full
        writer.send(TelemetryFrame(rows=1, counters=big))
        sent += 1
    assert sent > 1
    writer.advance()
    assert not writer.has_room
    found: list[TelemetryFrame] = []
    reader = threading.Thread(target=lambda: found.extend(read_frames(read_fd)))
    reader.start()
    assert writer.flush()
    assert not writer.is_orphaned
    os.close(write_fd)
    reader.join(10)
    assert len(found) == sent
    os.close(read_fd)


def test_a_writer_notices_that_its_parent_is_gone() -> None:
    read_fd, write_fd = os.pipe()
    writer = TelemetryWriter(write_fd)
    assert not writer.is_orphaned
    os.close(read_fd)
    assert writer.is_orphaned
    with pytest.raises(BrokenPipeError):
        writer.send(TelemetryFrame(rows=1))
    assert not writer.flush()
    os.close(write_fd)


def test_the_folder_of_this_room_is_light(tmp_path: Path) -> None:
    """Planning reads the descriptor without loading the server."""
    assert (Path(__file__).parents[2] / "src/millrace/serve/__init__.py").stat().st_size < 1500
