"""Drives one run: keys, cache, workers, commits. After a kill of anything the same run continues."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from millrace.control.commits import BEFORE_COMMITS, COMMITS, PREPARATIONS, Preparation
from millrace.control.journal import Journal
from millrace.control.planning import (
    USER_STAGE,
    KeyMaker,
    StepPlan,
    cache_key,
    check_before_work,
    encode_spec,
    explain,
    plan_steps,
    resolve_device,
)
from millrace.control.secrets import key_parts, names_of, open_values
from millrace.control.services import Services
from millrace.core.errors import CancelledError, MillraceError, StageError, from_dict
from millrace.core.operations.runs import RunEvent
from millrace.core.ports import Frame, MetricsFrame, ProgressFrame, Transaction, Work, WorkHandle, WorkResult
from millrace.core.redaction import Redactor
from millrace.core.spec_errors import parse_spec
from millrace.core.states import STEP_DONE_STATES
from millrace.core.types import Artifact, Run, Step
from millrace.core.units import parse_duration, parse_size
from millrace.store.leases import LeaseKeeper, acquire

POLL_S = 0.1
LEASE_TTL_S = 15.0


class Driver:
    """Drives a run to its end in the calling thread. The caller holds the run's lease.

    Args:
        services: The home.
        run: The run to drive.
        emit: Called with everything worth showing; from several threads, one call at a time.
    """

    def __init__(self, services: Services, run: Run, emit: Callable[[RunEvent], None]) -> None:
        self._services = services
        self._run = run
        self._emit_unlocked = emit
        self._lock = threading.Lock()
        self._handles: dict[str, WorkHandle] = {}
        self._cancelled = threading.Event()
        self._journal = Journal(services.records, services.clock)
        self._spec = parse_spec(run.spec_text, Path(run.spec_path).name, run.overrides)
        self._folder = Path(run.spec_path).parent
        self._keys = KeyMaker(self._spec, self._folder, services.stages)
        self._plans = plan_steps(self._spec, services.stages)
        self._steps: dict[str, Step] = {}

    def cancel(self, now: bool = False) -> None:
        """Stop what runs: SIGTERM first, SIGKILL at once with `now`. Thread-safe, idempotent."""
        self._cancelled.set()
        with self._lock:
            handles = list(self._handles.values())
        for handle in handles:
            handle.cancel(grace_s=0.0 if now else 10.0)

    def drive(self, publish: Callable[[Run], None]) -> Run:
        """Run every step that is not done; returns the ended run.

        Args:
            publish: Called with the ended run before anybody can see that it has ended.

        Raises:
            Nothing of a step: a failed step ends the run as `failed` with the step's error.
        """
        clock = self._services.clock
        names = [(plan.name, plan.stage) for plan in self._plans]
        self._run = self._journal.run(self._run.id, "running", started_at=self._run.started_at or clock.now())
        self._steps = self._journal.open_steps(self._run, names)
        error: MillraceError | None = None
        try:
            check_before_work(self._spec, self._plans, self._services.stages, self._folder)
            self._run_all()
        except MillraceError as raised:
            error = raised
        self._skip_rest()
        if self._cancelled.is_set() and error is None and not self._all_done():
            error = CancelledError("the run was cancelled")
        state = "cancelled" if isinstance(error, CancelledError) else "failed" if error else "succeeded"
        end = {"ended_at": clock.now(), "error": error.to_dict() if error else None}
        try:
            publish(msgspec.structs.replace(self._run, state=state, **end))
        finally:
            self._run = self._journal.run(self._run.id, state, **end)
        return self._run

    def _all_done(self) -> bool:
        return all(step.state in STEP_DONE_STATES for step in self._steps.values())

    def _emit(self, event: RunEvent) -> None:
        with self._lock:
            self._emit_unlocked(event)

    def _run_all(self) -> None:
        """Start steps as their needs are done; a timed step has the machine to itself."""
        limit = int(self._services.setting("parallel_steps"))
        limit = limit if limit > 0 else self._parallelism()
        running: dict[Future[None], StepPlan] = {}
        with ThreadPoolExecutor(max_workers=limit, thread_name_prefix="step") as pool:
            try:
                while not self._all_done() and not self._cancelled.is_set():
                    for plan in self._ready([*running.values()], limit):
                        running[pool.submit(self._execute, plan)] = plan
                    if not running:
                        break
                    finished, _ = wait(running, timeout=POLL_S * 5, return_when=FIRST_COMPLETED)
                    self._check_cancel_request()
                    for future in finished:
                        del running[future]
                        future.result()
            except BaseException:
                self.cancel()
                raise

    def _parallelism(self) -> int:
        users = any(plan.stage == USER_STAGE for plan in self._plans)
        return self._services.compute(self._preload()).capacity().cpus if users else 1

    def _ready(self, running: list[StepPlan], limit: int) -> list[StepPlan]:
        if any(self._is_timed(plan) for plan in running):
            return []
        busy = {plan.name for plan in running}
        done = {name for name, step in self._steps.items() if step.state in STEP_DONE_STATES}
        ready = [
            plan for plan in self._plans if plan.name not in busy and plan.name not in done and set(plan.needs) <= done
        ]
        timed = [plan for plan in ready if self._is_timed(plan)]
        others = [plan for plan in ready if not self._is_timed(plan)]
        if others or running:
            return others[: max(0, limit - len(running))]
        return timed[:1]

    def _is_timed(self, plan: StepPlan) -> bool:
        stage = self._services.stages.get(plan.stage)
        return stage is not None and stage.timed

    def _preload(self) -> tuple[str, ...]:
        """Modules worth importing in the fork server while the first step works."""
        wanted = [stage.extras for plan in self._plans if (stage := self._services.stages.get(plan.stage))]
        modules = [module for extras in wanted for module, _ in extras]
        if self._spec.data is not None and self._spec.train.model.endswith(".py") is False:
            modules.extend(["torch"] if ":" in self._spec.train.model else ["sklearn.linear_model", "lightgbm"])
        return tuple(dict.fromkeys(["numpy", *modules]))

    def _check_cancel_request(self) -> None:
        run = self._services.records.get(Run, self._run.id)
        if run is not None and run.tags.get("cancel"):
            self.cancel(now=run.tags["cancel"] == "now")

    # ------------------------------------------------------------------ one step

    def _execute(self, plan: StepPlan) -> None:
        step = self._steps[plan.name]
        try:
            self._execute_step(plan, step)
        except MillraceError as error:
            self._end_badly(plan, error)
            raise

    def _end_badly(self, plan: StepPlan, error: MillraceError) -> None:
        step = self._steps[plan.name]
        state = "cancelled" if isinstance(error, CancelledError) else "failed"
        if step.state in ("pending", "running"):
            ended = {"ended_at": self._services.clock.now(), "error": error.to_dict()}
            step = self._steps[plan.name] = self._journal.step(step, state, **ended)
        self._emit(RunEvent(kind="step", step=plan.name, state=state, error=error.to_dict()))

    def _execute_step(self, plan: StepPlan, step: Step) -> None:
        inputs, params = self._inputs(plan), dict(plan.params)
        names = names_of(self._spec, plan.name, plan.stage)
        parts = {**self._keys.parts(plan, inputs), **key_parts(self._services, self._run.project, names)}
        prepare = PREPARATIONS.get(plan.stage)
        if prepare is not None:
            prepared: Preparation = prepare(self._services, self._spec, parts, self._steps)
            inputs, params = {**inputs, **prepared.inputs}, {**params, **prepared.params}
            parts = {**parts, **prepared.parts}
            if prepared.reuse is not None and self._outputs_exist(prepared.reuse):
                self._take_cached(plan, step, prepared.reuse, prepared.reuse.key_parts)
                return
        key = cache_key(parts)
        with LeaseOnWork(self._services, key, self._cancelled):
            done = self._find_cached(key)
            if done is not None:
                self._take_cached(plan, step, done, parts)
            else:
                self._work(plan, step, inputs=inputs, params=params, parts=parts)

    def _inputs(self, plan: StepPlan) -> dict[str, Artifact]:
        if plan.stage == USER_STAGE:
            names = [f"{need}.{output}" for need in plan.needs for output in self._steps[need].outputs]
        else:
            names = list(plan.inputs)
        found = {}
        for name in names:
            step, _, output = name.partition(".")
            artifact = self._steps[step].outputs.get(output)
            if artifact is not None:
                found[name] = artifact
        return found

    def _find_cached(self, key: str) -> Step | None:
        records = self._services.records
        for found in records.find(Step, {"cache_key": key, "state": "succeeded"}, order="-created_at", limit=3):
            if self._outputs_exist(found):
                return found
        return None

    def _outputs_exist(self, step: Step) -> bool:
        return all(self._services.blobs.exists(artifact.digest) for artifact in step.outputs.values())

    def _take_cached(self, plan: StepPlan, step: Step, done: Step, parts: Mapping[str, str]) -> None:
        now = self._services.clock.now()
        self._steps[plan.name] = self._journal.step(
            step, "cached", cache_key=done.cache_key, key_parts=dict(parts), cached_from=done.id, outputs=done.outputs,
            facts=done.facts, started_at=now, ended_at=now, log_path=done.log_path, reason="nothing changed",
            environment=done.environment,
        )  # fmt: skip
        self._emit(RunEvent(kind="step", step=plan.name, state="cached", facts=done.facts))

    def _work(
        self,
        plan: StepPlan,
        step: Step,
        *,
        inputs: Mapping[str, Artifact],
        params: Mapping[str, Any],
        parts: Mapping[str, str],
    ) -> None:
        key, names = cache_key(parts), names_of(self._spec, plan.name, plan.stage)
        home = self._services.home
        if names and plan.stage == USER_STAGE:
            params = {**params, "secrets": names}  # which a script finds in its environment
        log_path = home / "logs" / self._run.id / f"{plan.name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        started = self._services.clock.now()
        reason = explain(last_parts(self._services, step), parts)
        step = self._steps[plan.name] = self._journal.step(
            step, "running", cache_key=key, key_parts=dict(parts), attempt=step.attempt + 1, started_at=started,
            log_path=str(log_path), reason=reason,
        )  # fmt: skip
        self._emit(RunEvent(kind="step", step=plan.name, state="running", text=reason))
        work = Work(
            step_id=step.id, run_id=self._run.id, name=plan.name, implementation=plan.implementation,
            spec=encode_spec(self._spec), inputs=dict(inputs), params=dict(params), seed=self._spec.train.seed,
            threads=self._spec.train.threads, device=resolve_device(self._spec.train.device),
            project_dir=str(self._folder), scratch_dir=str(home / "scratch" / "steps" / key[:32]),
            log_path=str(log_path), home_dir=str(home),
            memory_limit_bytes=parse_size(plan.memory) if plan.memory is not None else None,
            wall_time_s=parse_duration(plan.wall_time) if plan.wall_time is not None else None,
            project=self._run.project, secrets=names,
        )  # fmt: skip
        values = open_values(self._services, self._run.project, names)
        hide = Redactor(values.values())
        result = _hidden(self._await(plan, work, values, hide), hide)
        self._finish(plan, step, result, started)

    def _await(self, plan: StepPlan, work: Work, secrets: Mapping[str, str], hide: Redactor) -> WorkResult:
        def on_frame(frame: Frame) -> None:
            if isinstance(frame, MetricsFrame):
                points = frame.points
                if hide:
                    points = [msgspec.structs.replace(one, name=hide.text(one.name)) for one in points]
                self._services.records.append_metrics(points)
            elif isinstance(frame, ProgressFrame):
                text = hide.text(frame.text)
                self._emit(RunEvent(kind="progress", step=plan.name, text=text, done=frame.done, total=frame.total))

        handle = self._services.compute(self._preload()).submit(work, on_frame, secrets)
        with self._lock:
            self._handles[plan.name] = handle
        if self._cancelled.is_set():
            handle.cancel()
        try:
            while (result := handle.wait(POLL_S)) is None:
                continue
        finally:
            with self._lock:
                self._handles.pop(plan.name, None)
        return result

    def _finish(self, plan: StepPlan, step: Step, result: WorkResult, started: float) -> None:
        if result.state == "cancelled":
            raise CancelledError(f"step {plan.name} was cancelled")
        if result.state == "failed":
            raise from_dict(result.error or StageError(f"step {plan.name} failed").to_dict())
        now = self._services.clock.now()
        commit, before = COMMITS.get(plan.stage), BEFORE_COMMITS.get(plan.stage)
        if before is not None:
            before(self._services, result.outputs)

        def apply(transaction: Transaction, changed: Step) -> Step:
            return commit(self._services, transaction, self._run, self._spec, changed) if commit else changed

        self._steps[plan.name] = done = self._journal.step(
            step, "succeeded", apply, outputs=result.outputs, facts=result.facts, ended_at=now,
            environment=result.environment,
        )  # fmt: skip
        self._emit(RunEvent(kind="step", step=plan.name, state="succeeded", facts=done.facts, duration_s=now - started))

    def _skip_rest(self) -> None:
        for name, step in self._steps.items():
            if step.state == "pending":
                self._steps[name] = self._journal.step(step, "skipped")


def _hidden(result: WorkResult, hide: Redactor) -> WorkResult:
    """A worker hides values itself; what is said of one that has died is hidden here."""
    if not hide:
        return result
    return msgspec.structs.replace(result, facts=hide.plain(result.facts), error=hide.plain(result.error))


class LeaseOnWork:
    """Two runs that need the same work at once: one does it, the other takes its result."""

    def __init__(self, services: Services, key: str, cancelled: threading.Event) -> None:
        self._services = services
        self._name = f"work/{key}"
        self._cancelled = cancelled
        self._keeper: LeaseKeeper | None = None

    def __enter__(self) -> LeaseOnWork:
        records, clock = self._services.records, self._services.clock
        while (lease := acquire(records, self._name, clock, LEASE_TTL_S)) is None:
            if self._cancelled.wait(POLL_S):
                raise CancelledError("the run was cancelled while it waited for the same work of another run")
        self._keeper = LeaseKeeper(records, lease, clock, LEASE_TTL_S)
        self._keeper.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._keeper is not None
        self._keeper.__exit__(None, None, None)


def last_parts(services: Services, step: Step) -> dict[str, str] | None:
    """The key parts of the newest earlier step of the same name and project that had a key."""
    found = services.records.find(
        Step,
        {"name": step.name, "project": step.project, "state": ["succeeded", "cached"]},
        order="-created_at",
        limit=1,
    )
    return found[0].key_parts if found else None
