"""One operation: in process, and over HTTP from another process.

Run: `python benchmarks/operations.py`. `run.get` of a tracked run, and `run.log` of one point (which is
durable when it is answered); the baseline is a handler of the same server that does nothing (`/healthz`).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from millrace.client.http import HttpTransport
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

CALLS = 400


def times_us(work: Callable[[], object], calls: int = CALLS) -> tuple[float, float]:
    """The median and the 95th percentile in microseconds."""
    for _ in range(20):
        work()
    taken = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        work()
        taken.append((time.perf_counter_ns() - began) / 1e3)
    taken.sort()
    return statistics.median(taken), taken[int(len(taken) * 0.95)]


def main() -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        embedded = open_dispatcher(f"{folder}/embedded")
        run = embedded.call("run.track", {"name": "x"})
        services = embedded.services
        rows.append(("records.get alone", *times_us(lambda: services.records.get(type(run), run.id), 2000)))
        rows.append(("event.list in process", *times_us(lambda: embedded.call("event.list", {"limit": 0}), 2000)))
        rows.append(("run.get in process", *times_us(lambda: embedded.call("run.get", {"run": run.id}), 2000)))
        embedded.close()
        with RunningServer(Path(folder) / "home") as server:
            transport = HttpTransport(server.url)
            run = transport.call("run.track", {"name": "x"})
            plain = httpx.Client(base_url=server.url)
            rows.append(("/healthz over HTTP", *times_us(lambda: plain.get("/healthz"))))
            rows.append(("run.get over HTTP", *times_us(lambda: transport.call("run.get", {"run": run.id}))))
            rows.append(
                ("run.log over HTTP", *times_us(lambda: transport.call("run.log", {"run": run.id, "params": {"a": 1}})))
            )
            plain.close()
            transport.close()
    print(f"{'what':<24} {'p50 us':>8} {'p95 us':>8}   aims: dispatch alone 50, over HTTP 3000")
    for name, median, late in rows:
        print(f"{name:<24} {median:>8.0f} {late:>8.0f}")


if __name__ == "__main__":
    main()
