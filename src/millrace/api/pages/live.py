"""What happens: endpoints with their alerts, and events."""

from __future__ import annotations

from collections import deque
from typing import Any

from starlette.requests import Request

from millrace.api.pages.rendering import Page, text
from millrace.control.dispatch import Dispatcher
from millrace.control.following import records_of
from millrace.control.report import decode_facts
from millrace.control.services import Services
from millrace.core.errors import InputError
from millrace.core.types import Alert, Endpoint, Event, ModelVersion, Step

EVENTS_PER_PAGE = 100
_READ_AT_ONCE = 1000
_GALLOP = 256
_MOST = 2**62


def last_event(services: Services) -> int:
    """The number of the newest sealed event, 0 when there is none: found by halving, the numbers have no gaps."""
    low, high = -1, 0  # there is one after `low`, none after `high`
    records = records_of(services)
    while records.events(since=high, limit=1):
        low, high = high, max(_GALLOP, high * 2)
    while high - low > 1:
        middle = (low + high) // 2
        if records.events(since=middle, limit=1):
            low = middle
        else:
            high = middle
    return high


# --------------------------------------------------------------------------- events


def events(dispatcher: Dispatcher, request: Request) -> Page:
    """Events, newest first; of one subject when the URL names one."""
    subject = request.query_params.get("subject", "").strip()
    before = _cursor(request.query_params.get("before"))

    def read(services: Services) -> tuple[list[Event], int]:
        newest = last_event(services)
        return _before(services, min(before or _MOST, newest + 1), subject or None), newest

    found, newest = dispatcher.perform("event.list", "project:default", read)
    context = {
        "rows": [_event_row(event) for event in found[:EVENTS_PER_PAGE]],
        "subject": subject,
        "before": before,
        "next": found[EVENTS_PER_PAGE - 1].seq if len(found) > EVENTS_PER_PAGE else None,
        "since": newest,
    }
    return Page(template="events.html", section="events", title="Events", context=context)


def _cursor(given: str | None) -> int | None:
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 19):
        raise InputError(f"before must be the number of an event, got {given[:40]!r}")
    return int(given)


def _before(services: Services, before: int, subject: str | None) -> list[Event]:
    """The last events before a number, newest first, one more than a page has."""
    kept: deque[Event] = deque(maxlen=EVENTS_PER_PAGE + 1)
    since = 0 if subject else max(before - 1 - (EVENTS_PER_PAGE + 1), 0)
    while since < before - 1:
        page = records_of(services).events(since, subject, _READ_AT_ONCE)
        kept.extend(event for event in page if (event.seq or 0) < before)
        if len(page) < _READ_AT_ONCE:
            break
        since = page[-1].seq or before
    return list(reversed(kept))


def _event_row(event: Event) -> dict[str, Any]:
    detail = event.detail
    outcome = detail.get("outcome", "")
    shown = detail.get("request", detail) if isinstance(detail, dict) else detail
    return {
        "event": event,
        "link": subject_link(event.subject),
        "outcome": outcome,
        "detail": text(shown)[:4000] if shown else "",
    }


def subject_link(subject: str) -> str:
    """The page of what an event is about; nothing when it has none.

    Example:
        >>> subject_link("run:06611e8a"), subject_link("project:default")
        ('/runs/06611e8a', '')
    """
    kind, _, name = subject.partition(":")
    places = {"run": "/runs/", "model": "/models/", "dataset": "/datasets/", "endpoint": "/endpoints/"}
    if kind not in places or name in ("", "last", "default"):
        return ""
    return places[kind] + (name.partition("@")[0] if kind == "model" else name)


# --------------------------------------------------------------------------- endpoints


def endpoints(dispatcher: Dispatcher, request: Request) -> Page:
    """Endpoints with their open alerts."""
    found: list[Endpoint] = dispatcher.call("endpoint.list", {"limit": 1000})
    opened: list[Alert] = dispatcher.call("alert.list", {"state": "open", "limit": 1000})
    rows = [(one, [alert for alert in opened if alert.endpoint == one.name]) for one in found]
    context = {"rows": rows, "since": dispatcher.perform("event.list", "project:default", last_event)}
    return Page(template="endpoints.html", section="endpoints", title="Endpoints", context=context)


def endpoint(dispatcher: Dispatcher, request: Request) -> Page:
    """One endpoint: what it serves, how quick it is, what it watches, what it has alarmed about."""
    name = request.path_params["name"]
    one: Endpoint = dispatcher.call("endpoint.get", {"name": name})

    def read(services: Services) -> tuple[list[Alert], dict[str, Any], int]:
        alerts = services.records.find(Alert, {"endpoint": one.name}, order="-created_at", limit=100)
        return alerts, _watch_facts(services, one), last_event(services)

    alerts, watched, since = dispatcher.perform("endpoint.get", f"endpoint:{name}", read)
    context = {"endpoint": one, "alerts": alerts, "watched": watched, "since": since}
    return Page(template="endpoint.html", section="endpoints", title=one.name, context=context)


def _watch_facts(services: Services, one: Endpoint) -> dict[str, Any]:
    """The drift watch as it was tried in the run that made the served version."""
    versions = services.records.find(ModelVersion, {"name": one.model, "number": one.number})
    if not versions or not versions[0].run_id:
        return {}
    steps = services.records.find(Step, {"run_id": versions[0].run_id})
    facts, _ = decode_facts({step.stage: step.facts for step in steps if step.stage == "monitor" and step.facts})
    return facts.get("monitor", {})
