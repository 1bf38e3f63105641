"""Verbs that govern a project: approval rules and approvals, quotas."""

from __future__ import annotations

from typing import Literal

from millrace.core.operations import Operation, Page, Request
from millrace.core.operations.live import NameRequest
from millrace.core.types import Approval, ApprovalRule, Quota


class RuleSet(Request, frozen=True, kw_only=True):
    """Promotions of the project's models to the alias want so many other people."""

    in_project: str
    alias: str = "champion"
    needed: int = 1


class RuleRequest(Request, frozen=True, kw_only=True):
    """The rule of an alias in a project."""

    in_project: str
    alias: str = "champion"


class ApprovalList(Page, frozen=True, kw_only=True):
    """Approvals, newest first; of one state."""

    state: Literal["waiting", "approved", "refused", "used"] | None = None


class Decision(NameRequest, frozen=True, kw_only=True):
    """An approval by id, and why."""

    reason: str = ""


class QuotaSet(Request, frozen=True, kw_only=True):
    """Bounds of a project: `storage` such as 50GB, `runs` at once, `requests_per_s`; absent ones do not bind."""

    in_project: str
    storage: str | None = None
    runs: int | None = None
    requests_per_s: float | None = None


LIST_RULES = Operation(
    name="approval_rule.list", summary="Which promotions want a second person.", request=Page,
    response=list[ApprovalRule], method="GET", path="/approval-rules",
)  # fmt: skip
SET_RULE = Operation(
    name="approval_rule.set", summary="Promotions to an alias of a project want other people.", request=RuleSet,
    response=ApprovalRule, method="POST", path="/approval-rules", is_write=True, subject_kind="project",
    subject_field="in_project", example={"in_project": "digits", "alias": "champion"},
)  # fmt: skip
DELETE_RULE = Operation(
    name="approval_rule.delete", summary="Promotions to an alias need nobody else any more.", request=RuleRequest,
    response=ApprovalRule, method="POST", path="/approval-rules/delete", is_write=True, subject_kind="project",
    subject_field="in_project", example={"in_project": "digits", "alias": "champion"},
)  # fmt: skip
LIST_APPROVALS = Operation(
    name="approval.list", summary="Promotions that wait for somebody, newest first.", request=ApprovalList,
    response=list[Approval], method="GET", path="/approvals",
)  # fmt: skip
APPROVE = Operation(
    name="approval.approve", summary="Agree to a promotion that somebody else has asked for.", request=Decision,
    response=Approval, method="POST", path="/approvals/{name}/approve", is_write=True, subject_kind="approval",
    subject_field="name", example={"name": "0" * 32, "reason": "measured on Monday's data"},
)  # fmt: skip
REFUSE = Operation(
    name="approval.refuse", summary="Refuse a promotion.", request=Decision, response=Approval, method="POST",
    path="/approvals/{name}/refuse", is_write=True, subject_kind="approval", subject_field="name",
    example={"name": "0" * 32, "reason": "too slow on the target"},
)  # fmt: skip
LIST_QUOTAS = Operation(
    name="quota.list", summary="What projects may use.", request=Page, response=list[Quota], method="GET",
    path="/quotas",
)  # fmt: skip
SET_QUOTA = Operation(
    name="quota.set", summary="Bound what a project may use.", request=QuotaSet, response=Quota, method="POST",
    path="/quotas", is_write=True, subject_kind="project", subject_field="in_project",
    example={"in_project": "digits", "storage": "50GB", "runs": 4},
)  # fmt: skip
OPERATIONS = (
    LIST_RULES, SET_RULE, DELETE_RULE, LIST_APPROVALS, APPROVE, REFUSE, LIST_QUOTAS, SET_QUOTA,
)  # fmt: skip
