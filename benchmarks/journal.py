"""A journal transition (a step put with its version, an event appended, one durable transaction) against raw sqlite3.

.venv/bin/python benchmarks/journal.py

Ours also keeps indexes, salt and commitment; raw writes the least that says the same. Same disk, same pragmas, in turns
within one process, so that a slow moment of the disk hits both. Aim: at most 3 times raw.
"""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from millrace.core.types import Event, Step
from millrace.store.records_sql import SqlRecords, open_records

ROUNDS, WARM_UP = 600, 20
ACTOR, DETAIL = "system:driver", {"name": "train"}
EVENTS = "CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL, actor TEXT, verb TEXT, subject TEXT, detail TEXT)"
FACTS = {"rows": 1840, "rejected": 43, "seconds": 0.31, "columns": ["p1", "p2", "p3"]}


def ours(records: SqlRecords) -> Callable[[], None]:
    """One transition through Records, as `control.journal` makes it."""
    first = Step(id="s1", run_id="r1", name="train", stage="train", state="running", facts=FACTS)
    current = [records.put(first)]

    def transition() -> None:
        step = msgspec.structs.replace(current[0], attempt=current[0].attempt + 1)
        with records.transaction() as transaction:
            current[0] = transaction.put(step, expect_version=step.version)
            event = Event(
                at=1.0, actor="system:driver", verb="step.running", subject="step:s1", detail={"name": "train"}
            )
            transaction.append(event)

    return transition


def raw(path: Path) -> Callable[[], None]:
    """The least that sqlite3 must do for the same: update one row, insert one, commit."""
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE steps (id TEXT PRIMARY KEY, version INTEGER, state TEXT, body TEXT)")
    connection.execute(EVENTS)
    body = msgspec.json.encode(Step(id="s1", run_id="r1", name="train", stage="train", facts=FACTS)).decode()
    connection.execute("INSERT INTO steps VALUES ('s1', 0, 'running', ?)", (body,))
    version = [0]

    def transition() -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "UPDATE steps SET version = ?, state = ?, body = ? WHERE id = ? AND version = ?",
            (version[0] + 1, "running", body, "s1", version[0]),
        )
        event = (1.0, ACTOR, "step.running", "step:s1", json.dumps(DETAIL))
        connection.execute("INSERT INTO events (at, actor, verb, subject, detail) VALUES (?, ?, ?, ?, ?)", event)
        connection.execute("COMMIT")
        version[0] += 1

    return transition


def timed(work: Callable[[], None], times_s: list[float]) -> None:
    """Run it once."""
    start = time.perf_counter()
    work()
    times_s.append(time.perf_counter() - start)


def measure(folder: Path) -> tuple[list[float], list[float]]:
    """Seconds per transition, ours and raw, interleaved."""
    records = open_records(folder / "records.db")
    transition, baseline = ours(records), raw(folder / "raw.db")
    ours_s: list[float] = []
    raw_s: list[float] = []
    for turn in range(WARM_UP + ROUNDS):
        timed(transition, ours_s)
        timed(baseline, raw_s)
        if turn < WARM_UP:
            ours_s.clear()
            raw_s.clear()
    records.close()
    return ours_s, raw_s


def main() -> None:
    """Print one table."""
    place = Path(os.environ.get("MILLRACE_BENCH_DIR", "."))  # a disk: /tmp may be memory
    with tempfile.TemporaryDirectory(dir=place, prefix=".bench-") as folder:
        ours_s, raw_s = measure(Path(folder))
    print(f"{'journal transition, fsync FULL':32} {'p50':>9} {'mean':>9} {'p95':>9}")
    for name, times_s in (("millrace Records", ours_s), ("raw sqlite3, same pragmas", raw_s)):
        marks = (statistics.median(times_s), statistics.mean(times_s), statistics.quantiles(times_s, n=20)[-1])
        print(f"{name:32} " + " ".join(f"{mark * 1e3:7.2f}ms" for mark in marks))
    ratio = statistics.median(ours_s) / statistics.median(raw_s)
    print(f"{'ratio (aim <= 3)':32} {ratio:8.2f}x {statistics.mean(ours_s) / statistics.mean(raw_s):8.2f}x")


if __name__ == "__main__":
    main()
