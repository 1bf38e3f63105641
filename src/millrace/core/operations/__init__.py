"""The operation table: every verb is one value here and one handler in `control`."""

from __future__ import annotations

from typing import Any

import msgspec

from millrace.core.types import Struct


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request: unknown fields are refused."""


class Page(Request, frozen=True, kw_only=True):
    """Which part of a list."""

    limit: int = 100
    offset: int = 0


class Operation(Struct, frozen=True, kw_only=True):
    """One verb.

    `name` is noun.verb; `is_write` operations are audited; `is_stream` ones answer with a sequence;
    `is_raw` ones send or take plain bytes over HTTP, by a route of their own;
    `method` and `path` are its HTTP route; `subject_field` names the request field that says on what. A stream
    can be resumed: `cursor_field` of an answer is where it stands, `resume_field` of the request goes on there.
    """

    name: str
    summary: str
    request: type[Any]
    response: Any
    method: str
    path: str
    is_write: bool = False
    is_stream: bool = False
    is_audited: bool = True
    subject_kind: str = "project"
    subject_field: str | None = None
    makes: str = ""  # a run: its answer, or that field of it, is what the event is about
    is_raw: bool = False
    cursor_field: str | None = None
    resume_field: str | None = None
    hidden_fields: tuple[str, ...] = ()  # of the request: secrets, which no event may hold
    example: dict[str, Any] = {}

    def subject(self, body: Any, answer: Any = None) -> str:
        """What the request acts on, or has made, as a reference; of no project where it names none."""
        if self.makes and answer is not None:
            return f"{self.makes}:{getattr(answer, self.makes, answer).id}"
        if self.subject_field is None:
            return "home:default" if self.subject_kind == "project" else f"{self.subject_kind}:default"
        return f"{self.subject_kind}:{getattr(body, self.subject_field, None) or 'default'}"
