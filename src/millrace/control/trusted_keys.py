"""Keys whose signatures count: listed, added, revoked. They are of the whole home."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from millrace.control.authorisation import acting_principal
from millrace.control.dispatch import handles, local_principal
from millrace.control.services import Services
from millrace.control.trust import refusal_of, time_of
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.operations import Page
from millrace.core.operations import trusted_keys as ops
from millrace.core.types import Event, TrustedKey
from millrace.security.signing import HomeSigner, public_key_id

MAX_NAME = 100
MAX_PEM = 4096


@handles(ops.LIST_TRUSTED_KEYS)
def list_trusted_keys(services: Services, body: Page) -> list[ops.TrustedKeyView]:
    """The home's own first, then those of its folder, then those of the records."""
    held = HomeSigner(services.home).held()
    records = {key.id: key for key in services.records.find(TrustedKey)} if services.is_used else {}
    ids = [
        *sorted(held, key=lambda id: (held[id] != "signing.key", held[id])),
        *(id for id in records if id not in held),
    ]
    return [_view(services, id, held.get(id, "records")) for id in ids][body.offset :][: body.limit]


@handles(ops.ADD_TRUSTED_KEY)
def add_trusted_key(services: Services, body: ops.TrustedKeyAdd) -> ops.TrustedKeyView:
    """Once: its name and times are not changed afterwards, but it can be revoked.

    Raises:
        InputError: It is no public key, or its times are none.
        ConflictError: It is here already; a revoked one stays revoked.
    """
    _refuse_scoped(services)
    if len(body.name) > MAX_NAME or not (body.name.isprintable() or not body.name):
        raise InputError(f"a key's name has at most {MAX_NAME} printable characters, got {body.name[:MAX_NAME]!r}")
    if len(body.pem) > MAX_PEM:
        raise InputError(f"a public key as PEM has at most {MAX_PEM} characters, got {len(body.pem)}")
    id, now = public_key_id(body.pem.encode()), services.clock.now()
    begins, ends = _moment(body.not_before), _moment(body.not_after)
    if begins is not None and ends is not None and begins >= ends:
        raise InputError(f"not_before must be before not_after, got {body.not_before} and {body.not_after}")
    key = TrustedKey(id=id, created_at=now, pem=body.pem, home=body.name, not_before=begins, not_after=ends)
    principal = acting_principal()
    detail = {"outcome": "ok", "name": body.name, "not_before": begins, "not_after": ends}
    event = Event(at=now, actor=principal.id if principal else local_principal(), verb=ops.ADD_TRUSTED_KEY.name,
                  subject=f"trusted_key:{id}", detail=detail)  # fmt: skip
    with services.records.transaction() as transaction:
        known = transaction.get(TrustedKey, id)
        if known is not None:
            why = "was revoked, which is for ever" if known.revoked_at is not None else "is here already"
            raise ConflictError(f"the key {id} {why}", hint="`millrace trusted-keys` lists what there is")
        transaction.put(key, expect_version=0)
        transaction.append(event)
    return _view(services, id, "records")


@handles(ops.REVOKE_TRUSTED_KEY)
def revoke_trusted_key(services: Services, body: ops.TrustedKeyId) -> ops.TrustedKeyView:
    """Also one of the home's folder, and its own: the records' word is stronger than a file's.

    Raises:
        NotFoundError: There is no such key.
    """
    _refuse_scoped(services)
    where = HomeSigner(services.home).held().get(body.key, "")
    with services.records.transaction() as transaction:
        known = transaction.get(TrustedKey, body.key)
        if known is None and not where:
            raise NotFoundError(f"there is no key {body.key[:64]!r}", hint="`millrace trusted-keys` lists them")
        now = services.clock.now()
        key = known or TrustedKey(id=body.key, created_at=now, pem="", home=where)
        if key.revoked_at is None:
            transaction.put(msgspec.structs.replace(key, revoked_at=now), expect_version=key.version)
    return _view(services, body.key, where or "records")


def _refuse_scoped(services: Services) -> None:
    """Keys are of the whole home.

    Raises:
        DeniedError: Who asks may work in some projects only.
    """
    if services.where is not None:
        raise DeniedError("keys are of all projects, and you may work in some", hint="ask an owner of the home")


def _moment(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"want a day or a moment like 2027-12-31 or 2027-12-31T18:00, got {text[:40]!r}") from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _text(at_s: float | None) -> str | None:
    return None if at_s is None else time_of(at_s)


def _view(services: Services, id: str, where: str) -> ops.TrustedKeyView:
    key = services.records.get(TrustedKey, id) if services.is_used else None
    if key is None:
        return ops.TrustedKeyView(id=id, name="", state="valid", where=where)
    refusal = refusal_of(services.records, services.clock.now(), id) or ""
    states = {"was revoked": "revoked", "is not valid": "not yet valid", "was valid": "expired"}
    state = next((state for start, state in states.items() if refusal.startswith(start)), "valid")
    return ops.TrustedKeyView(
        id=id, name=key.home, state=state, where=where, created_at=key.created_at, not_before=_text(key.not_before),
        not_after=_text(key.not_after), revoked_at=_text(key.revoked_at),
    )  # fmt: skip
