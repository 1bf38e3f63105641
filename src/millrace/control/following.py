"""Following: sealed events and logs as they come."""

from __future__ import annotations

from collections.abc import Iterator

from millrace.control.authorisation import acting_principal
from millrace.control.dispatch import handles
from millrace.control.runs import find_run, read_logs
from millrace.control.services import Services
from millrace.core.operations import following as ops
from millrace.core.operations.audit import SEARCH
from millrace.core.operations.runs import LogsRequest, LogsResponse
from millrace.core.ports import Records
from millrace.core.principals import EVERYWHERE
from millrace.core.states import RUN_END_STATES
from millrace.core.types import Event, Run, Step
from millrace.store.scoped import ScopedRecords

POLL_S = 0.2
MAX_PAGE = 1000


def records_of(services: Services) -> Records:
    """The records to read events from: those about users, tokens and keys are for who may search the audit alone."""
    principal = acting_principal()
    if principal is None or services.where is not None or principal.where(SEARCH.name, SEARCH.is_write) == {EVERYWHERE}:
        return services.records
    return ScopedRecords(services.records, frozenset({EVERYWHERE}))


@handles(ops.LIST_EVENTS)
def list_events(services: Services, body: ops.EventsRequest) -> list[Event]:
    """A page of sealed events."""
    if not services.is_used:
        return []
    return records_of(services).events(body.since, body.subject, min(max(body.limit, 0), MAX_PAGE))


@handles(ops.WATCH_EVENTS)
def watch_events(services: Services, body: ops.WatchRequest) -> Iterator[Event | None]:
    """Events for ever; those of one run until it has ended and its last event is told."""
    run = find_run(services, body.run) if body.run is not None else None
    return _watch(services, records_of(services), body.since, run)


def _watch(services: Services, records: Records, since: int, run: Run | None) -> Iterator[Event | None]:
    while True:
        is_last = run is not None and _has_ended(services, run)
        subjects = None if run is None else _subjects(services, run)
        while page := records.events(since, None, MAX_PAGE):
            since = page[-1].seq or since
            yield from (event for event in page if subjects is None or event.subject in subjects)
        if is_last:
            return
        yield None
        services.clock.sleep(POLL_S)


def _subjects(services: Services, run: Run) -> set[str]:
    steps = services.records.find(Step, {"run_id": run.id})
    return {f"run:{run.id}", *(f"step:{step.id}" for step in steps)}


def _has_ended(services: Services, run: Run) -> bool:
    """Whether the run is over: asked before its events are read, so that none is missed."""
    latest = services.records.get(Run, run.id)
    return latest is None or latest.state in RUN_END_STATES


@handles(ops.TAIL_LOGS)
def tail_logs(services: Services, body: ops.TailRequest) -> Iterator[LogsResponse | None]:
    """Parts of a log until its step has ended."""
    run = find_run(services, body.run)
    first = read_logs(services, LogsRequest(run=run.id, step=body.step, offset=body.offset))
    return _tail(services, run, first)


def _tail(services: Services, run: Run, part: LogsResponse) -> Iterator[LogsResponse | None]:
    while True:
        if part.text:
            yield part
        elif part.is_finished:
            return
        else:
            yield None
            services.clock.sleep(POLL_S)
        part = read_logs(services, LogsRequest(run=run.id, step=part.step, offset=part.next_offset))
