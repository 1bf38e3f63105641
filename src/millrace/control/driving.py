"""Driving as a stream of events; Ctrl-C once cancels gracefully, twice at once. Following the same way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from millrace.control.interrupts import calling_on_signals
from millrace.control.pipeline import LEASE_TTL_S, Driver
from millrace.control.publishing import write_report
from millrace.control.services import Services
from millrace.core.errors import UnavailableError
from millrace.core.operations.runs import RunEvent
from millrace.core.states import RUN_END_STATES
from millrace.core.types import Run, Step
from millrace.store.leases import LeaseKeeper, acquire

FOLLOW_POLL_S = 0.2


def drive_or_follow(services: Services, run: Run) -> Iterator[RunEvent]:
    """The events of a run until it ends; this process drives it when nobody else does."""
    lease = acquire(services.records, f"run/{run.id}", services.clock, LEASE_TTL_S)
    if lease is not None:
        with LeaseKeeper(services.records, lease, services.clock, LEASE_TTL_S):
            # Another driver may have ended the run, and let go of its lease, since `run` was read.
            latest = services.records.get(Run, run.id) or run
            if latest.state not in RUN_END_STATES:
                yield from _Driving(services, latest).events()
                return
    yield from follow(services, run)


class _Driving:
    """The driver works in a thread, so that an interrupt never tears a transaction."""

    def __init__(self, services: Services, run: Run) -> None:
        self._services = services
        self._run = run
        self._queue: queue.Queue[RunEvent | None] = queue.Queue()
        self._driver = Driver(services, run, self._queue.put)
        self._ended: Run | None = None
        self._report: Path | None = None
        self._failure: BaseException | None = None
        self._interrupts = 0

    def events(self) -> Iterator[RunEvent]:
        thread = threading.Thread(target=self._drive, name="driver", daemon=True)
        with calling_on_signals(self._on_signal):
            thread.start()
            try:
                while (event := self._queue.get()) is not None:
                    yield event
            except GeneratorExit:  # nobody listens any more: nothing is driven without a lease
                self._driver.cancel()
                raise
            finally:
                thread.join()
        if self._failure is not None:
            raise self._failure
        yield self._end()

    def _on_signal(self, number: int, frame: object) -> None:
        self._interrupts += 1
        # In a thread: what was interrupted here may hold a lock that cancelling needs.
        threading.Thread(target=self._driver.cancel, kwargs={"now": self._interrupts > 1}, daemon=True).start()

    def _drive(self) -> None:
        try:
            self._ended = self._driver.drive(self._publish)
        except BaseException as failure:  # noqa: BLE001 - carried to the caller's thread and raised there
            self._failure = failure
        finally:
            self._queue.put(None)

    def _publish(self, run: Run) -> None:
        self._report = write_report(self._services, run)

    def _end(self) -> RunEvent:
        assert self._ended is not None
        return end_event(self._ended, self._report)


def end_event(run: Run, report: Path | None) -> RunEvent:
    """The last event of a run."""
    duration = (run.ended_at or 0.0) - (run.started_at or run.ended_at or 0.0)
    return RunEvent(
        kind="end", state=run.state, error=run.error, duration_s=duration, report_path=str(report) if report else None
    )


def follow(services: Services, run: Run, *, is_adopted: bool = False) -> Iterator[RunEvent]:
    """Events made from the records that another process writes.

    Ends when the run does, or when its driver has died and nobody will start another (`is_adopted`: a server will).
    """
    seen: dict[str, str] = {}
    while True:
        current = services.records.get(Run, run.id)
        if current is None:
            return
        for step in services.records.find(Step, {"run_id": run.id}):
            if seen.get(step.id) != step.state and step.state != "pending":
                seen[step.id] = step.state
                duration = (step.ended_at or 0.0) - (step.started_at or step.ended_at or 0.0)
                yield RunEvent(
                    kind="step", step=step.name, state=step.state, facts=step.facts, error=step.error,
                    duration_s=duration, text=step.reason,
                )  # fmt: skip
        if current.state in RUN_END_STATES:
            report = Path(current.spec_path).parent / "report.html"
            yield end_event(current, report if report.is_file() else None)
            return
        if not is_adopted and acquire_if_abandoned(services, current):
            return
        services.clock.sleep(FOLLOW_POLL_S)


def acquire_if_abandoned(services: Services, run: Run) -> bool:
    """True when the driver died: the follower's caller may run again to continue."""
    lease = acquire(services.records, f"run/{run.id}", services.clock, 1.0)
    if lease is None:
        return False
    with LeaseKeeper(services.records, lease, services.clock, 1.0):
        latest = services.records.get(Run, run.id)
        if latest is not None and latest.state in RUN_END_STATES:
            return False
    raise UnavailableError(
        "the process that drove this run is gone", hint="`millrace run` continues it: finished steps are kept"
    )
