"""Promotions that want a second person: asked for by one, approved by others, then done."""

from __future__ import annotations

import msgspec

from millrace.control.authorisation import acting_principal
from millrace.control.dispatch import handles, local_principal
from millrace.control.moves import move_alias
from millrace.control.services import Services
from millrace.core.errors import ApprovalNeededError, ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.operations import Page
from millrace.core.operations import governance as ops
from millrace.core.ports import Transaction
from millrace.core.types import Alias, Approval, ApprovalRule, ModelVersion


def person() -> str:
    """Whoever is asking, the same whichever of their tokens they use."""
    principal = acting_principal()
    return (principal.id if principal is not None else local_principal()).partition("/")[0]


def promote(services: Services, version: ModelVersion, alias: str, *, reason: str, expect: int | None = None) -> Alias:
    """Point an alias at a version, or ask for it where a rule of the project wants other people.

    Raises:
        ApprovalNeededError: It waits for somebody now; `details["approval"]` is its id.
        ConflictError: The alias is not at `expect`.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        waiting = ask(transaction, version, alias, asked_by=person(), reason=reason, now=now)
        if waiting is None:
            return move_alias(transaction, version.name, alias, version.number, at=now, reason=reason, expect=expect)
    raise ApprovalNeededError(
        f"{version.name} v{version.number} is not {alias} yet: the project {version.project!r} wants somebody else "
        f"to agree",
        hint=f"another person: `millrace approvals approve {waiting.id}`",
        details={"approval": waiting.id},
    )


def ask(
    transaction: Transaction, version: ModelVersion, alias: str, *, asked_by: str, reason: str, now: float
) -> Approval | None:
    """The approval that a promotion waits for; None where no rule wants one. The first who asks is remembered."""
    if transaction.get(ApprovalRule, f"{version.project}/{alias}") is None:
        return None
    for one in transaction.find(Approval, {"model": version.name, "state": "waiting"}):
        if (one.alias, one.number) == (alias, version.number):
            return one
    waiting = Approval(
        id=new_id(), project=version.project, created_at=now, model=version.name, alias=alias, number=version.number,
        asked_by=asked_by, reason=reason,
    )  # fmt: skip
    return transaction.put(waiting, expect_version=0)


def check_removal(transaction: Transaction, project: str, alias: str) -> None:
    """Refuse to remove an alias that a rule guards.

    Raises:
        DeniedError: One does.
    """
    if transaction.get(ApprovalRule, f"{project}/{alias}") is not None:
        raise DeniedError(
            f"the alias {alias!r} is guarded in the project {project!r}: it can be moved, not removed",
            hint="an owner can delete the rule: `millrace approval-rules delete`",
        )


@handles(ops.LIST_RULES)
def list_rules(services: Services, body: Page) -> list[ApprovalRule]:
    """Oldest first."""
    return services.records.find(ApprovalRule, limit=body.limit, offset=body.offset) if services.is_used else []


@handles(ops.SET_RULE)
def set_rule(services: Services, body: ops.RuleSet) -> ApprovalRule:
    """Made or changed."""
    if not 1 <= body.needed <= 10:
        raise InputError(f"a promotion wants 1 to 10 other people, got {body.needed}")
    id = f"{body.in_project}/{body.alias}"
    with services.records.transaction() as transaction:
        old = transaction.get(ApprovalRule, id)
        rule = ApprovalRule(
            id=id, project=body.in_project, created_at=old.created_at if old else services.clock.now(),
            alias=body.alias, needed=body.needed,
        )  # fmt: skip
        return transaction.put(rule)


@handles(ops.DELETE_RULE)
def delete_rule(services: Services, body: ops.RuleRequest) -> ApprovalRule:
    """Forgotten; what waits by it can be promoted by asking again."""
    with services.records.transaction() as transaction:
        rule = transaction.get(ApprovalRule, f"{body.in_project}/{body.alias}")
        if rule is None:
            raise NotFoundError(
                f"no rule guards {body.alias!r} in the project {body.in_project!r}",
                hint="`millrace approval-rules` lists them",
            )
        transaction.delete(ApprovalRule, rule.id)
    return rule


@handles(ops.LIST_APPROVALS)
def list_approvals(services: Services, body: ops.ApprovalList) -> list[Approval]:
    """Newest first."""
    where = {"state": body.state} if body.state else {}
    if not services.is_used:
        return []
    return services.records.find(Approval, where, order="-created_at", limit=body.limit, offset=body.offset)


@handles(ops.APPROVE)
def approve(services: Services, body: ops.Decision) -> Approval:
    """Agree; with the last one that is needed the alias moves."""
    now, who = services.clock.now(), person()
    with services.records.transaction() as transaction:
        approval = _waiting(transaction, body.name)
        if who == approval.asked_by:
            raise DeniedError(f"{who} has asked for it, and cannot be the one who agrees", hint="ask a second person")
        if who in approval.approved_by:
            raise ConflictError(f"{who} has agreed already", hint="ask another person")
        approved_by = (*approval.approved_by, who)
        rule = transaction.get(ApprovalRule, f"{approval.project}/{approval.alias}")
        is_enough = rule is None or len(approved_by) >= rule.needed
        if is_enough:
            found = transaction.find(ModelVersion, {"name": approval.model, "number": approval.number})
            if not found:
                raise NotFoundError(f"{approval.model} v{approval.number} is gone: it cannot be promoted")
            text = f"{approval.reason}; asked by {approval.asked_by}, agreed to by {', '.join(approved_by)}"
            move_alias(transaction, approval.model, approval.alias, approval.number, at=now, reason=text)
        changed = msgspec.structs.replace(approval, approved_by=approved_by, state="used" if is_enough else "waiting")
        return transaction.put(changed, approval.version)


@handles(ops.REFUSE)
def refuse(services: Services, body: ops.Decision) -> Approval:
    """It is not promoted; whoever asked may take it back so too."""
    with services.records.transaction() as transaction:
        approval = _waiting(transaction, body.name)
        text = f"{approval.reason}; refused by {person()}: {body.reason or 'no reason given'}"
        changed = msgspec.structs.replace(approval, state="refused", reason=text)
        return transaction.put(changed, approval.version)


def _waiting(transaction: Transaction, id: str) -> Approval:
    approval = transaction.get(Approval, id)
    if approval is None:
        raise NotFoundError(f"there is no approval {id[:64]!r}", hint="`millrace approvals` lists them")
    if approval.state != "waiting":
        raise ConflictError(f"the approval {id} is {approval.state} already")
    return approval
