"""Roles: made, given, taken; and who may do what by them."""

from __future__ import annotations

import re

from millrace.control.authorisation import SELF, custom_roles, work_scope
from millrace.control.dispatch import handles
from millrace.control.granting import (
    OwnerKept,
    allows,
    check_everywhere,
    check_may_give,
    check_may_grant,
    grants_of,
    rule_of,
)
from millrace.control.services import Services
from millrace.control.users import scope
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.operations import Page
from millrace.core.operations import users as ops
from millrace.core.operations.live import NameRequest
from millrace.core.operations.table import OPERATIONS
from millrace.core.ports import Transaction
from millrace.core.principals import (
    EVERYWHERE,
    ROLES,
    WORK,
    Grant,
    Principal,
    RoleRule,
    check_scopes,
    includes,
    matches,
)
from millrace.core.types import Role, RoleBinding, Token, User

NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
GROUP = "group:"
MAX_PATTERNS = 100


@handles(ops.LIST_ROLES)
def list_roles(services: Services, body: Page) -> list[ops.RoleView]:
    """Built-in ones first."""
    own = dict(custom_roles(services)) if services.is_used else {}
    every = {name: rule for name, rule in ROLES.items() if name != WORK} | own
    views = [_role_view(name, rule) for name, rule in every.items()]
    return views[body.offset : body.offset + body.limit]


def _role_view(name: str, rule: RoleRule) -> ops.RoleView:
    return ops.RoleView(
        name=name, description=rule.description, allow=rule.allow, deny=rule.deny, reads=rule.reads,
        is_built_in=name in ROLES,
    )  # fmt: skip


@handles(ops.CREATE_ROLE)
def create_role(services: Services, body: ops.RoleCreate) -> ops.RoleView:
    """Of patterns that name an operation there is; whoever makes it may do all of it everywhere."""
    check_everywhere("make a role")
    if not NAME.fullmatch(body.name) or body.name in (*ROLES, SELF):
        raise InputError(
            f"a role's name has a-z, 0-9, _ and -, and is none of {', '.join((*ROLES, SELF))}; got {body.name[:80]!r}"
        )
    allow, deny = _patterns(body.allow), _patterns(body.deny)
    if not allow and not deny:
        raise InputError("a role allows or denies something", hint="--allow 'model.*'")
    rule = RoleRule(description=body.description[:1000], allow=allow, deny=deny)
    check_may_give(Grant(role=body.name), rule)
    role = Role(id=body.name, created_at=services.clock.now(), allow=allow, deny=deny, description=rule.description)
    with services.records.transaction() as transaction:
        if transaction.get(Role, role.id) is not None:
            raise ConflictError(f"there is a role {role.id!r} already", hint="delete it first, or take another name")
        _check_unused(transaction, role.id)
        transaction.put(role, expect_version=0)
    return _role_view(role.id, rule)


def _check_unused(transaction: Transaction, name: str) -> None:
    """Tokens keep the name of a role that was deleted: another rule of that name would be theirs.

    Raises:
        ConflictError: One lives that has it.
    """
    for token in transaction.find(Token):
        if token.revoked_at is None and name in (Grant.parse(scope).role for scope in token.scopes):
            raise ConflictError(
                f"the token {token.name!r} has the scope {name!r} of a role that was deleted",
                hint=f"take another name, or first `millrace tokens revoke {token.name}`",
            )


def _patterns(text: str) -> tuple[str, ...]:
    found = tuple(sorted({part.strip() for part in text.split(",") if part.strip()}))
    unknown = [one for one in found if not any(matches((one,), name) for name in OPERATIONS)]
    if unknown or len(found) > MAX_PATTERNS:
        raise InputError(
            f"a pattern fits an operation, such as model.promote or run.*; got {', '.join(unknown)[:99] or len(found)}",
            hint="docs/reference/cli.md and /openapi.json list operations",
        )
    return found


@handles(ops.DELETE_ROLE)
def delete_role(services: Services, body: NameRequest) -> ops.RoleView:
    """With its bindings; tokens whose scope it is may do less."""
    check_everywhere("delete a role")
    if body.name in ROLES:
        raise InputError(f"{body.name} is built in")
    rule = rule_of(services, body.name)
    check_may_grant(services, [Grant(role=body.name)])
    with services.records.transaction() as transaction:
        kept = OwnerKept(services, transaction)
        for binding in transaction.find(RoleBinding, {"role": body.name}):
            transaction.delete(RoleBinding, binding.id)
        transaction.delete(Role, body.name)
        kept.check()
    return _role_view(body.name, rule)


@handles(ops.LIST_BINDINGS)
def list_bindings(services: Services, body: ops.BindingList) -> list[RoleBinding]:
    """Those that reach to projects that may be seen."""
    if not services.is_used:
        return []
    where = {"principal": _principal(body.who)} if body.who else {}
    seen = work_scope()
    found = [
        one for one in services.records.find(RoleBinding, where)
        if seen is None or one.where == EVERYWHERE or includes(seen, one.where)
    ]  # fmt: skip
    return found[body.offset : body.offset + body.limit]


@handles(ops.GRANT_ROLE)
def grant_role(services: Services, body: ops.GrantRequest) -> RoleBinding:
    """Given twice is given once."""
    with services.records.transaction() as transaction:
        binding = _binding(services, body)  # in here, so that the role is deleted or changed before or after
        kept = OwnerKept(services, transaction)
        if binding.principal.startswith("user:") and transaction.get(User, binding.principal[5:]) is None:
            raise NotFoundError(f"there is no user {body.who[:80]!r}", hint="`millrace users` lists them")
        stored = transaction.get(RoleBinding, binding.id)
        if stored is not None:
            return stored
        stored = transaction.put(binding, expect_version=0)
        kept.check()
    return stored


@handles(ops.REVOKE_ROLE)
def revoke_role(services: Services, body: ops.GrantRequest) -> RoleBinding:
    """From the next request on."""
    with services.records.transaction() as transaction:
        binding = _binding(services, body)  # in here, so that the role is deleted or changed before or after
        kept = OwnerKept(services, transaction)
        if not transaction.delete(RoleBinding, binding.id):
            raise NotFoundError(
                f"{binding.principal} has not been granted {scope(Grant(role=body.role, where=body.project))}",
                hint=f"`millrace roles bindings --who {body.who[:80]}` lists what is",
            )
        kept.check()
    return binding


def _binding(services: Services, body: ops.GrantRequest) -> RoleBinding:
    """What is to be given or taken.

    Raises:
        DeniedError: Whoever is asking does not have all of it there.
    """
    grant = Grant(role=body.role, where=body.project or EVERYWHERE)
    check_scopes([scope(grant)], [name for name, _ in custom_roles(services)])
    check_may_grant(services, [grant])
    where = work_scope()
    if where is not None and not (where == {EVERYWHERE} if grant.where == EVERYWHERE else includes(where, grant.where)):
        raise DeniedError(f"you may not say who does what {'everywhere' if grant.where == '*' else grant.where!r}")
    principal = _principal(body.who)
    return RoleBinding(
        id=f"{principal}|{grant.role}|{grant.where}", created_at=services.clock.now(), principal=principal,
        role=grant.role, where=grant.where,
    )  # fmt: skip


def _principal(who: str) -> str:
    """`user:NAME` or `group:NAME`.

    Raises:
        InputError: It is neither.

    Example:
        >>> _principal("ada"), _principal("group:admins")
        ('user:ada', 'group:admins')
    """
    if who.startswith(GROUP):
        if not 0 < len(who) - len(GROUP) <= 200 or not who.isprintable():
            raise InputError("a group's name has 1 to 200 printable characters")
        return who
    return f"user:{who.removeprefix('user:')}"


@handles(ops.WHO_CAN)
def who_can(services: Services, body: ops.WhoCan) -> list[ops.Allowed]:
    """Users, groups, and tokens that act for nobody; not who is disabled, expired or revoked."""
    operation = OPERATIONS.get(body.operation)
    if operation is None:
        raise NotFoundError(f"there is no operation {body.operation[:80]!r}", hint="for example model.promote")
    if not services.is_used:
        return []
    custom, bindings = custom_roles(services), services.records.find(RoleBinding)
    rules = {**dict(custom), **ROLES}
    found: list[ops.Allowed] = []

    def add(who: str, grants: tuple[Grant, ...], is_service: bool = False) -> None:
        where = Principal(id=who, grants=grants, custom=custom).where(operation.name, operation.is_write)
        is_there = where == {EVERYWHERE} if body.project == EVERYWHERE else includes(where, body.project)
        if is_there:
            by = [one for one in grants if one.where in (EVERYWHERE, body.project) and one.role in rules]
            roles = tuple(scope(one) for one in by if allows(rules[one.role], operation.name))
            found.append(ops.Allowed(who=who, roles=roles, is_service=is_service))

    for user in services.records.find(User, order="name"):
        if user.disabled_at is None:
            add(f"user:{user.name}", grants_of(user, bindings), user.is_service)
    for group in sorted({one.principal for one in bindings if one.principal.startswith(GROUP)}):
        granted = sorted({(one.role, one.where) for one in bindings if one.principal == group})
        add(group, tuple(Grant(role=role, where=where) for role, where in granted))
    for token in _nobodys_tokens(services):
        add(f"token:{token.name}", tuple(Grant.parse(one) for one in token.scopes), True)
    return found


def _nobodys_tokens(services: Services) -> list[Token]:
    now = services.clock.now()
    return [
        token for token in services.records.find(Token, order="name")
        if not token.user_name and token.work_id is None and token.revoked_at is None
        and (token.expires_at is None or token.expires_at > now)
    ]  # fmt: skip
