"""Tokens: made, listed, revoked. The secret is in no record."""

from __future__ import annotations

import hashlib
import os
import socket

import msgspec

from millrace.control.authorisation import shown
from millrace.control.dispatch import handles
from millrace.control.services import Services
from millrace.core.errors import ConflictError, InputError, NotFoundError
from millrace.core.operations import Page
from millrace.core.operations import works as ops
from millrace.core.operations.live import NameRequest
from millrace.core.ports import Transaction
from millrace.core.principals import OWNER, check_scopes, new_secret, token_id
from millrace.core.server_file import TOKEN_NAME
from millrace.core.types import Event, Role, Token
from millrace.core.units import parse_duration

MAX_NAME = 100


@handles(ops.LIST_TOKENS)
def list_tokens(services: Services, body: Page) -> list[Token]:
    """People's tokens; those of works come and go by themselves."""
    people = [token for token in services.records.find(Token) if token.work_id is None]
    return people[body.offset : body.offset + body.limit]


@handles(ops.CREATE_TOKEN)
def create_token(services: Services, body: ops.TokenCreate) -> ops.CreatedToken:
    """A new one; a name is used once, also after its token was revoked: events name it."""
    if not (0 < len(body.name) <= MAX_NAME and body.name.isprintable() and "/" not in body.name):
        raise InputError(f"a token's name has 1 to {MAX_NAME} printable characters and no slash, got {body.name!r}")
    lives_s = None if body.expires is None else parse_duration(body.expires)
    secret = new_secret()
    with services.records.transaction() as transaction:
        if transaction.find(Token, {"name": body.name}):
            raise ConflictError(f"there is a token named {body.name!r}", hint="take another name")
        now = services.clock.now()
        custom = [role.id for role in transaction.find(Role)]
        token = Token(
            id=token_id(secret), created_at=now, name=body.name, prefix=shown(secret),
            scopes=check_scopes(body.scope.split(","), custom), expires_at=None if lives_s is None else now + lives_s,
        )  # fmt: skip
        token = transaction.put(token, expect_version=0)
    return ops.CreatedToken(secret=secret, token=token)


@handles(ops.REVOKE_TOKEN)
def revoke_token(services: Services, body: NameRequest) -> Token:
    """From the next request on."""
    with services.records.transaction() as transaction:
        found = transaction.find(Token, {"name": body.name})
        if not found:
            raise NotFoundError(f"there is no token named {body.name!r}", hint="`millrace tokens` lists them")
        token = found[0]
        if token.revoked_at is not None:
            return token
        return transaction.put(msgspec.structs.replace(token, revoked_at=services.clock.now()), token.version)


def first_tokens(services: Services) -> str:
    """What a server that others can reach begins with.

    A token for commands in the home's own folder, made anew at each start in a file that only its owner can
    read; and, where nobody has an owner's token yet, one to be shown once.

    Returns:
        The secret to show, or "".
    """
    mark = hashlib.sha256(f"{socket.gethostname()} {services.home}".encode()).hexdigest()[:8]
    local_name = f"local-{mark}"  # servers on one Postgres have each their own
    now, local, owner = services.clock.now(), new_secret(), new_secret()
    with services.records.transaction() as transaction:
        old = [token for token in transaction.find(Token) if token.work_id is None]
        for token in old:
            if token.name == local_name:
                transaction.delete(Token, token.id)
        kept = [token for token in old if token.name != local_name]
        has_owner = any(OWNER in token.scopes and token.revoked_at is None for token in kept)
        transaction.put(_token(local, local_name, now), expect_version=0)
        if not has_owner:
            taken = {token.name for token in kept}
            name = next(name for name in ("owner", *(f"owner-{n}" for n in range(2, 10_000))) if name not in taken)
            transaction.put(_token(owner, name, now), expect_version=0)
            transaction.append(Event(at=now, actor="system:up", verb="token.create", subject=f"token:{name}"))
    path = services.home / TOKEN_NAME
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(local)
    return "" if has_owner else owner


def _token(secret: str, name: str, now: float) -> Token:
    return Token(id=token_id(secret), created_at=now, name=name, prefix=shown(secret), scopes=(OWNER,))


def make_work_token(transaction: Transaction, work_id: str, name: str, now: float) -> str:
    """A secret for one work, in place of those that the work had."""
    drop_work_tokens(transaction, work_id)
    secret = new_secret()
    token = Token(
        id=token_id(secret), created_at=now, name=name, prefix=shown(secret), scopes=("work",), work_id=work_id
    )
    transaction.put(token, expect_version=0)
    return secret


def drop_work_tokens(transaction: Transaction, work_id: str) -> None:
    """Refuse whoever has one."""
    for token in transaction.find(Token, {"work_id": work_id}):
        transaction.delete(Token, token.id)
