"""Metric points per second from user code until another process has read them.

.venv/bin/python benchmarks/metrics_logging.py

A producer logs one point per call, as training code does, as fast as it can for ten seconds; a second process
polls the home all the while. The clock stops when that process has read the last point. The baseline is raw
sqlite3 in the same run: executemany of the same rows, 10,000 in each transaction, same pragmas, nobody reading.
Aim: at least 20,000 points/s.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from millrace.core.types import MetricPoint
from millrace.store.records_sql import open_records

DURATION_S = 10.0
CALLS_PER_LOOK = 500
METRICS = "CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_id TEXT, name TEXT, step INT, value REAL, at REAL)"
READER = """
import sys, time
from pathlib import Path
from millrace.store.records_sql import open_records
records = open_records(Path(sys.argv[1]) / "records.db")
seen, ended = 0, False
print("ready", flush=True)
while not ended:
    points = records.metrics("run", since=seen, limit=50_000)
    seen += len(points)
    ended = any(point.name == "end" for point in points)
    if len(points) < 50_000:
        time.sleep(0.02)
print(seen, time.time(), flush=True)
"""


def ours(folder: Path) -> tuple[int, float, float]:
    """Points, seconds of logging, seconds until read elsewhere."""
    records = open_records(folder / "records.db")
    reader = subprocess.Popen([sys.executable, "-c", READER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    reader.stdout.readline()
    start, count = time.time(), 0
    while time.time() - start < DURATION_S:
        for _ in range(CALLS_PER_LOOK):
            records.append_metrics([MetricPoint("run", "loss", count, 0.5, start)])
            count += 1
    records.append_metrics([MetricPoint("run", "end", count, 0.0, start)])
    logged_s = time.time() - start
    seen, _, read_at = reader.communicate(timeout=600)[0].partition(" ")
    records.close()
    if int(seen) != count + 1:
        raise SystemExit(f"{count + 1} points were logged, but {seen} read")
    return count, logged_s, float(read_at) - start


def raw(folder: Path, count: int) -> float:
    """Seconds that sqlite3 alone needs for as many rows."""
    connection = sqlite3.connect(folder / "raw.db", isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(METRICS)
    connection.execute("CREATE INDEX by_run ON metrics (run_id)")
    start = time.perf_counter()
    for first in range(0, count, 10_000):
        rows = [("run", "loss", step, 0.5, 1.0) for step in range(first, min(first + 10_000, count))]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO metrics (run_id, name, step, value, at) VALUES (?, ?, ?, ?, ?)", rows)
        connection.execute("COMMIT")
    spent_s = time.perf_counter() - start
    connection.close()
    return spent_s


def main() -> None:
    """Print one table."""
    place = Path(os.environ.get("MILLRACE_BENCH_DIR", "."))  # a disk: /tmp may be memory
    with tempfile.TemporaryDirectory(dir=place, prefix=".bench-") as folder:
        count, logged_s, read_s = ours(Path(folder))
        raw_s = raw(Path(folder), count)
    print(f"{'metric logging':44} {'points':>9} {'seconds':>8} {'points/s':>9}")
    print(f"{'millrace, logged':44} {count:9} {logged_s:8.2f} {count / logged_s:9.0f}")
    print(f"{'millrace, readable from another process':44} {count:9} {read_s:8.2f} {count / read_s:9.0f}")
    print(f"{'raw sqlite3, executemany of 10,000':44} {count:9} {raw_s:8.2f} {count / raw_s:9.0f}")
    print(f"{'ratio to raw (aim: >= 20,000 points/s)':44} {'':9} {'':8} {raw_s / read_s:8.2f}x")


if __name__ == "__main__":
    main()
