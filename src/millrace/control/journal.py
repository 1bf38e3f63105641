"""Every transition of a run or a step is one durable transaction, with its event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from millrace.core.clock import Clock
from millrace.core.errors import ConflictError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.ports import Records, Transaction
from millrace.core.states import RUN_TRANSITIONS, STEP_TRANSITIONS, check_transition
from millrace.core.types import Event, Run, Step

ACTOR = "system:driver"


class Journal:
    """Writes one run's records. Only the driver that holds the run's lease has one."""

    def __init__(self, records: Records, clock: Clock) -> None:
        self._records = records
        self._clock = clock

    def open_steps(self, run: Run, names: Sequence[tuple[str, str]]) -> dict[str, Step]:
        """The run's steps by name; missing ones are created, ones a dead driver left running reset."""
        existing = {step.name: step for step in self._records.find(Step, {"run_id": run.id})}
        steps: dict[str, Step] = {}
        with self._records.transaction() as transaction:
            for name, stage in names:
                step = existing.get(name)
                if step is None:
                    step = Step(
                        id=new_id(), project=run.project, created_at=self._clock.now(), run_id=run.id, name=name,
                        stage=stage,
                    )  # fmt: skip
                    step = transaction.put(step, expect_version=0)
                elif step.state not in ("succeeded", "cached", "pending"):
                    check_transition(STEP_TRANSITIONS, step.state, "pending")
                    step = transaction.put(msgspec.structs.replace(step, state="pending", error=None), step.version)
                steps[name] = step
        return steps

    def step(
        self,
        step: Step,
        state: str,
        commit: Callable[[Transaction, Step], Step] | None = None,
        **changes: Any,
    ) -> Step:
        """Move a step on; `commit` may add other records to the same transaction.

        Raises:
            ConflictError: Another driver wrote the step: this one has lost its lease.
        """
        check_transition(STEP_TRANSITIONS, step.state, state)
        changed = msgspec.structs.replace(step, state=state, **changes)
        with self._records.transaction() as transaction:
            if commit is not None:
                changed = commit(transaction, changed)
            stored = transaction.put(changed, expect_version=step.version)
            transaction.append(self._event(f"step.{state}", f"step:{stored.id}", {"name": step.name}))
        return stored

    def run(self, run_id: str, state: str, **changes: Any) -> Run:
        """Move a run on; repeated when somebody only added a tag meanwhile."""
        for _ in range(20):
            run = self._records.get(Run, run_id)
            if run is None:
                raise NotFoundError(f"run {run_id} was deleted")
            check_transition(RUN_TRANSITIONS, run.state, state)
            changed = msgspec.structs.replace(run, state=state, **changes)
            try:
                with self._records.transaction() as transaction:
                    stored = transaction.put(changed, expect_version=run.version)
                    transaction.append(self._event(f"run.{state}", f"run:{run_id}", {}))
            except ConflictError:
                continue
            return stored
        raise ConflictError(f"run {run_id} is being changed by somebody else")

    def _event(self, verb: str, subject: str, detail: dict[str, Any]) -> Event:
        return Event(at=self._clock.now(), actor=ACTOR, verb=verb, subject=subject, detail=detail)
