"""Verbs of workers on other machines, and of tokens."""

from __future__ import annotations

from typing import Literal

from millrace.core.operations import Operation, Page, Request
from millrace.core.operations.live import NameRequest
from millrace.core.ports import HeartbeatFrame, LogFrame, MetricsFrame, OutputFrame, ProgressFrame, Work, WorkResult
from millrace.core.types import Artifact, Struct, Token


class ClaimRequest(Request, frozen=True, kw_only=True):
    """A worker asks for a work. `worker` names it to people; `version` is its Millrace's."""

    worker: str
    version: str


class WorkOrder(Struct, frozen=True, kw_only=True):
    """A claimed work.

    Its paths are the driver's: the worker puts its own there. `token` is good for this work alone, until it ends.
    `silence_s`: a worker that is not heard for so long has lost the work.
    """

    id: str
    attempt: int
    work: Work
    project_tree: Artifact | None
    token: str
    silence_s: float
    secrets: dict[str, str] = {}

    def __repr__(self) -> str:
        """Without the token and the values."""
        return f"WorkOrder({self.id!r}, attempt={self.attempt})"


class ReportRequest(Request, frozen=True, kw_only=True):
    """Frames of a work; `first` counts those before them, so that a repeated report adds nothing."""

    work: str
    attempt: int
    first: int = 0
    frames: list[ProgressFrame | MetricsFrame | OutputFrame | HeartbeatFrame | LogFrame | WorkResult] = []


class ReportAnswer(Struct, frozen=True, kw_only=True):
    """How many frames are stored, and whether the work is to end: `ask` politely, `now` at once."""

    received: int
    cancel: Literal["", "ask", "now"]


class TokenCreate(Request, frozen=True, kw_only=True):
    """A token for a client.

    `scope`: roles, each alone or as `role:project`, with commas between. `expires`: a duration such as 720h; by
    default never. `user`: the service account that it acts for; by default whoever makes it.
    """

    name: str
    scope: str = "worker"
    expires: str | None = None
    user: str | None = None


class CreatedToken(Struct, frozen=True, kw_only=True):
    """`secret` is shown this once and kept nowhere."""

    secret: str
    token: Token


CLAIM_WORK = Operation(
    name="work.claim", summary="Take a work to do; null where none waits.", request=ClaimRequest,
    response=WorkOrder | None, method="POST", path="/works/claim", is_write=True, is_audited=False,
    subject_kind="work", example={"worker": "gpu-1", "version": "0.1.0"},
)  # fmt: skip
REPORT_WORK = Operation(
    name="work.report", summary="Say how a work goes.", request=ReportRequest, response=ReportAnswer, method="POST",
    path="/works/{work}/report", is_write=True, is_audited=False, subject_kind="work", subject_field="work",
    example={"work": "0" * 32, "attempt": 1, "frames": []},
)  # fmt: skip
LIST_TOKENS = Operation(
    name="token.list", summary="Tokens, without their secrets.", request=Page, response=list[Token], method="GET",
    path="/tokens",
)  # fmt: skip
CREATE_TOKEN = Operation(
    name="token.create", summary="Make a token; its secret is shown once.", request=TokenCreate,
    response=CreatedToken, method="POST", path="/tokens", is_write=True, subject_kind="token", subject_field="name",
    example={"name": "gpu-1", "scope": "worker"},
)  # fmt: skip
REVOKE_TOKEN = Operation(
    name="token.revoke", summary="Refuse a token from now on.", request=NameRequest, response=Token, method="POST",
    path="/tokens/{name}/revoke", is_write=True, subject_kind="token", subject_field="name",
    example={"name": "gpu-1"},
)  # fmt: skip
OPERATIONS = (CLAIM_WORK, REPORT_WORK, LIST_TOKENS, CREATE_TOKEN, REVOKE_TOKEN)
