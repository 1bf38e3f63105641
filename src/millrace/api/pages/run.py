"""One run: steps, curves, values, logs, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request

from millrace.api.pages.live import last_event
from millrace.api.pages.rendering import Page, duration, number, share
from millrace.api.pages.runs_table import params_of
from millrace.control.dispatch import Dispatcher
from millrace.control.report import SHARES, decode_facts
from millrace.control.runs import find_run, read_logs
from millrace.control.services import Services
from millrace.core.errors import NotFoundError
from millrace.core.operations.runs import LogsRequest, LogsResponse
from millrace.core.states import RUN_END_STATES
from millrace.core.types import ArtifactFile, DatasetVersion, LoggedModel, ModelVersion, Run, RunLink, Step
from millrace.core.units import format_size

TAIL_BYTES = 32_000
MOST_FILES = 500
Facts = Mapping[str, Any]


def show(dispatcher: Dispatcher, request: Request) -> Page:
    """The page of a run."""
    name, wanted = request.path_params["run"], request.query_params.get("log") or None
    context = dispatcher.perform("run.get", f"run:{name}", lambda services: _read(services, name, wanted))
    run: Run = context["run"]
    return Page(template="run.html", section="runs", title=run.name or run.id[:12], context=context)


def _read(services: Services, name: str, wanted: str | None) -> dict[str, Any]:
    since = last_event(services)
    run = find_run(services, name)
    records = services.records
    steps = records.find(Step, {"run_id": run.id})
    values = records.run_values([run.id])[run.id]
    facts, _ = decode_facts({step.stage: step.facts for step in steps if step.facts})
    kept = records.find(ArtifactFile, {"owner": run.id}, order="path", limit=MOST_FILES + 1)
    return {
        "run": run,
        "steps": [_step_row(step, facts) for step in steps],
        "values": values,
        "params": dict(sorted(params_of(run, values).items())),
        "metrics": sorted(values.metrics),
        "tags": dict(sorted({**run.tags, **values.tags}.items())),
        "headline": headline(facts),
        "duration_s": (run.ended_at or services.clock.now()) - run.started_at if run.started_at else None,
        "is_live": run.state not in RUN_END_STATES,
        "log": _log(services, run, steps, wanted),
        "log_steps": [step.name for step in steps if step.log_path],
        "outputs": [(step.name, name, artifact) for step in steps for name, artifact in step.outputs.items()],
        "kept": kept[:MOST_FILES],
        "has_more_files": len(kept) > MOST_FILES,
        "has_report": any(step.facts for step in steps),
        "links": _links(services, run),
        "datasets": records.find(DatasetVersion, {"run_id": run.id}),
        "versions": records.find(ModelVersion, {"run_id": run.id}),
        "since": since,
    }


def _links(services: Services, run: Run) -> dict[str, list[Any]]:
    """Datasets that other programs say to have read, models that they logged."""
    found = services.records.find(RunLink, {"run_id": run.id})
    models = [link.name for link in found if link.target == "model"]
    return {
        "datasets": [link for link in found if link.target == "dataset"],
        "models": [one for name in models if (one := services.records.get(LoggedModel, name)) is not None],
    }


def _log(services: Services, run: Run, steps: list[Step], wanted: str | None) -> LogsResponse | None:
    """The end of a step's log: the asked one's, the failed one's, or the last one's."""
    having = [step for step in steps if step.log_path and wanted in (None, step.name)]
    if not having:
        if wanted is not None:
            raise NotFoundError(f"run {run.id} has no log of step {wanted!r}")
        return None
    sizes = {step.id: _size(step) for step in having}
    failed = [step for step in having if step.state == "failed"]
    running = [step for step in having if step.state == "running"]
    printed = [step for step in having if sizes[step.id]]
    step = (failed or running or printed or having)[-1]
    offset = max(0, sizes[step.id] - TAIL_BYTES)
    return read_logs(services, LogsRequest(run=run.id, step=step.name, offset=offset))


def _size(step: Step) -> int:
    path = Path(step.log_path)
    return path.stat().st_size if path.is_file() else 0


def _step_row(step: Step, facts: Mapping[str, Facts]) -> dict[str, Any]:
    took = None if step.started_at is None or step.ended_at is None else step.ended_at - step.started_at
    return {"step": step, "duration_s": took, "summary": summary(step.stage, facts.get(step.stage))}


def headline(facts: Mapping[str, Facts]) -> list[tuple[str, str, str]]:
    """The figures that people look for first: name, value, note."""
    tiles = []
    if "evaluate" in facts:
        for metric in facts["evaluate"]["metrics"][:2]:
            show_value = share if metric["name"] in SHARES else number
            note = f"{show_value(metric['low'])} to {show_value(metric['high'])}"
            tiles.append((metric["name"], show_value(metric["value"]), note))
    if "compress" in facts:
        chosen = _chosen(facts["compress"])
        tiles.append(("variant", chosen["name"], f"{chosen['size_ratio']:.1f}× smaller"))
    if "serve" in facts:
        serve = facts["serve"]
        tiles.append(
            ("median answer", duration(serve["p50_s"]), f"{serve['answered']:,} of {serve['requests']:,} answered")
        )
    return tiles


def _chosen(compress: Facts) -> Facts:
    return next((one for one in compress["variants"] if one["name"] == compress["chosen"]), compress["variants"][0])


def summary(stage: str, facts: Facts | None) -> str:
    """What a step found, in one line; nothing for stages that this page does not know.

    Example:
        >>> summary("export", {"rows": 600, "max_difference": 5e-07, "size_bytes": 590_479})
        'equals the framework on 600 rows, largest difference 5e-07, 590KB'
    """
    write = _SUMMARIES.get(stage)
    return write(facts) if facts and write else ""


def _data(facts: Facts) -> str:
    split = ", ".join(f"{name} {rows:,}" for name, rows in facts["split"].items())
    return f"{facts['rows_in']:,} rows in, {facts['rejected']:,} rejected; {split}"


def _train(facts: Facts) -> str:
    score = facts.get("best_score")
    shown = "" if score is None else f", validation {facts['metric']} {number(score)}"
    return f"{facts['model']} ({facts['framework']}), {facts['parameters']:,} parameters{shown}"


def _export(facts: Facts) -> str:
    return (
        f"equals the framework on {facts['rows']:,} rows, largest difference {number(facts['max_difference'])}, "
        f"{format_size(facts['size_bytes'])}"
    )


def _evaluate(facts: Facts) -> str:
    return (
        ", ".join(f"{one['name']} {number(one['value'])}" for one in facts["metrics"]) + f" on {facts['rows']:,} rows"
    )


def _register(facts: Facts) -> str:
    alias = f" → {facts['alias']}" if facts.get("promoted") and facts.get("alias") else ""
    number_text = f" v{facts['number']}" if facts.get("number") else ""
    return f"{facts['model']}{number_text}{alias}: {facts['gate']['explanation'] or facts['gate']['verdict']}"


def _serve(facts: Facts) -> str:
    return (
        f"{facts['answered']:,} of {facts['requests']:,} answered, p50 {duration(facts['p50_s'])}, "
        f"p99 {duration(facts['p99_s'])}"
    )


def _monitor(facts: Facts) -> str:
    return ", ".join(f"{one['label']} {'alerts' if one['is_alert'] else 'quiet'}" for one in facts["windows"])


_SUMMARIES: dict[str, Callable[[Facts], str]] = {
    "data": _data,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
    "compress": lambda facts: facts["why"],
    "register": _register,
    "serve": _serve,
    "monitor": _monitor,
}
