"""Verbs of the audit: whether events are whole, proofs, searches, retention; and of people whose data is here."""

from __future__ import annotations

from typing import Any

from millrace.core.operations import Operation, Request
from millrace.core.types import Struct


class VerifyRequest(Request, frozen=True, kw_only=True):
    """`heads`: lines of published heads, which were kept where nobody could alter them."""

    heads: str = ""


class AuditBreak(Struct, frozen=True, kw_only=True):
    """What does not hold, and where: the events from `first` to `last`.

    `problem`: missing, order, altered, detail, erased (no event says so), cut, extra, rewritten, head, signature.
    """

    first: int
    last: int
    problem: str
    explanation: str


class AuditReport(Struct, frozen=True, kw_only=True):
    """`heads` were checked, the last over `proven` events; `keys` have signed them. Whole: without `breaks`."""

    is_whole: bool
    events: int
    chain: str
    erased: int
    unsealed: int
    heads: int
    proven: int
    keys: list[str]
    breaks: list[AuditBreak]


class ProveRequest(Request, frozen=True, kw_only=True):
    """`event`: its number. `since`: also prove that the head grew out of one of so many events."""

    event: int
    since: int | None = None
    with_detail: bool = False


class SignedHead(Struct, frozen=True, kw_only=True):
    """A signed head as it is published: `at` in seconds since 1970, `root` and `chain` in hexadecimal."""

    size: int
    root: str
    chain: str
    at: float
    previous: str
    signature: str
    kind: str = "head"


class AuditProof(Struct, frozen=True, kw_only=True):
    """That an event is among those of a head, without the others; hashes in hexadecimal.

    `leaf` is the link of the event as text; `path` leads from it to the head's root; `consistency` shows that
    the tree of `since` events is its beginning. `salt` and `detail` are there when they were asked for.
    """

    event: int
    leaf: str
    path: list[str]
    head: SignedHead
    since: int | None = None
    consistency: list[str] = []
    salt: str | None = None
    detail: str | None = None
    kind: str = "proof"


class CheckProofRequest(Request, frozen=True, kw_only=True):
    """`proof`: as JSON. `heads`: it must belong to one of these, or be consistent with one."""

    proof: str
    heads: str = ""


class CheckedProof(Struct, frozen=True, kw_only=True):
    """What a good proof says; `key` signed the head."""

    event: int
    at: float
    actor: str
    verb: str
    subject: str
    size: int
    key: str
    detail: Any = None


class EventQuery(Request, frozen=True, kw_only=True):
    """Which events.

    `actor`, `verb` and `subject` may end with `*`. `since` and `until`: a date, a time, or an age such as 24h.
    """

    actor: str = ""
    verb: str = ""
    subject: str = ""
    since: str | None = None
    until: str | None = None
    text: str = ""


class SearchRequest(EventQuery, frozen=True, kw_only=True):
    """The newest first; `before` goes on after a page: the number of its last event."""

    before: int | None = None
    limit: int = 100


class ExportRequest(EventQuery, frozen=True, kw_only=True):
    """Oldest first, then the heads; `after`: only events with a larger number."""

    after: int = 0


class AuditEvent(Struct, frozen=True, kw_only=True):
    """A sealed event with all that its check needs; `salt` (hexadecimal) and `detail` are null once erased."""

    seq: int
    at: float
    actor: str
    verb: str
    subject: str
    commitment: str
    chain: str
    salt: str | None
    detail: Any
    kind: str = "event"


class ExportLine(Struct, frozen=True, kw_only=True):
    """One of the two."""

    event: AuditEvent | None = None
    head: SignedHead | None = None


class RetentionRequest(Request, frozen=True, kw_only=True):
    """Details older than `days`. `apply`: erase them; otherwise only count."""

    days: float
    apply: bool = False


class Erased(Struct, frozen=True, kw_only=True):
    """How many details were, or would be, erased, and up to which event."""

    details: int
    last_event: int
    applied: bool


class SubjectRequest(Request, frozen=True, kw_only=True):
    """`subject`: a user's name, an address, or whatever stands for somebody in events and records."""

    subject: str


class EraseSubjectRequest(SubjectRequest, frozen=True, kw_only=True):
    """`apply`: do it; otherwise only say what would be done."""

    apply: bool = False


class SubjectExport(Struct, frozen=True, kw_only=True):
    """Everything here about somebody: `names` is what was looked for. Secrets and their hashes are left out."""

    subject: str
    names: list[str]
    at: float
    user: dict[str, Any] | None
    events: list[dict[str, Any]]
    records: dict[str, list[dict[str, Any]]]
    run_values: list[dict[str, str]]


class SubjectErasure(Struct, frozen=True, kw_only=True):
    """What was, or would be, done.

    `details` of events were erased, `records` removed or given the name `pseudonym`; `left` names records that
    hold the name in texts of people, which nobody but they can judge; `data` is what other parts erased.
    """

    pseudonym: str
    details: int
    records: dict[str, int]
    left: dict[str, list[str]]
    data: dict[str, int]
    applied: bool


_EXAMPLE = {"subject": "ada"}
VERIFY = Operation(
    name="audit.verify", summary="Check that every event is as it was sealed.", request=VerifyRequest,
    response=AuditReport, method="POST", path="/system/audit/verify", subject_kind="audit",
)  # fmt: skip
PROVE = Operation(
    name="audit.prove", summary="Prove that an event is among those of a signed head.", request=ProveRequest,
    response=AuditProof, method="POST", path="/system/audit/prove", is_write=True, is_audited=False,
    subject_kind="audit", subject_field="event", example={"event": 1},
)  # fmt: skip
CHECK_PROOF = Operation(
    name="audit.check", summary="Check a proof.", request=CheckProofRequest, response=CheckedProof, method="POST",
    path="/system/audit/check", subject_kind="audit", example={"proof": "{}"},
)  # fmt: skip
SEARCH = Operation(
    name="audit.search", summary="Find events, the newest first.", request=SearchRequest, response=list[AuditEvent],
    method="GET", path="/system/audit/events", subject_kind="audit",
)  # fmt: skip
EXPORT = Operation(
    name="audit.export", summary="Events with their details, and the signed heads.", request=ExportRequest,
    response=ExportLine, method="GET", path="/system/audit/export", is_stream=True, subject_kind="audit",
)  # fmt: skip
RETAIN = Operation(
    name="audit.retain", summary="Erase details of old events; the chain still verifies.", request=RetentionRequest,
    response=Erased, method="POST", path="/system/audit/retention", is_write=True, is_audited=False,
    subject_kind="audit", example={"days": 365},
)  # fmt: skip
EXPORT_SUBJECT = Operation(
    name="audit.export_subject", summary="Everything here about somebody.", request=SubjectRequest,
    response=SubjectExport, method="POST", path="/privacy/export", is_write=True, is_audited=False,
    subject_kind="audit", hidden_fields=("subject",), example=_EXAMPLE,
)  # fmt: skip
ERASE_SUBJECT = Operation(
    name="audit.erase_subject", summary="Erase what events say about somebody; the chain still verifies.",
    request=EraseSubjectRequest, response=SubjectErasure, method="POST", path="/privacy/erase", is_write=True,
    is_audited=False, subject_kind="audit", hidden_fields=("subject",), example=_EXAMPLE,
)  # fmt: skip
OPERATIONS = (VERIFY, PROVE, CHECK_PROOF, SEARCH, EXPORT, RETAIN, EXPORT_SUBJECT, ERASE_SUBJECT)
