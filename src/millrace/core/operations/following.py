"""Verbs that follow what happens: events, and what a step prints."""

from __future__ import annotations

from millrace.core.operations import Operation, Request
from millrace.core.operations.runs import LogsResponse, RunRequest
from millrace.core.types import Event


class EventsRequest(Request, frozen=True, kw_only=True):
    """Sealed events with a number greater than `since`; of one subject (`run:<id>`), or of everything."""

    since: int = 0
    subject: str | None = None
    limit: int = 100


class WatchRequest(Request, frozen=True, kw_only=True):
    """Events from `since` on, as they are sealed; `run` narrows it to a run and its steps."""

    since: int = 0
    run: str | None = None


class TailRequest(RunRequest, frozen=True, kw_only=True):
    """A step's log from byte `offset` on, until the step ends."""

    step: str | None = None
    offset: int = 0


LIST_EVENTS = Operation(
    name="event.list", summary="Sealed events, oldest first.", request=EventsRequest, response=list[Event],
    method="GET", path="/events",
)  # fmt: skip
WATCH_EVENTS = Operation(
    name="event.watch", summary="Events as they are sealed.", request=WatchRequest, response=Event, method="GET",
    path="/events/stream", is_stream=True, cursor_field="seq", resume_field="since",
)  # fmt: skip
TAIL_LOGS = Operation(
    name="run.tail", summary="What a step prints, as it prints it.", request=TailRequest, response=LogsResponse,
    method="GET", path="/runs/{run}/logs/stream", is_stream=True, cursor_field="next_offset", resume_field="offset",
    subject_kind="run", subject_field="run", example={"run": "last"},
)  # fmt: skip
OPERATIONS = (LIST_EVENTS, WATCH_EVENTS, TAIL_LOGS)
