"""Runs side by side: what differs in parameters, spec and metrics; curves over one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request

from millrace.api.pages.curves import run_names
from millrace.api.pages.rendering import Page, number
from millrace.api.pages.runs_table import params_of
from millrace.control.dispatch import Dispatcher
from millrace.control.planning import flatten, section_value
from millrace.control.runs import find_run
from millrace.control.services import Services
from millrace.core.errors import InputError, SpecError
from millrace.core.spec_errors import parse_spec
from millrace.core.types import Run, Step, Struct

MOST_AXES = 9


class Row(Struct, frozen=True, kw_only=True):
    """One name with its value in every run. `raw` holds the exact numbers for the script that draws them."""

    name: str
    shown: list[str]
    raw: list[str]
    differs: bool


def show(dispatcher: Dispatcher, request: Request) -> Page:
    """The page.

    Raises:
        InputError: Fewer than two runs are named.
    """
    names = run_names(request)
    if len(names) < 2:
        raise InputError("want at least two runs to compare", hint="tick them in the table of runs, then press Compare")
    context = dispatcher.perform("run.list", "project:default", lambda services: _read(services, names))
    context["only_differences"] = request.query_params.get("only") == "differences"
    context["joined"] = ",".join(run.id for run in context["runs"])
    return Page(template="compare.html", section="runs", title=f"Compare {len(context['runs'])} runs", context=context)


def _read(services: Services, names: list[str]) -> dict[str, Any]:
    runs = list({run.id: run for run in (find_run(services, name) for name in names)}.values())
    values = services.records.run_values([run.id for run in runs])
    scores = [_scores(services, run) for run in runs]
    metrics = [
        {**scores[at], **{key: point.value for key, point in values[run.id].metrics.items()}}
        for at, run in enumerate(runs)
    ]
    params = rows_of([params_of(run, values[run.id]) for run in runs])
    measured = _number_rows(metrics)
    return {
        "runs": runs,
        "params": params,
        "spec": rows_of([spec_of(run) for run in runs]),
        "metrics": measured,
        "curves": sorted({key for run in runs for key in values[run.id].metrics}),
        "axes": {row.name for row in axes(params, measured)},
    }


def rows_of(sides: list[dict[str, str]]) -> list[Row]:
    """A row per name; those that differ come first.

    Example:
        >>> [(row.name, row.differs) for row in rows_of([{"a": "1", "b": "2"}, {"a": "1"}])]
        [('b', True), ('a', False)]
    """
    rows = []
    for name in sorted({name for side in sides for name in side}):
        shown = [side.get(name, "") for side in sides]
        rows.append(Row(name=name, shown=shown, raw=shown, differs=len({side.get(name) for side in sides}) > 1))
    return sorted(rows, key=lambda row: not row.differs)


def _number_rows(sides: list[dict[str, float]]) -> list[Row]:
    rows = []
    for name in sorted({name for side in sides for name in side}):
        raw = ["" if name not in side else repr(side[name]) for side in sides]
        shown = [number(side.get(name)) for side in sides]
        rows.append(Row(name=name, shown=shown, raw=raw, differs=len(set(raw)) > 1))
    return rows


def axes(params: list[Row], metrics: list[Row]) -> list[Row]:
    """What the parallel coordinates show: what differs, parameters before metrics, not too many."""
    chosen = [row for row in params if row.differs][: MOST_AXES - 3]
    return chosen + [row for row in metrics if row.differs][: MOST_AXES - len(chosen)]


def spec_of(run: Run) -> dict[str, str]:
    """The keys of a run's spec; one that this version cannot read has none."""
    if not run.spec_text:
        return {}
    try:
        parsed = parse_spec(run.spec_text, Path(run.spec_path).name, run.overrides)
    except SpecError:
        return {}
    return {key.removeprefix("spec."): value for key, value in flatten(section_value(parsed), "spec").items()}


def _scores(services: Services, run: Run) -> dict[str, float]:
    """Held-out figures of the run's own evaluation."""
    if not run.spec_text:
        return {}
    found: dict[str, float] = {}
    for step in services.records.find(Step, {"run_id": run.id, "name": "evaluate"}):
        found.update({metric["name"]: metric["value"] for metric in step.facts.get("metrics", [])})
    return found
