"""What the audit costs: an event in a write, sealing, verifying, signing a head, proving, searching.

.venv/bin/python benchmarks/audit.py [EVENTS]

On SQLite in a folder of the working directory (MILLRACE_BENCH_DIR for another one). A write is one record replaced in
a transaction of its own; it is timed with an event and without, in turn, so that both meet the same disk. Aims: an
event adds at most 0.1 ms to a write at the median; at least 20,000 events/s are sealed; 1,000,000 events with details
and 100 signed heads verify in 10 s.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from millrace.control import heads
from millrace.control.services import Services
from millrace.core.types import AuditHead, Event, Run
from millrace.store.records_sql import SqlRecords
from millrace.wiring import open_dispatcher

WRITES = 1500
HEADS = 100
AT_ONCE = 5000


def event(number: int) -> Event:
    """One such as dispatch writes."""
    return Event(
        at=1.7e9 + number, actor=f"user:u{number % 50}", verb=("run.end", "model.promote", "run.submit")[number % 3],
        subject=f"run:{number:032x}",
        detail={"outcome": "ok", "request": {"run": f"{number:032x}", "state": "succeeded", "tags": {"n": number}}},
    )  # fmt: skip


def write_cost(records: SqlRecords) -> tuple[float, float, float]:
    """Medians of a write without and with an event, and the processor's time that an event adds, in ms."""
    times: dict[bool, list[float]] = {False: [], True: []}
    processor = {False: 0.0, True: 0.0}
    for number in range(2 * WRITES):
        with_event = number % 2 == 1
        began, busy = time.perf_counter(), time.process_time()
        with records.transaction() as transaction:
            transaction.put(Run(id=f"r{number % 100}", name=f"n{number}"))
            if with_event:
                transaction.append(event(number))
        times[with_event].append((time.perf_counter() - began) * 1e3)
        processor[with_event] += time.process_time() - busy
    added = (processor[True] - processor[False]) * 1e3 / WRITES
    return statistics.median(times[False]), statistics.median(times[True]), added


def fill(services: Services, records: SqlRecords, count: int) -> tuple[float, float, float]:
    """Append, seal and sign; seconds of each."""
    spent = [0.0, 0.0, 0.0]

    def timed(which: int, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        work()
        spent[which] += time.perf_counter() - began

    def append(first: int, last: int) -> None:
        with records.transaction() as transaction:
            for number in range(first, last):
                transaction.append(event(number))

    every = max(1, count // HEADS)
    for first in range(0, count, AT_ONCE):
        last = min(first + AT_ONCE, count)
        timed(0, lambda first=first, last=last: append(first, last))
        timed(1, records.seal)
        if last // every > first // every or last == count:
            timed(2, lambda: heads.sign_now(services))
    return spent[0], spent[1], spent[2]


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    """The least of some."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def main(count: int) -> None:
    """Print the table."""
    place = Path(os.environ.get("MILLRACE_BENCH_DIR", "."))  # a disk: /tmp may be memory
    with tempfile.TemporaryDirectory(dir=place, prefix=".bench-") as folder:
        dispatcher = open_dispatcher(f"{folder}/home")
        services = dispatcher.services
        records = heads.ledger(services)
        alone, audited, added = write_cost(records)
        records.seal()
        append_s, seal_s, sign_s = fill(services, records, count)
        signed = len(records.find(AuditHead))
        report: list[Any] = []
        verify_s = seconds(lambda: report.append(dispatcher.call("audit.verify", {})))
        prove_s = seconds(lambda: dispatcher.call("audit.prove", {"event": count // 2}))
        searches = {
            "by actor": {"actor": "user:u7"}, "by verb": {"verb": "model.promote"},
            "by actor and verb, a page in the middle": {"actor": "user:u7", "verb": "run.end", "before": count // 2},
            "by subject": {"subject": f"run:{count // 2:032x}"},
            "by time": {"until": "2023-11-20"}, "by text, rare": {"text": f"{count // 2:032x}"},
        }  # fmt: skip
        found = {name: seconds(lambda body=body: dispatcher.call("audit.search", body), 3) for name, body in
                 searches.items()}  # fmt: skip
        dispatcher.close()
    if not report[0].is_whole or report[0].events < count:
        raise SystemExit(f"the chain does not verify: {report[0].breaks[:3]}")
    print(f"{'a write alone, p50':55} {alone:9.3f} ms")
    print(f"{'a write with an event, p50':55} {audited:9.3f} ms")
    print(f"{'an event adds (aim: at most 0.1 ms)':55} {audited - alone:9.3f} ms")
    print(f"{'of that the processor, on average':55} {added:9.3f} ms")
    print(f"{f'append {count} events':55} {count / append_s:9.0f} /s")
    print(f"{'seal (aim: at least 20,000/s)':55} {count / seal_s:9.0f} /s")
    print(f"{f'sign {signed} heads':55} {count / sign_s:9.0f} /s")
    print(f"{f'verify {report[0].events} events, {signed} heads (aim for 10^6: 10 s)':55} {verify_s:9.2f} s")
    print(f"{'prove an event':55} {prove_s:9.2f} s")
    for name, spent in found.items():
        print(f"{f'search {name}':55} {spent * 1e3:9.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
