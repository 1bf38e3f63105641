"""Who is asking, and what the scopes of a token allow."""

from __future__ import annotations

import hashlib
import secrets

from millrace.core.errors import InputError
from millrace.core.types import Struct

TOKEN_PREFIX = "mr_"
PREFIX_CHARACTERS = 9
OWNER, WORKER, WORK = "owner", "worker", "work"
SCOPES: dict[str, str] = {
    OWNER: "everything",
    WORKER: "ask for works, and do them",
}
WORK_OPERATIONS = frozenset(
    {"work.report", "blob.get", "blob.put", "blob.presign", "blob.confirm", "tree.get", "tree.put"}
)
OPERATIONS_OF: dict[str, frozenset[str]] = {WORKER: frozenset({"work.claim"}), WORK: WORK_OPERATIONS}


class Principal(Struct, frozen=True, kw_only=True):
    """Who is asking.

    `id` is the actor of events; `work_id` narrows a worker's token to one work.
    """

    id: str
    scopes: tuple[str, ...] = (OWNER,)
    work_id: str | None = None

    def may(self, operation: str) -> bool:
        """Whether a scope allows an operation, whatever it is about.

        Example:
            >>> worker = Principal(id="token:w", scopes=("worker",))
            >>> worker.may("work.claim"), worker.may("model.promote")
            (True, False)
        """
        return any(scope == OWNER or operation in OPERATIONS_OF.get(scope, ()) for scope in self.scopes)


def new_secret() -> str:
    """A new secret: 256 random bits, recognisable by its beginning."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_id(secret: str) -> str:
    """What is kept of a secret: its SHA-256 in hexadecimal. Enough, because secrets are random and long.

    Example:
        >>> token_id("mr_x")[:8]
        '587269cf'
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def check_scopes(scopes: tuple[str, ...]) -> tuple[str, ...]:
    """The scopes, once each, in order.

    Raises:
        InputError: One is unknown, or there is none.

    Example:
        >>> check_scopes(("worker", "worker"))
        ('worker',)
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        known = ", ".join(f"{name} ({what})" for name, what in SCOPES.items())
        raise InputError(f"a token wants one of the scopes {known}; got {', '.join(unknown) or 'none'}")
    return tuple(sorted(set(scopes)))
