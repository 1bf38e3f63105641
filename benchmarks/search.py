"""Searching runs: pages, filters and orders, among 5,000 and among 100,000 runs.

.venv/bin/python benchmarks/search.py [RUNS …]

Each run has 10 parameters, 5 tags, the latest points of 10 metrics and a spec of 2 kB. Times are CPU of this
process (SQLite runs inside it), the median of several calls after one to warm up; a page comes with all values.
The baseline is what a store without their indexes must do, in the same run: read the runs with their values, sort
them in Python, cut the page. Aims: 20 ms for a page of 100 and for a filter of three clauses at 5,000 runs; ordered
by a metric 15 ms at 5,000 and 60 ms at 100,000; 1,000 runs in 100 ms.

`MILLRACE_BENCH_POSTGRES=1` measures on a PostgreSQL server of its own too: wall time there, for the server works
in another process.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from millrace.core.ids import new_id
from millrace.core.search import Comparison, FoundRun, Ordering, RunQuery
from millrace.core.types import MetricPoint, Run
from millrace.store.records_sql import SqlRecords, open_records
from millrace.testing.postgres import PostgresServer, open_place

SPEC = "train:\n  epochs: 5\n" * 110
PARAMS, TAGS, METRICS, PROJECTS = 10, 5, 10, 4
BATCH = 1000
LOSS = Ordering(field="metric", key="metric0")
NEWEST = Ordering(field="attribute", key="started_at", descending=True)
THREE = (
    Comparison(field="metric", key="metric0", operator="<", value=0.5),
    Comparison(field="param", key="param1", operator="=", value="3"),
    Comparison(field="tag", key="tag2", operator="LIKE", value="team-%"),
)
RARE = (Comparison(field="param", key="param0", operator="=", value="7"),)
QUERIES = {
    "100 runs, newest first": RunQuery(),
    "100 runs of a project": RunQuery(projects=("project1",)),
    "1,000 runs": RunQuery(limit=1000),
    "filter of three clauses": RunQuery(where=THREE),
    "filter that fits one run": RunQuery(where=RARE),
    "three clauses, ordered by a metric": RunQuery(where=THREE, order=(LOSS,)),
    "ordered by a metric": RunQuery(order=(LOSS,)),
    "ordered by a metric, then newest": RunQuery(order=(LOSS, NEWEST)),
    "ordered by a metric, the last page": RunQuery(order=(LOSS,), offset=-100),
    "ordered by a parameter": RunQuery(order=(Ordering(field="param", key="param1"),)),
}


def fill(records: SqlRecords, count: int) -> None:
    """Write the runs."""
    chance = random.Random(0)
    for first in range(0, count, BATCH):
        with records.transaction() as transaction:
            for number in range(first, min(first + BATCH, count)):
                started = 1.7e9 + number
                run = Run(
                    id=new_id(started), project=f"project{number % PROJECTS}", name=f"run {number}",
                    state="succeeded", created_at=started, started_at=started, ended_at=started + 60, spec_text=SPEC,
                )  # fmt: skip
                transaction.put(run, expect_version=0)
                names = range(METRICS if number % 20 else 0)  # one run in 20 has logged nothing
                transaction.log(
                    run.id,
                    points=[MetricPoint(run.id, f"metric{one}", 100, chance.random(), started) for one in names],
                    params={f"param{one}": str(chance.randrange(10**one) if one else number) for one in range(PARAMS)},
                    tags={f"tag{one}": f"team-{chance.randrange(one + 1)}" for one in range(TAGS)},
                )


def in_python(records: SqlRecords) -> list[str]:
    """Ordered by a metric, without the help of a database."""
    runs = records.find(Run)
    values = records.run_values([run.id for run in runs])
    found = [FoundRun(run=run, values=values[run.id]) for run in runs]
    found.sort(key=lambda one: one.values.metrics["metric0"].value if "metric0" in one.values.metrics else 2.0)
    return [one.run.id for one in found[:100]]


def median_ms(work: Callable[[], object], clock: Callable[[], float], times: int) -> float:
    """Milliseconds of a call, after one that is not counted."""
    spent = []
    for number in range(times + 1):
        start = clock()
        work()
        spent.append((clock() - start) * 1000)
        if spent[-1] > 2000 and number:
            break
    return statistics.median(spent[1:])


def measure(name: str, records: SqlRecords, count: int, clock: Callable[[], float]) -> None:
    """Fill and print one table."""
    start = time.perf_counter()
    fill(records, count)
    with records.writing() as connection:
        connection.execute("ANALYZE" if connection.dialect == "postgres" else "SELECT 1")  # as autovacuum soon would
    print(f"{name}, {count:,} runs (written in {time.perf_counter() - start:.0f} s)")
    for title, query in QUERIES.items():
        if query.offset < 0:
            query = RunQuery(order=query.order, offset=count + query.offset)
        found = len(records.search_runs(query))
        spent = median_ms(lambda query=query: records.search_runs(query), clock, 15)
        print(f"  {title:38} {found:5} runs {spent:9.1f} ms")
    spent = median_ms(lambda: in_python(records), clock, 3 if count <= 10_000 else 1)
    print(f"  {'baseline: by a metric in Python':38} {100:5} runs {spent:9.1f} ms")


def main(counts: list[int]) -> None:
    """Print a table for each number of runs and each database."""
    place = Path(os.environ.get("MILLRACE_BENCH_DIR", "."))  # a disk: /tmp may be memory
    for count in counts:
        with tempfile.TemporaryDirectory(dir=place, prefix=".bench-") as folder:
            records = open_records(Path(folder) / "records.db")
            measure("SQLite", records, count, time.process_time)
            records.close()
        if os.environ.get("MILLRACE_BENCH_POSTGRES"):
            with PostgresServer(settings=("shared_buffers=1GB",)) as server:
                records = open_place(server.create_database())
                measure("Postgres", records, count, time.perf_counter)
                records.close()


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [5_000, 100_000])
