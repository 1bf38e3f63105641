"""Metric curves for the pages: at most a thousand points each, whatever was logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from millrace.api.bodies import JSON, encode_json
from millrace.control.dispatch import Dispatcher
from millrace.control.runs import find_run
from millrace.control.services import Services
from millrace.core.errors import InputError
from millrace.core.types import MetricPoint

MOST_POINTS = 1000
MOST_RUNS = 50
MOST_READ = 1_000_000
_READ_AT_ONCE = 100_000
AXES = ("step", "time")


class Curve(NamedTuple):
    """What is drawn: x grows strictly; y is None where there was no finite number."""

    x: list[float]
    y: list[float | None]


def show(dispatcher: Dispatcher, request: Request) -> Response:
    """One metric of some runs, as JSON for the script that draws it.

    Raises:
        InputError: No metric or run is named, or too many.
    """
    query = request.query_params
    metric, axis, names = query.get("metric", ""), query.get("x", "step"), run_names(request)
    if not metric or not names:
        raise InputError("want /pages/data/curves?metric=NAME&runs=ID,ID")
    if axis not in AXES:
        raise InputError(f"x must be step or time, got {axis[:40]!r}")
    series = [
        dispatcher.perform("run.metrics", f"run:{name}", partial(_series, name=name, metric=metric, axis=axis))
        for name in names
    ]
    body = encode_json({"metric": metric, "x": axis, "series": series})
    return Response(body, media_type=JSON, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})


def run_names(request: Request) -> list[str]:
    """The runs of the URL: `runs=a,b`, also several times.

    Raises:
        InputError: There are too many.
    """
    given = [name for value in request.query_params.getlist("runs") for name in value.split(",") if name]
    names = list(dict.fromkeys(given))
    if len(names) > MOST_RUNS:
        raise InputError(f"want at most {MOST_RUNS} runs at once, got {len(names)}")
    return names


def _series(services: Services, *, name: str, metric: str, axis: str) -> dict[str, Any]:
    run = find_run(services, name)
    points = read_points(services, run.id, metric)
    origin = run.started_at if run.started_at is not None else run.created_at
    curve = thinned(ordered(points, axis, origin), MOST_POINTS)
    missing = sum(not math.isfinite(point.value) for point in points)
    return {"run": run.id, "name": run.name, "points": len(points), "missing": missing, "x": curve.x, "y": curve.y}


def read_points(services: Services, run_id: str, metric: str) -> list[MetricPoint]:
    """All points of a metric, up to a million."""
    points: list[MetricPoint] = []
    while len(points) < MOST_READ:
        page = services.records.metrics(run_id, metric, since=len(points), limit=_READ_AT_ONCE)
        points += page
        if len(page) < _READ_AT_ONCE:
            break
    return points


def ordered(points: Sequence[MetricPoint], axis: str, origin: float) -> Curve:
    """Points by step or by seconds since `origin`; of several at one place the last counts.

    Example:
        >>> ordered([MetricPoint("r", "a", 2, 5.0, 9.0), MetricPoint("r", "a", 1, math.nan, 8.0)], "step", 0.0)
        Curve(x=[1, 2], y=[None, 5.0])
    """
    by_step = axis == "step"
    found: dict[float, float] = {
        point.step if by_step else round(point.at - origin, 3): point.value for point in points
    }
    x = sorted(found)
    return Curve(x, [found[at] if math.isfinite(found[at]) else None for at in x])


def thinned(curve: Curve, most: int) -> Curve:
    """At most `most` points that look the same: the least and the greatest of every part, the first and the last.

    A part without any number keeps one gap, so that a hole stays a hole.

    Example:
        >>> thinned(Curve(list(range(1000)), [0.0] * 500 + [9.0] + [0.0] * 499), 10).y.count(9.0)
        1
    """
    size = len(curve.x)
    if size <= most:
        return Curve(curve.x, [_rounded(value) for value in curve.y])
    parts = (most - 2) // 2
    kept = {0, size - 1}
    height = [math.nan if value is None else value for value in curve.y]
    for part in range(parts):
        start, end = 1 + (size - 2) * part // parts, 1 + (size - 2) * (part + 1) // parts
        known = [at for at in range(start, end) if curve.y[at] is not None]
        if known:
            kept.add(min(known, key=lambda at: height[at]))
            kept.add(max(known, key=lambda at: height[at]))
        else:
            kept.add(start)
    places = sorted(kept)
    return Curve([curve.x[at] for at in places], [_rounded(curve.y[at]) for at in places])


def _rounded(value: float | None) -> float | None:
    """Seven digits: more than a screen can show, in half the bytes."""
    return None if value is None else float(f"{value:.7g}")
