"""Tokens: made, listed, revoked. The secret is in no record."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from millrace.control.authorisation import acting_principal, custom_roles, is_over_others, shown
from millrace.control.dispatch import handles
from millrace.control.granting import check_may_grant, check_stands_above, is_everything
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.operations import Page
from millrace.core.operations import works as ops
from millrace.core.operations.live import NameRequest
from millrace.core.operations.table import OPERATIONS
from millrace.core.ports import Transaction
from millrace.core.principals import EVERYWHERE, OWNER, ROLES, Grant, check_scopes, new_secret, token_id
from millrace.core.server_file import TOKEN_NAME
from millrace.core.types import Event, RoleBinding, Token, User
from millrace.core.units import parse_duration

MAX_NAME = 100
FIRST_OWNER = "owner"
FIRST_SECRET_S = 24 * 3600.0  # it stands in logs


@handles(ops.LIST_TOKENS)
def list_tokens(services: Services, body: Page) -> list[Token]:
    """One's own, and those that one could have made; those of works come and go by themselves."""
    people = [token for token in services.records.find(Token) if token.work_id is None and _is_mine(services, token)]
    return people[body.offset : body.offset + body.limit]


@handles(ops.CREATE_TOKEN)
def create_token(services: Services, body: ops.TokenCreate) -> ops.CreatedToken:
    """A new one; a name is used once, also after its token was revoked: events name it.

    Made by a user it acts for that user, within its scopes; never does it allow more than its maker may.
    """
    if not (0 < len(body.name) <= MAX_NAME and body.name.isprintable() and "/" not in body.name):
        raise InputError(f"a token's name has 1 to {MAX_NAME} printable characters and no slash, got {body.name!r}")
    lives_s = None if body.expires is None else parse_duration(body.expires)
    with services.records.transaction() as transaction:  # in which roles are what they were when they are looked at
        scopes = check_scopes(body.scope.split(","), [name for name, _ in custom_roles(services)])
        check_may_grant(services, map(Grant.parse, scopes))
        user_name = _acts_for(services, body.user)
        made = add_token(services, transaction, body.name, scopes, user_name=user_name, lives_s=lives_s)
        token = msgspec.structs.replace(made.token, made_by="" if user_name else _maker())
        return ops.CreatedToken(secret=made.secret, token=transaction.put(token, made.token.version))


def add_token(
    services: Services,
    transaction: Transaction,
    name: str,
    scopes: tuple[str, ...],
    *,
    user_name: str = "",
    lives_s: float | None = None,
) -> ops.CreatedToken:
    """A new one.

    Args:
        services: The home.
        transaction: In which it is added.
        name: That no token has had.
        scopes: Of a user's token: () is all that the user may.
        user_name: Whom it acts for; "" nobody.
        lives_s: How long; None: until it is revoked.

    Raises:
        ConflictError: The name is taken.
    """
    if transaction.find(Token, {"name": name}):
        raise ConflictError(f"there is a token named {name!r}", hint="take another name")
    secret, now = new_secret(), services.clock.now()
    token = Token(
        id=token_id(secret), created_at=now, name=name, prefix=shown(secret), scopes=scopes, user_name=user_name,
        expires_at=None if lives_s is None else now + lives_s,
    )  # fmt: skip
    return ops.CreatedToken(secret=secret, token=transaction.put(token, expect_version=0))


def _own_name() -> str:
    """The user who is asking; "" where it is no user."""
    principal = acting_principal()
    kind, _, name = ("" if principal is None else principal.id.partition("/")[0]).partition(":")
    return name if kind == "user" else ""


def _maker() -> str:
    """Whose hands a token of nobody's is in: of who may make tokens, but no second person; an owner gives them away."""
    principal = acting_principal()
    return "" if principal is None or is_everything(principal) else principal.id.partition("/")[0]


def _acts_for(services: Services, service_account: str | None) -> str:
    """Whom a new token acts for: its maker, or a service account that the maker may have made.

    Raises:
        DeniedError: They may make no users, or the service account may do more than they may.
        InputError: It is a person.
    """
    if service_account is None:
        return _own_name()
    principal = acting_principal()
    if principal is not None and not is_over_others(principal, OPERATIONS["user.create"], everywhere=True):
        raise DeniedError(f"{principal.id} may make tokens for themselves alone")
    user = services.records.get(User, service_account)
    if user is None or not user.is_service:
        raise InputError(
            f"{service_account[:80]!r} is no service account", hint="`millrace users create NAME --service` makes one"
        )
    check_stands_above(services, user)
    return user.name


def _is_mine(services: Services, token: Token) -> bool:
    """Whether it acts for whoever is asking, or they could have made it."""
    principal = acting_principal()
    if principal is None or token.user_name == _own_name() != "":
        return True
    known = {*ROLES, *(name for name, _ in custom_roles(services))}
    grants = [grant for scope in token.scopes if (grant := Grant.parse(scope)).role in known]
    try:
        check_may_grant(services, grants or [Grant(role=OWNER)])
    except DeniedError:
        return False
    return is_over_others(principal, ops.REVOKE_TOKEN)


@handles(ops.REVOKE_TOKEN)
def revoke_token(services: Services, body: NameRequest) -> Token:
    """From the next request on."""
    with services.records.transaction() as transaction:
        found = transaction.find(Token, {"name": body.name})
        if not found or not _is_mine(services, found[0]):
            raise NotFoundError(f"there is no token named {body.name!r}", hint="`millrace tokens` lists them")
        token = found[0]
        if token.revoked_at is not None:
            return token
        return transaction.put(msgspec.structs.replace(token, revoked_at=services.clock.now()), token.version)


def first_tokens(services: Services) -> str:
    """What a server that others can reach begins with.

    A token for commands in the home's own folder, made anew at each start in a file that only its owner can
    read; and, where nobody can sign in as an owner yet, the user `owner`: with the password of the setting
    `owner_password_file`, or with a one-time secret to be shown once.

    Returns:
        The secret to show, or "".

    Raises:
        InputError: The file cannot be read, or its password is empty or one that anybody would try.
    """
    mark = hashlib.sha256(f"{socket.gethostname()} {services.home}".encode()).hexdigest()[:8]
    local_name = f"local-{mark}"  # servers on one Postgres have each their own
    local, password = new_secret(), _given_password(services)
    with services.records.transaction() as transaction:
        for token in transaction.find(Token, {"name": local_name}):
            transaction.delete(Token, token.id)
        local_token = Token(id=token_id(local), name=local_name, prefix=shown(local), scopes=(OWNER,))
        transaction.put(msgspec.structs.replace(local_token, created_at=services.clock.now()), expect_version=0)
        secret = "" if _has_owner(services, transaction, local_name) else _first_owner(services, transaction, password)
    path = services.home / TOKEN_NAME
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(local)
    return secret


def _given_password(services: Services) -> str:
    """The first owner's password, hashed, where a setting names a file with it; else ""."""
    name = services.setting("owner_password_file")
    if not name:
        return ""
    try:
        password = Path(name).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"owner_password_file: {name} cannot be read: {error}") from None
    try:
        extras.load("millrace.security.passwords:check_new_password")(password, (FIRST_OWNER,))
    except InputError as error:
        raise InputError(f"owner_password_file: {name}: {error.message}", hint=error.hint) from None
    return extras.load("millrace.security.passwords:hash_password")(password)


def _has_owner(services: Services, transaction: Transaction, local_name: str) -> bool:
    """Whether somebody can come in as an owner: with a password, from elsewhere, or with a token that lives."""
    bound = {one.principal for one in transaction.find(RoleBinding, {"role": OWNER}) if one.where == EVERYWHERE}
    if any(
        user.disabled_at is None and (user.password or user.external) and f"user:{user.name}" in bound
        for user in transaction.find(User)
    ):
        return True
    now = services.clock.now()
    return any(
        OWNER in token.scopes and token.work_id is None and token.name != local_name and token.revoked_at is None
        and (token.expires_at is None or token.expires_at > now)
        for token in transaction.find(Token)
    )  # fmt: skip


def _first_owner(services: Services, transaction: Transaction, password: str) -> str:
    """The user `owner`, and the one-time secret that sets their password; "" where they have one already."""
    now = services.clock.now()
    users = transaction.find(User)
    taken = {user.name for user in users if user.disabled_at is not None or user.is_service or user.external}
    name = next(name for name in _numbered(FIRST_OWNER) if name not in taken)
    user = transaction.get(User, name) or User(id=name, name=name, created_at=now)
    transaction.put(msgspec.structs.replace(user, password=password))
    principal = f"user:{name}"
    binding = RoleBinding(
        id=f"{principal}|{OWNER}|{EVERYWHERE}", created_at=now, principal=principal, role=OWNER, where=EVERYWHERE
    )
    transaction.put(binding)
    transaction.append(Event(at=now, actor="system:up", verb="user.create", subject=principal))
    if password:
        return ""
    used = {token.name for token in transaction.find(Token)}
    free = next(name for name in _numbered(FIRST_OWNER) if name not in used)
    created = add_token(services, transaction, free, (OWNER,), user_name=name, lives_s=FIRST_SECRET_S)
    transaction.put(msgspec.structs.replace(created.token, is_once=True), created.token.version)
    transaction.append(Event(at=now, actor="system:up", verb="token.create", subject=f"token:{free}"))
    return created.secret


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in range(2, 10_000):
        yield f"{name}-{number}"


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
