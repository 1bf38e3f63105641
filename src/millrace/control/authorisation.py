"""Who may do what: asked in dispatch for every operation, whichever door it came through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec

from millrace.control.services import Services
from millrace.core.errors import DeniedError, UnauthenticatedError
from millrace.core.operations import Operation
from millrace.core.principals import EVERYWHERE, PREFIX_CHARACTERS, Grant, Principal, RoleRule, grant_of, token_id
from millrace.core.types import TREE_MEDIA_TYPE, Role, RoleBinding, Token, User, WorkItem

LAST_USED_EVERY_S = 60.0
# What everybody who signs in may do, to themselves alone: the handlers see to that. No one can be granted it.
SELF = "self"
SELF_RULE = RoleRule(
    description="oneself",
    allow=("user.get", "user.set_password", "user.prepare_totp", "user.enable_totp", "user.disable_totp",
           "token.create", "token.list", "token.revoke"),
)  # fmt: skip
_SCOPE: ContextVar[frozenset[str] | None] = ContextVar("millrace_scope", default=None)
_ACTING: ContextVar[Principal | None] = ContextVar("millrace_principal", default=None)


@contextmanager
def acting_as(principal: Principal | None) -> Iterator[None]:
    """Everything that is dispatched inside is asked by `principal`; None: by whoever runs this process."""
    before = _ACTING.set(principal)
    try:
        yield
    finally:
        _ACTING.reset(before)


@contextmanager
def working_in(where: frozenset[str]) -> Iterator[None]:
    """An operation is done inside, in these projects."""
    before = _SCOPE.set(where)
    try:
        yield
    finally:
        _SCOPE.reset(before)


def work_scope() -> frozenset[str] | None:
    """The projects of the operation that is being done; None outside of any."""
    return _SCOPE.get()


def acting_principal() -> Principal | None:
    """Who is asking, where a door has found out."""
    return _ACTING.get()


def authenticate(services: Services, secret: str) -> Principal:
    """Who has this secret.

    Raises:
        UnauthenticatedError: It is unknown, expired or revoked.
    """
    now = services.clock.now()
    # Looked up by its digest: how long that takes says nothing about any secret.
    token = services.records.get(Token, token_id(secret))
    if token is None:
        raise UnauthenticatedError("this token is not known here")
    if token.revoked_at is not None:
        raise UnauthenticatedError(f"the token {token.name!r} ({token.prefix}…) is revoked")
    if token.expires_at is not None and token.expires_at <= now:
        raise UnauthenticatedError(f"the token {token.name!r} ({token.prefix}…) has expired")
    if token.work_id is None and now - (token.last_used_at or 0.0) > LAST_USED_EVERY_S:
        with services.records.transaction() as transaction:
            stored = transaction.get(Token, token.id)
            if stored is not None:
                transaction.put(msgspec.structs.replace(stored, last_used_at=now), stored.version)
    within = tuple(Grant.parse(scope) for scope in token.scopes)
    if token.user_name:
        user = services.records.get(User, token.user_name)
        return user_principal(services, user, token=token.name, within=within or None)
    id = f"{token.made_by}/token:{token.name}" if token.made_by else f"token:{token.name}"
    return Principal(id=id, grants=within, work_id=token.work_id, custom=custom_roles(services))


def user_principal(
    services: Services, user: User | None, *, token: str = "", within: tuple[Grant, ...] | None = None
) -> Principal:
    """Somebody who has proved who they are: what they and their groups have been granted.

    Args:
        services: The home.
        user: Who.
        token: The name of the token that acts for them; events name it too.
        within: The token's scopes; None: all that the user may.

    Raises:
        UnauthenticatedError: There is no such user any more, or they are disabled.
    """
    if user is None or user.disabled_at is not None:
        raise UnauthenticatedError("whoever this acts for is not known here, or is disabled")
    names = [f"user:{user.name}", *(f"group:{group}" for group in user.groups)]
    bindings = services.records.find(RoleBinding, {"principal": names})
    granted = sorted({(binding.role, binding.where) for binding in bindings})
    return Principal(
        id=f"user:{user.name}/token:{token}" if token else f"user:{user.name}",
        grants=(*(grant_of(role, where) for role, where in granted), grant_of(SELF, EVERYWHERE)),
        within=within, custom=((SELF, SELF_RULE), *custom_roles(services)),
    )  # fmt: skip


def is_over_others(principal: Principal, operation: Operation, *, everywhere: bool = False) -> bool:
    """Whether it may do this to others, not to itself alone: in some project, or everywhere."""
    others = msgspec.structs.replace(principal, grants=tuple(grant for grant in principal.grants if grant.role != SELF))
    where = others.where(operation.name, operation.is_write)
    return where == {EVERYWHERE} if everywhere else bool(where)


def custom_roles(services: Services) -> tuple[tuple[str, RoleRule], ...]:
    """The roles that people have defined here."""
    found = services.records.find(Role, order="id")
    return tuple((role.id, RoleRule(description=role.description, allow=role.allow, deny=role.deny)) for role in found)


def authorise(services: Services, principal: Principal, operation: Operation, request: Any) -> frozenset[str]:
    """Let pass, or refuse.

    Args:
        services: The home.
        principal: Who is asking.
        operation: The verb.
        request: Its request; None where a foreign protocol amounts to it.

    Returns:
        The projects in which it may be done; everything else is hidden from the handler.

    Raises:
        DeniedError: No role allows the operation anywhere, or not on this thing.
    """
    where = principal.where(operation.name, operation.is_write)
    if not where:
        roles = ", ".join(sorted({grant.role for grant in principal.within or principal.grants})) or "no role"
        raise DeniedError(
            f"{principal.id} may not {operation.name} in any project, as {roles}",
            hint=f"ask an owner for a role that allows it: `millrace users who-can {operation.name}` tells them which",
        )
    if principal.work_id is not None:
        _authorise_work(services, principal.work_id, operation, request)
    return where


def _authorise_work(services: Services, work_id: str, operation: Operation, request: Any) -> None:
    """A worker's token sees the inputs of its work, and reports on it alone."""
    item = services.records.get(WorkItem, work_id)
    if item is None or item.state == "ended":
        raise DeniedError(f"the work {work_id} has ended, and its token with it")
    if operation.name == "work.report" and request.work != work_id:
        raise DeniedError(f"this token is for the work {work_id}, not for {request.work[:64]!r}")
    if operation.name in ("blob.get", "tree.get") and not _is_input(services, item, request.digest):
        raise DeniedError(f"the work {work_id} has no input {request.digest[:80]!r}")


def _is_input(services: Services, item: WorkItem, digest: str) -> bool:
    given = list(item.work["inputs"].values())
    if digest in (one["digest"] for one in given):
        return True
    trees = [one["digest"] for one in given if one["media_type"] == TREE_MEDIA_TYPE]
    if item.project_tree is not None:
        trees.append(item.project_tree.digest)
    if digest in trees:
        return True
    return any(digest == entry.digest for tree in trees for entry in services.blobs.tree(tree))


def bearer(header: str) -> str:
    """The secret in an Authorization header.

    Raises:
        UnauthenticatedError: The header is not one.

    Example:
        >>> bearer("Bearer mr_abc")
        'mr_abc'
    """
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "bearer" or not value.strip().isascii():
        raise UnauthenticatedError(f"want `Authorization: Bearer TOKEN`, got the scheme {scheme[:20]!r}")
    return value.strip()


def shown(secret: str) -> str:
    """What of a secret may be shown.

    Example:
        >>> shown("mr_abcdefghij")
        'mr_abcdef'
    """
    return secret[:PREFIX_CHARACTERS]
