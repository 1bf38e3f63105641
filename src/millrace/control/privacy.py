"""People whose data is here: everything about one of them, and erasing it so that the event chain still verifies."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from millrace.control.audit import actor, erase
from millrace.control.dispatch import handles
from millrace.control.heads import ledger
from millrace.control.services import Services
from millrace.core.errors import InputError
from millrace.core.operations import audit as ops
from millrace.core.types import (
    RECORD_TYPES,
    Approval,
    DataKey,
    Event,
    Record,
    RoleBinding,
    Run,
    Session,
    Token,
    User,
)
from millrace.store import audit_sql
from millrace.store.audit_sql import EventFilter
from millrace.store.layout import TABLES
from millrace.store.records_sql import SqlRecords

# Of records: secrets, and what is made of them.
HIDDEN = frozenset({"password", "totp", "csrf", "pending", "sealed", "wrapped"})
HIDDEN_IDS = frozenset({"session", "token"})  # the digest of a secret
# What else erases data of somebody, given the services and the name; each returns how much, by what it is.
SUBJECT_ERASERS: list[Callable[[Services, str], dict[str, int]]] = []


@handles(ops.EXPORT_SUBJECT)
def export_subject(services: Services, body: ops.SubjectRequest) -> ops.SubjectExport:
    """Events and records that name somebody; that it was asked for is an event, without the name."""
    records = ledger(services)
    records.seal()
    person = _Person(records, body.subject)
    named = {kind: [_shown(kind, one) for one in person.records(kind)] for kind in RECORD_TYPES}
    found = ops.SubjectExport(
        subject=person.name, names=person.names, at=services.clock.now(), user=person.shown_user,
        events=[msgspec.to_builtins(audit_sql.as_event(row)) for row in person.events()],
        records={kind: shown for kind, shown in named.items() if shown},
        run_values=[
            {"run": run_id, "key": key, "value": value}
            for table in ("run_params", "run_tags")
            for run_id, key, value in audit_sql.values_naming(records, table, person.parts)
            if person.is_named(value)
        ],
    )  # fmt: skip
    with records.transaction() as transaction:
        transaction.append(
            Event(
                at=services.clock.now(), actor=actor(), verb=ops.EXPORT_SUBJECT.name, subject="audit:subject",
                detail={"outcome": "ok", "events": len(found.events)},
            )
        )  # fmt: skip
    return found


@handles(ops.ERASE_SUBJECT)
def erase_subject(services: Services, body: ops.EraseSubjectRequest) -> ops.SubjectErasure:
    """Erase details that name somebody, and put a pseudonym where records name a user.

    Event rows stay: their actor (`user:NAME`) too. Texts that people wrote (specs, tags) are named, not changed.
    """
    records = ledger(services)
    records.seal()
    person = _Person(records, body.subject)
    details = audit_sql.details_naming(records, person.parts, person.is_named_in_detail)
    pseudonym = f"erased-{secrets.token_hex(6)}"
    changes = person.changes(pseudonym)
    keys = records.find(DataKey, {"data_subject": person.names})
    readable = sum(bool(key.wrapped) for key in keys)
    data = {"blobs": readable} if readable else {}
    if body.apply:
        with records.erasing():
            _change(records, changes)
            data = _erase_data(services, person.names)
            reason: dict[str, object] = {"reason": "erasure of a data subject", "records": len(changes), "data": data}
            erase(services, details, subject=f"user:{pseudonym}", reason=reason)
            if not details:
                _tell(services, records, pseudonym, reason)
    changed = {old.id for old, _ in changes} | {key.id for key in keys}
    left = {kind: [one["id"] for one in person.records(kind) if one["id"] not in changed] for kind in RECORD_TYPES}
    return ops.SubjectErasure(
        pseudonym=pseudonym, details=len(details), records=_counts(changes), data=data, applied=body.apply,
        left={kind: ids for kind, ids in left.items() if ids and kind not in HIDDEN_IDS},
    )  # fmt: skip


def _change(records: SqlRecords, changes: list[tuple[Record, Record | None]]) -> None:
    with records.transaction() as transaction:
        for old, new in changes:
            if new is None or new.id != old.id:
                transaction.delete(type(old), old.id)
            if new is not None:
                transaction.put(new, old.version if new.id == old.id else 0)


def _erase_data(services: Services, names: list[str]) -> dict[str, int]:
    """What other parts keep of somebody; and of blobs that were erased, whose data they were."""
    data: dict[str, int] = {}
    for eraser, name in itertools.product(SUBJECT_ERASERS, names):
        for what, count in eraser(services, name).items():
            data[what] = data.get(what, 0) + count
    with services.records.transaction() as transaction:
        for key in transaction.find(DataKey, {"data_subject": names}):
            if not key.wrapped:
                transaction.put(msgspec.structs.replace(key, data_subject=""), key.version)
    return data


def _tell(services: Services, records: SqlRecords, pseudonym: str, reason: dict[str, object]) -> None:
    """An erasure is an event, also where no event named the person."""
    with records.transaction() as transaction:
        transaction.append(
            Event(
                at=services.clock.now(), actor=actor(), verb=audit_sql.ERASED, subject=f"user:{pseudonym}",
                detail={**reason, "erased": [], "outcome": "ok"},
            )
        )  # fmt: skip
    records.seal()


class _Person:
    """Somebody, as the records know them.

    Args:
        records: All of them.
        subject: A user's name, with or without `user:`, an address, or another name.
    """

    def __init__(self, records: SqlRecords, subject: str) -> None:
        self.name = subject.strip().removeprefix("user:")
        if not self.name:
            raise InputError("want somebody's name")
        self._records = records
        users = records.find(User)
        self.user = next((one for one in users if self.name in (one.id, one.name, one.email)), None)
        if self.user is not None:
            self.name = self.user.name
        known = [self.user.email, self.user.external.rpartition("|")[2]] if self.user else []
        self.names = sorted({self.name, *filter(None, known)})
        self.parts = [msgspec.json.encode(name).decode()[1:-1] for name in self.names]
        spelled = "|".join(map(re.escape, self.names))
        self._pattern = re.compile(rf"(?<!\w)(?:{spelled})(?!\w)", re.IGNORECASE)  # "ada", never "Canada"

    def is_named(self, text: str) -> bool:
        """Whether a text names them."""
        return self._pattern.search(text) is not None

    def is_named_in(self, value: Any, fields: int) -> bool:
        """Whether a JSON value does; so many levels of keys are names of fields, not of people."""
        if isinstance(value, dict):
            keys = value if fields <= 0 else ()
            return any(map(self.is_named, keys)) or any(self.is_named_in(one, fields - 1) for one in value.values())
        if isinstance(value, list):
            return any(self.is_named_in(one, fields) for one in value)
        return isinstance(value, str) and self.is_named(value)

    def is_named_in_detail(self, detail: Any) -> bool:
        """Whether the detail of an event does."""
        try:
            return self.is_named_in(msgspec.json.decode(detail), fields=2)
        except (msgspec.MsgspecError, TypeError):  # erased, or somebody has altered it
            return self.is_named(str(detail))

    @property
    def shown_user(self) -> dict[str, Any] | None:
        """The user, without hashes."""
        return None if self.user is None else _shown("user", msgspec.to_builtins(self.user))

    def events(self) -> list[audit_sql.Row]:
        """Sealed events of theirs, about them, or whose detail names them, in order."""
        found: dict[int, audit_sql.Row] = {}
        for name in self.names:
            for row in audit_sql.export(self._records, EventFilter(text=name)):
                actor, subject, detail = row[2], row[4], row[8]
                if self.is_named(actor) or self.is_named(subject) or self.is_named_in_detail(detail):
                    found[row[0]] = row
        return [found[seq] for seq in sorted(found)]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Records of a kind that name them."""
        bodies = audit_sql.bodies_naming(self._records, TABLES[kind].name, self.parts)
        return [one for body in bodies if self.is_named_in(one := msgspec.json.decode(body), fields=1)]

    def changes(self, pseudonym: str) -> list[tuple[Record, Record | None]]:
        """What becomes of records that name them as a user: another one, or none."""
        records, old, new = self._records, f"user:{self.name}", f"user:{pseudonym}"
        replace = msgspec.structs.replace
        found: list[tuple[Record, Record | None]] = []
        if self.user is not None:
            unnamed = User(
                id=pseudonym, name=pseudonym, created_at=self.user.created_at, is_service=self.user.is_service,
                disabled_at=self.user.disabled_at or self.user.created_at,
            )  # fmt: skip
            found.append((self.user, unnamed))
        found += [(one, None) for one in records.find(Session, {"user_name": self.name})]
        found += [(one, None) for one in records.find(Token) if one.user_name == self.name]
        found += [(one, None) for one in records.find(RoleBinding, {"principal": old})]
        found += [(one, replace(one, created_by=new)) for one in records.find(Run, {"created_by": [old, self.name]})]
        for one in records.find(Approval):
            by = tuple(new if name == old else name for name in one.approved_by)
            asked = new if one.asked_by == old else one.asked_by
            if (by, asked) != (one.approved_by, one.asked_by):
                found.append((one, replace(one, approved_by=by, asked_by=asked)))
        return found


def _shown(kind: str, record: dict[str, Any]) -> dict[str, Any]:
    hidden = HIDDEN | {"id"} if kind in HIDDEN_IDS else HIDDEN
    return {name: value for name, value in record.items() if name not in hidden}


def _counts(changes: list[tuple[Record, Record | None]]) -> dict[str, int]:
    kinds = [old.kind for old, _ in changes]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
