"""Works for workers on other machines: claimed once, reported on, fenced by their attempt."""

from __future__ import annotations

import msgspec

import millrace
from millrace.control.dispatch import handles
from millrace.control.drivers import live_lease
from millrace.control.secrets import values_at_hand
from millrace.control.services import Services
from millrace.control.tokens import drop_work_tokens, make_work_token
from millrace.core.errors import ConflictError, InputError, NotFoundError
from millrace.core.operations import works as ops
from millrace.core.ports import Work, WorkResult
from millrace.core.states import RUN_END_STATES
from millrace.core.types import Event, Run, WorkFrame, WorkItem


@handles(ops.CLAIM_WORK)
def claim_work(services: Services, body: ops.ClaimRequest) -> ops.WorkOrder | None:
    """The oldest work that waits, for this worker alone."""
    if body.version != millrace.__version__:
        raise InputError(
            f"this server has Millrace {millrace.__version__}, the worker {body.worker!r} has {body.version}",
            hint=f"pip install millrace=={millrace.__version__} on the worker",
        )
    for waiting in services.records.find(WorkItem, {"state": "queued"}):
        if not _is_wanted(services, waiting):
            continue
        order = _claim(services, waiting.id, body.worker)
        if order is not None:
            return order
    return None


def _claim(services: Services, work_id: str, worker: str) -> ops.WorkOrder | None:
    now = services.clock.now()
    with services.records.transaction() as transaction:
        item = transaction.get(WorkItem, work_id)
        if item is None or item.state != "queued" or item.cancel:  # another one was quicker
            return None
        claimed = msgspec.structs.replace(
            item, state="claimed", attempt=item.attempt + 1, worker=worker, seen_at=now, received=0
        )
        transaction.put(claimed, item.version)
        secret = make_work_token(transaction, work_id, f"work {item.name}", now)
        event = Event(at=now, actor=f"worker:{worker}", verb="work.claim", subject=f"run:{item.run_id}",
                      detail={"step": item.name, "attempt": claimed.attempt})  # fmt: skip
        transaction.append(event)
    work = msgspec.convert(item.work, Work)
    return ops.WorkOrder(
        id=work_id, attempt=claimed.attempt, work=work, project_tree=item.project_tree, token=secret,
        silence_s=services.setting("heartbeat_timeout_s"),
        secrets=values_at_hand(services, work.project, work.secrets),
    )  # fmt: skip


@handles(ops.REPORT_WORK)
def report_work(services: Services, body: ops.ReportRequest) -> ops.ReportAnswer:
    """Store frames, each once, in order; the result ends the work."""
    now = services.clock.now()
    with services.records.transaction() as transaction:
        item = transaction.get(WorkItem, body.work)
        if item is None or transaction.get(Run, item.run_id) is None:  # one of other projects is not seen
            raise NotFoundError(f"there is no work {body.work[:64]!r}", hint="its run has ended: stop working")
        if body.attempt != item.attempt or item.state != "claimed":
            raise ConflictError(
                f"attempt {body.attempt} of the work {item.name} counts no more: it is {item.state}, "
                f"attempt {item.attempt}",
                hint="stop working on it",
            )
        if body.first > item.received:
            raise InputError(f"frames {item.received} to {body.first} of the work {item.name} are missing")
        new = body.frames[item.received - body.first :]
        received = item.received + len(new)
        has_ended = any(isinstance(frame, WorkResult) for frame in new)
        if new:
            frames = [msgspec.to_builtins(frame) for frame in new]
            stored = WorkFrame(id=f"{item.id}/{item.attempt}/{item.received}", created_at=now, work_id=item.id,
                               number=item.received, frames=frames)  # fmt: skip
            transaction.put(stored, expect_version=0)
        changed = msgspec.structs.replace(
            item, received=received, seen_at=now, state="ended" if has_ended else item.state
        )
        transaction.put(changed, item.version)
        if has_ended:
            drop_work_tokens(transaction, item.id)
    # A run whose driver has died is taken up by another one, which asks for the work anew.
    is_wanted = has_ended or _is_wanted(services, item)
    return ops.ReportAnswer(received=received, cancel=item.cancel if is_wanted else "now")


def _is_wanted(services: Services, item: WorkItem) -> bool:
    """Whether a living driver waits for it."""
    run = services.records.get(Run, item.run_id)
    return run is not None and run.state not in RUN_END_STATES and live_lease(services, run) is not None
