"""Verbs of a rollout: a candidate beside what an endpoint serves, until it is promoted or aborted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec

from millrace.control.approvals import promote
from millrace.control.authorisation import acting_principal, authorise
from millrace.control.dispatch import handles, local_principal
from millrace.control.endpoints import wanted_number
from millrace.control.models import open_version, resolve_model
from millrace.control.services import Services
from millrace.control.traffic import requests_per_min
from millrace.core import extras
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.operations import live as ops
from millrace.core.operations.registry import PROMOTE_MODEL
from millrace.core.ports import Transaction
from millrace.core.principals import includes
from millrace.core.refs import Ref
from millrace.core.types import Endpoint, ModelVersion, Rollout

_HARMFUL = "a candidate that fails in 5 % of its requests, where the baseline fails in 1 %,"


@handles(ops.START_ROLLOUT)
def start_rollout(services: Services, body: ops.RolloutRequest) -> Endpoint:
    """Write what is wanted; a server's loop serves the candidate within a second."""
    steps = check_steps(body.steps)
    endpoint = _endpoint_of(services, body.name)
    if not endpoint.is_managed:
        raise ConflictError(
            f"the endpoint {endpoint.name!r} lives with the command that serves it",
            hint="`millrace deploy` keeps an endpoint; that one can have a rollout",
        )
    if endpoint.rollout is not None and endpoint.rollout.is_active:
        raise ConflictError(
            f"the endpoint {endpoint.name!r} has a rollout already, of v{endpoint.rollout.number}",
            hint=f"`millrace endpoints promote {endpoint.name}` or `abort` ends it",
        )
    candidate = resolve_model(services, body.model)
    if candidate.name != endpoint.model:
        raise InputError(
            f"the endpoint {endpoint.name!r} serves {endpoint.model!r}: want another version of that, "
            f"got {candidate.name} v{candidate.number}",
            hint="deploy another model to an endpoint of its own",
        )
    base = resolve_model(services, f"{endpoint.model}@{wanted_number(services, endpoint)}")
    variant = _check_candidate(services, endpoint, base, candidate, body.variant)
    principal, now = acting_principal(), services.clock.now()
    rollout = Rollout(
        id=new_id(), number=candidate.number, variant=body.variant or "", base=base.number,
        label=str(candidate.number) if candidate.number != base.number else f"{candidate.number}-{variant}",
        steps=steps, is_shadow=body.shadow, is_held=body.hold, started_at=now,
        by=principal.id if principal is not None else local_principal(),
    )  # fmt: skip
    with services.records.transaction() as transaction:
        return transaction.put(msgspec.structs.replace(endpoint, rollout=rollout), expect_version=endpoint.version)


@handles(ops.PROMOTE_ROLLOUT)
def promote_rollout(services: Services, body: ops.RolloutEnd) -> Endpoint:
    """The candidate is what the endpoint serves. An alias that the endpoint follows is moved to it."""
    endpoint, rollout = _active(services, body)
    if rollout.state == "starting":
        raise ConflictError(
            f"the candidate v{rollout.number} is not loaded yet", hint=f"`millrace endpoints status {endpoint.name}`"
        )
    reason = body.reason or "promoted by hand"
    if endpoint.alias is not None and rollout.number != rollout.base:
        _check_may_promote(services, endpoint)
        version = resolve_model(services, f"{endpoint.model}@{rollout.number}")
        promote(services, version, endpoint.alias, reason=f"rollout of {endpoint.name}: {reason}")
    with services.records.transaction() as transaction:
        return put_ended(
            transaction, endpoint.name, rollout.id, "promoted", reason, services.clock.now(),
            number=rollout.number, variant=rollout.variant,
        )  # fmt: skip


@handles(ops.ABORT_ROLLOUT)
def abort_rollout(services: Services, body: ops.RolloutEnd) -> Endpoint:
    """Everything goes to the baseline from the next round of the loop on."""
    endpoint, rollout = _active(services, body)
    with services.records.transaction() as transaction:
        reason = body.reason or "aborted by hand"
        return put_ended(transaction, endpoint.name, rollout.id, "aborted", reason, services.clock.now())


@handles(ops.FORECAST_ROLLOUT)
def forecast_rollout(services: Services, body: ops.ForecastRequest) -> ops.RolloutForecast:
    """From the traffic of the last minutes, and simulated rollouts."""
    if not 0 < body.weight < 100:
        raise InputError(f"want a share of the requests between 0 and 100 percent, got {body.weight:g}")
    endpoint = _endpoint_of(services, body.name)
    median, late = extras.load("millrace.stats.canary:requests_to_find")(body.weight / 100)
    rate = requests_per_min(endpoint.facts.get("traffic", {}), services.clock.now())
    if rate:
        text = (
            f"{_HARMFUL} is found in {_minutes(median / rate)} (median; 95 % of the time within "
            f"{_minutes(late / rate)}) at {body.weight:g} % of {_rate(rate)} requests/min"
        )
    else:
        text = (
            f"{_HARMFUL} is found after {median:.0f} requests (median; 95 % of the time within {late:.0f}) at "
            f"{body.weight:g} %; no traffic was measured in the last minutes, so nobody knows how long that takes"
        )
    return ops.RolloutForecast(
        endpoint=endpoint.name, weight=body.weight, requests_per_min=rate, median_requests=median,
        p95_requests=late, median_min=median / rate if rate else None, p95_min=late / rate if rate else None,
        text=text,
    )  # fmt: skip


def _rate(per_min: float) -> str:
    return f"{per_min:,.0f}" if per_min >= 10 else f"{per_min:.2g}"


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def check_steps(steps: Sequence[float]) -> tuple[float, ...]:
    """A candidate's shares of the requests, in order; 100 at the end is the promotion, which needs no step.

    Raises:
        InputError: They do not grow, or are not between 0 and 100.

    Example:
        >>> check_steps([10, 50, 100])
        (10, 50)
    """
    wanted = tuple(steps[:-1] if len(steps) > 1 and steps[-1] == 100 else steps)
    if not wanted or len(wanted) > 20 or not all(0 < step < 100 for step in wanted):
        raise InputError(
            f"want 1 to 20 steps between 0 and 100 percent, got {', '.join(f'{step:g}' for step in steps)[:80] or '-'}",
            hint="`millrace deploy` gives a version all requests at once",
        )
    if any(after <= before for before, after in pairwise(wanted)):
        raise InputError(f"want steps that grow, got {', '.join(f'{step:g}' for step in wanted)}")
    return wanted


def put_ended(
    transaction: Transaction, name: str, rollout: str, state: Literal["promoted", "aborted"], reason: str, now: float,
    **changes: Any,
) -> Endpoint:  # fmt: skip
    """End a rollout.

    Args:
        transaction: Where.
        name: The endpoint's.
        rollout: Its id.
        state: How it ended.
        reason: Why.
        now: In seconds since 1970.
        changes: Further ones, of the endpoint.

    Raises:
        ConflictError: It has ended already.
    """
    endpoint = transaction.get(Endpoint, name)
    if endpoint is None or endpoint.rollout is None or endpoint.rollout.id != rollout or not endpoint.rollout.is_active:
        raise ConflictError(f"the rollout of {name!r} has ended already", hint=f"`millrace endpoints status {name}`")
    ended = msgspec.structs.replace(endpoint.rollout, state=state, reason=reason, ended_at=now)
    return transaction.put(
        msgspec.structs.replace(endpoint, rollout=ended, **changes), expect_version=endpoint.version
    )  # fmt: skip


def _active(services: Services, body: ops.RolloutEnd) -> tuple[Endpoint, Rollout]:
    endpoint = _endpoint_of(services, body.name)
    rollout = endpoint.rollout
    if rollout is None or not rollout.is_active or body.rollout not in (None, rollout.id):
        raise ConflictError(
            f"the endpoint {endpoint.name!r} has no such rollout now" if body.rollout else
            f"the endpoint {endpoint.name!r} has no rollout now",
            hint=f"`millrace endpoints rollout {endpoint.name} MODEL` starts one",
        )  # fmt: skip
    return endpoint, rollout


def _endpoint_of(services: Services, name: str) -> Endpoint:
    Ref.parse(name, kind="endpoint")
    endpoint = services.records.get(Endpoint, name) if services.is_used else None
    if endpoint is None:
        raise NotFoundError(f"there is no endpoint {name!r} in {services.home}", hint="`millrace endpoints`")
    return endpoint


def _check_candidate(
    services: Services, endpoint: Endpoint, base: ModelVersion, candidate: ModelVersion, variant: str | None
) -> str:
    """The variant of a candidate that can take the baseline's requests.

    Raises:
        ConflictError: It is what is served.
        InputError: It reads other tensors, or is never loaded.
    """
    if candidate.format != "bundle":
        raise InputError(f"{candidate.name} v{candidate.number} is kept as it was logged and is never loaded")
    chosen = variant or candidate.chosen_variant
    if (candidate.number, chosen) == (base.number, endpoint.variant or base.chosen_variant):
        raise ConflictError(
            f"{candidate.name} v{candidate.number} ({chosen}) is what {endpoint.name!r} serves already",
            hint="`millrace models` lists versions; `--variant` names another of the same",
        )
    open_bundle = extras.load("millrace.formats.bundle:open_bundle")
    signatures: list[Any] = []
    for version in (base, candidate):
        folder = open_version(services, version)
        bundle = open_bundle(folder, signature=None, verifier=None, expected_digest=version.bundle.digest)
        signatures.append(bundle.signature)
        if version is candidate:
            bundle.model_path(chosen)
    ours, theirs = [{one.name: (one.dtype, one.shape) for one in signature.inputs} for signature in signatures]
    if ours != theirs:
        different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        raise InputError(
            f"{candidate.name} v{candidate.number} reads other inputs than v{base.number}, so that requests for one "
            f"are wrong for the other: {', '.join(different)[:200]}",
            hint="deploy it to an endpoint of its own, and let clients move",
        )
    return chosen


def _check_may_promote(services: Services, endpoint: Endpoint) -> None:
    """Who promotes moves the alias: that wants the same right as moving it by hand."""
    principal = acting_principal()
    if principal is None:
        return
    where = authorise(services, principal, PROMOTE_MODEL, None)
    if not includes(where, endpoint.project):
        raise DeniedError(
            f"{endpoint.name!r} follows the alias {endpoint.alias!r}: {principal.id} may not move it in the project "
            f"{endpoint.project!r}",
            hint="ask somebody who may `model.promote` there",
        )
