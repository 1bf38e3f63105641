"""Verbs on runs: plan, submit, drive or follow, look at, cancel, delete."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from millrace.control.approvals import person
from millrace.control.dispatch import handles
from millrace.control.drivers import live_lease, spawn_driver
from millrace.control.driving import drive_or_follow, follow
from millrace.control.pipeline import last_parts
from millrace.control.planning import (
    KeyMaker,
    StepPlan,
    cache_key,
    check_before_work,
    explain,
    flatten,
    plan_steps,
    section_value,
)
from millrace.control.projects import ensure_project
from millrace.control.quotas import check_runs, check_storage
from millrace.control.readable import check_sources
from millrace.control.services import Services
from millrace.control.uploads import local_path
from millrace.core.errors import ConflictError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.operations import runs as ops
from millrace.core.search import Comparison, Operator, Ordering, RunQuery
from millrace.core.spec_errors import load_spec, parse_spec
from millrace.core.states import RUN_END_STATES
from millrace.core.types import Artifact, MetricPoint, Run, Step

REPORT_NAME = "report.html"
LAST_CHARACTER = chr(0x10FFFF)
_REFERENCE = re.compile("[^\0\ud800-\udfff]+")  # what a column can hold


def find_run(services: Services, text: str) -> Run:
    """A run by id, name (the newest with it), unique prefix of an id, or `last`.

    Raises:
        NotFoundError: There is none, or the prefix fits several.
    """
    records = services.records
    if text == "last":
        newest = records.find(Run, {"deleted_at": None}, order="-created_at", limit=1)
        if not newest:
            raise NotFoundError(f"there are no runs in {services.home}", hint="`millrace run` makes one")
        return newest[0]
    is_reference = _REFERENCE.fullmatch(text) is not None
    run = records.get(Run, text) if is_reference else None
    if run is not None:
        return run
    count = "no run"
    if is_reference:
        newest_first = Ordering(field="attribute", key="created_at", descending=True)
        named = _search(services, [("name", "=", text)], newest_first, 1)
        found = named or _search(
            services, [("id", ">=", text), ("id", "<", text + LAST_CHARACTER)], Ordering(field="attribute", key="id"), 2
        )
        if len(found) == 1:
            return found[0]
        count = "more than one run" if found else count
    raise NotFoundError(f"{count} with the id {text!r} in {services.home}", hint="`millrace runs` lists them")


def _search(services: Services, tests: Sequence[tuple[str, Operator, str]], order: Ordering, limit: int) -> list[Run]:
    """Runs, deleted ones too, whose attributes fit."""
    where = tuple(
        Comparison(field="attribute", key=key, operator=operator, value=value) for key, operator, value in tests
    )
    query = RunQuery(where=where, order=(order,), lifecycle="all", limit=limit)
    return [one.run for one in services.records.search_runs(query)]


@handles(ops.PLAN_RUN)
def plan_run(services: Services, body: ops.SpecRequest) -> ops.Plan:
    """What would run, and why; nothing is executed or written."""
    path = local_path(services, body.spec_path)
    spec, _ = load_spec(path, body.overrides)
    check_sources(services, spec.data, path.parent)
    plans = plan_steps(spec, services.stages)
    check_before_work(spec, plans, services.stages, path.parent)
    keys = KeyMaker(spec, path.parent, services.stages)
    outputs: dict[str, dict[str, Artifact]] = {}
    planned = []
    for plan in plans:
        planned.append(_plan_step(services, plan, keys, outputs, spec.project))
    return ops.Plan(steps=planned)


def _plan_step(
    services: Services, plan: StepPlan, keys: KeyMaker, outputs: dict[str, dict[str, Artifact]], project: str
) -> ops.PlannedStep:
    waiting = [need for need in plan.needs if need not in outputs]
    placeholder = Step(id="", project=project, run_id="", name=plan.name, stage=plan.stage)
    earlier = last_parts(services, placeholder) if services.is_used else None
    if waiting:
        return _waiting_step(plan, waiting, is_first=earlier is None)
    inputs = {
        f"{need}.{name}": artifact
        for need in plan.needs
        for name, artifact in outputs[need].items()
        if not plan.inputs or f"{need}.{name}" in plan.inputs
    }
    parts = keys.parts(plan, inputs)
    done = _done_step(services, plan, parts)
    if done is None:
        return ops.PlannedStep(name=plan.name, action="run", reason=explain(earlier, parts))
    outputs[plan.name] = done.outputs
    return ops.PlannedStep(name=plan.name, action="cached", reason="nothing changed")


def _waiting_step(plan: StepPlan, waiting: list[str], *, is_first: bool) -> ops.PlannedStep:
    """A step whose inputs are not known yet: equal ones would keep what it made."""
    names = ", ".join(waiting)
    if is_first:
        return ops.PlannedStep(name=plan.name, action="run", reason=f"first time, after {names}")
    whose = f"{names}'s" if len(waiting) == 1 else "their"
    return ops.PlannedStep(
        name=plan.name, action="may run", reason=f"after {names} (kept if {whose} outputs are equal)"
    )


def _done_step(services: Services, plan: StepPlan, parts: dict[str, str]) -> Step | None:
    if not services.is_used:
        return None
    if plan.stage == "register":
        steps = services.records.find(Step, {"stage": "register", "state": "succeeded"}, order="-created_at", limit=50)
        ignored = {"champion", "model"}
        found = [one for one in steps if {k: v for k, v in one.key_parts.items() if k not in ignored} == parts]
    else:
        found = services.records.find(
            Step, {"cache_key": cache_key(parts), "state": "succeeded"}, order="-created_at", limit=1
        )
    exist = services.blobs.exists
    return next((one for one in found if all(exist(artifact.digest) for artifact in one.outputs.values())), None)


@handles(ops.SUBMIT_RUN)
def submit_run(services: Services, body: ops.SubmitRequest) -> ops.Submitted:
    """Create a run, continue one whose driver died, or join the live one on the same spec."""
    path = local_path(services, body.spec_path)
    spec, text = load_spec(path, body.overrides)
    check_sources(services, spec.data, path.parent)
    check_before_work(spec, plan_steps(spec, services.stages), services.stages, path.parent)
    check_storage(services, spec.project)
    with services.records.transaction() as transaction:
        open_runs = [
            run
            for state in ("running", "pending")
            for run in transaction.find(Run, {"spec_path": str(path), "state": state})
        ]
        submitted = None
        for run in open_runs:
            same = run.spec_text == text and run.overrides == body.overrides
            if live_lease(services, run) is not None or (run.state == "pending" and same):
                submitted = ops.Submitted(run=run, is_joined=True)
            elif same:
                submitted = ops.Submitted(run=run)
            else:
                ended = msgspec.structs.replace(
                    run, state="failed", ended_at=services.clock.now(),
                    error=ConflictError("its driver died and the spec was changed since").to_dict(),
                )  # fmt: skip
                transaction.put(ended, expect_version=run.version)
        if submitted is None:
            check_runs(transaction, spec.project)
            run = Run(
                id=new_id(), project=spec.project, created_at=services.clock.now(), name=spec.project,
                spec_path=str(path), spec_text=text, overrides=body.overrides, created_by=person(),
            )  # fmt: skip
            ensure_project(transaction, run.project, services.clock.now())
            submitted = ops.Submitted(run=transaction.put(run, expect_version=0))
    if services.drives_apart:
        if live_lease(services, submitted.run) is None:
            spawn_driver(services, submitted.run)
    elif body.detach and not submitted.is_joined:
        spawn_driver(services, submitted.run)
    return submitted


@handles(ops.DRIVE_RUN)
def drive_run(services: Services, body: ops.RunRequest) -> Iterator[ops.RunEvent]:
    """Drive a run to its end, or follow the process that does."""
    run = find_run(services, body.run)
    return follow(services, run, is_adopted=True) if services.drives_apart else drive_or_follow(services, run)


@handles(ops.LIST_RUNS)
def list_runs(services: Services, body: ops.RunList) -> list[Run]:
    """Runs, newest first."""
    if not services.is_used:
        return []
    where: dict[str, str | None] = {"deleted_at": None}
    if body.state:
        where["state"] = body.state
    return services.records.find(Run, where, order="-created_at", limit=body.limit, offset=body.offset)


@handles(ops.GET_RUN)
def get_run(services: Services, body: ops.RunRequest) -> ops.RunView:
    """A run with its steps and report."""
    run = find_run(services, body.run)
    steps = services.records.find(Step, {"run_id": run.id})
    report = Path(run.spec_path).parent / REPORT_NAME if run.spec_path else None
    path, values = str(report) if report and report.is_file() else None, services.records.run_values([run.id])[run.id]
    return ops.RunView(run=run, steps=steps, report_path=path, values=values)


@handles(ops.DIFF_RUNS)
def diff_runs(services: Services, body: ops.DiffRequest) -> ops.RunDiff:
    """Specs by key, outputs by step, metrics by name."""
    left, right = find_run(services, body.left), find_run(services, body.right)
    sides = [_run_sides(services, run) for run in (left, right)]
    changes: list[dict[str, list[str | float | None]]] = []
    for part in range(3):
        names = sorted({*sides[0][part], *sides[1][part]})
        pairs = {name: [sides[0][part].get(name), sides[1][part].get(name)] for name in names}
        changes.append({name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
    return msgspec.convert(
        {"left": left.id, "right": right.id, "spec": changes[0], "outputs": changes[1], "metrics": changes[2]},
        ops.RunDiff,
    )


def _run_sides(services: Services, run: Run) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    spec: dict[str, str] = {}
    if run.spec_text:
        parsed = parse_spec(run.spec_text, Path(run.spec_path).name, run.overrides)
        spec = flatten(section_value(parsed), "spec")
    outputs, metrics = {}, {}
    for step in services.records.find(Step, {"run_id": run.id}):
        outputs.update({f"{step.name}.{name}": artifact.digest for name, artifact in step.outputs.items()})
        if step.stage == "evaluate":
            metrics.update({metric["name"]: metric["value"] for metric in step.facts.get("metrics", [])})
    return spec, outputs, metrics


@handles(ops.CANCEL_RUN)
def cancel_run(services: Services, body: ops.CancelRequest) -> Run:
    """Ask the living driver to stop; without one the run is cancelled here."""
    for _ in range(20):
        run = find_run(services, body.run)
        if run.state in RUN_END_STATES:
            return run
        if live_lease(services, run) is not None:
            changed = msgspec.structs.replace(run, tags={**run.tags, "cancel": "now" if body.now else "requested"})
        else:
            changed = msgspec.structs.replace(run, state="cancelled", ended_at=services.clock.now())
        try:
            return services.records.put(changed, expect_version=run.version)
        except ConflictError:
            continue
    raise ConflictError(f"run {body.run} is being changed by somebody else")


@handles(ops.DELETE_RUN)
def delete_run(services: Services, body: ops.RunRequest) -> Run:
    """Delete an ended run: it can be restored until `system gc` removes it; model versions and datasets stay."""
    run = find_run(services, body.run)
    if run.state not in RUN_END_STATES and live_lease(services, run) is not None:
        raise ConflictError(f"run {run.id} is still running", hint="cancel it first: `millrace runs cancel`")
    if run.deleted_at is not None:
        return run
    changed = msgspec.structs.replace(run, deleted_at=services.clock.now())
    return services.records.put(changed, expect_version=run.version)


@handles(ops.READ_LOGS)
def read_logs(services: Services, body: ops.LogsRequest) -> ops.LogsResponse:
    """A step's log from an offset."""
    run = find_run(services, body.run)
    steps = [step for step in services.records.find(Step, {"run_id": run.id}) if step.log_path]
    chosen = [step for step in steps if body.step in (None, step.name)]
    if not chosen:
        names = ", ".join(step.name for step in steps) or "none yet"
        raise NotFoundError(f"run {run.id} has no log of step {body.step!r}", hint=f"steps with a log: {names}")
    failed = [step for step in chosen if step.state == "failed"]
    step = (failed or chosen)[-1]
    path = Path(step.log_path)
    data = b""
    if path.is_file():
        with path.open("rb") as file:
            file.seek(max(0, body.offset))
            data = file.read(1_000_000)
    return ops.LogsResponse(
        step=step.name, text=data.decode("utf-8", "replace"), next_offset=body.offset + len(data),
        is_finished=step.state != "running", path=str(path),
    )  # fmt: skip


@handles(ops.READ_METRICS)
def read_metrics(services: Services, body: ops.MetricsRequest) -> list[MetricPoint]:
    """Points in the order of arrival."""
    run = find_run(services, body.run)
    return services.records.metrics(run.id, body.name, since=body.since)
