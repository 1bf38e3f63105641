"""Verbs on keys whose signatures count: of models, of heads of the audit, of backups."""

from __future__ import annotations

from millrace.core.operations import Operation, Page, Request
from millrace.core.types import Struct


class TrustedKeyView(Struct, frozen=True, kw_only=True):
    """A key, and whether it counts now: `valid`, `not yet valid`, `expired` or `revoked`.

    Times are in UTC. `where`: `signing.key` is the home's own, `trusted/NAME.pub` a file of its folder `keys`,
    `records` the records.
    """

    id: str
    name: str
    state: str
    where: str
    created_at: float = 0.0
    not_before: str | None = None
    not_after: str | None = None
    revoked_at: str | None = None


class TrustedKeyAdd(Request, frozen=True, kw_only=True):
    """A public key as PEM; the times are days or moments of ISO 8601, in UTC where they name no zone."""

    pem: str
    name: str = ""
    not_before: str | None = None
    not_after: str | None = None


class TrustedKeyId(Request, frozen=True, kw_only=True):
    """One key by its id: `ed25519:…`."""

    key: str


_ID = {"key": "ed25519:66687aadf862bd776c8fc18b8e9f8e20"}
_BODY = "MCowBQYDK2VwAyEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
_PEM = f"-----BEGIN PUBLIC KEY-----\n{_BODY}\n-----END PUBLIC KEY-----\n"
LIST_TRUSTED_KEYS = Operation(
    name="trusted_key.list", summary="Keys whose signatures count, and those that were revoked.", request=Page,
    response=list[TrustedKeyView], method="GET", path="/trusted-keys", subject_kind="trusted_key",
)  # fmt: skip
# Its event is written by the handler: it names the key's id, and never what else somebody may have pasted.
ADD_TRUSTED_KEY = Operation(
    name="trusted_key.add", summary="Trust a public key: models that it has signed are opened.",
    request=TrustedKeyAdd, response=TrustedKeyView, method="POST", path="/trusted-keys", is_write=True,
    is_audited=False, subject_kind="trusted_key", subject_field="name", hidden_fields=("pem",),
    example={"pem": _PEM, "name": "the team of fraud", "not_after": "2027-12-31"},
)  # fmt: skip
REVOKE_TRUSTED_KEY = Operation(
    name="trusted_key.revoke", summary="Revoke a key for ever: nothing that it has signed is opened any more.",
    request=TrustedKeyId, response=TrustedKeyView, method="POST", path="/trusted-keys/{key}/revoke", is_write=True,
    subject_kind="trusted_key", subject_field="key", example=_ID,
)  # fmt: skip
OPERATIONS = (LIST_TRUSTED_KEYS, ADD_TRUSTED_KEY, REVOKE_TRUSTED_KEY)
