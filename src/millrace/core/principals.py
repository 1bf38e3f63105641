"""Who is asking, and what roles allow: pure rules, asked in dispatch for every operation."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

from millrace.core.errors import InputError
from millrace.core.types import Struct

TOKEN_PREFIX = "mr_"
PREFIX_CHARACTERS = 9
EVERYWHERE = "*"
OWNER, WORKER, WORK = "owner", "worker", "work"


class RoleRule(Struct, frozen=True, kw_only=True, cache_hash=True):
    """What a role allows: patterns of operations; `reads` adds every operation that changes nothing."""

    description: str
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    reads: bool = False


# Reads that show more than a project: of administration, or of paths and values of the machine.
ADMIN = ("user.*", "role.*", "token.*", "quota.*", "approval_rule.*", "secret.*", "key.*", "audit.*", "system.*",
         "work.*", "session.*", "trusted_key.*")  # fmt: skip
_WORKING = ("run.*", "project.create", "project.update", "blob.*", "tree.*", "dataset.*", "model.register",
            "model.update", "version.update", "model.compress", "endpoint.predict")  # fmt: skip
_OPERATING = ("endpoint.*", "alert.*", "model.promote", "model.rollback", "approval.*")
ROLES: dict[str, RoleRule] = {
    OWNER: RoleRule(description="everything", allow=("*",)),
    "maintainer": RoleRule(
        description="everything in a project, and who has which role there; nothing of the home as a whole",
        allow=("*",), deny=("system.migrate", "system.restore", "system.backup", "system.import_mlflow", "user.*",
                        "key.*", "audit.*", "work.*", "session.*", "approval_rule.set", "approval_rule.delete",
                        "quota.set", "trusted_key.*"),
    ),
    "developer": RoleRule(
        description="runs, datasets, new model versions, calling endpoints", allow=_WORKING, deny=ADMIN, reads=True
    ),
    "operator": RoleRule(
        description="promotes, rolls back, deploys and calls, answers alerts", allow=_OPERATING, deny=ADMIN, reads=True
    ),
    "annotator": RoleRule(
        description="labels", allow=("label.*", "label_task.*", "dataset.list", "dataset.get"), deny=ADMIN
    ),
    "caller": RoleRule(description="calls endpoints, and nothing else", allow=("endpoint.predict",)),
    "viewer": RoleRule(description="looks", deny=ADMIN, reads=True),
    WORKER: RoleRule(description="asks for works, and does them", allow=("work.claim",)),
    WORK: RoleRule(
        description="one work: made by the server for the worker that takes it",
        allow=("work.report", "blob.get", "blob.put", "blob.presign", "blob.confirm", "tree.get", "tree.put"),
    ),
}  # fmt: skip


class Grant(Struct, frozen=True, kw_only=True, cache_hash=True):
    """A role in a project, or everywhere."""

    role: str
    where: str = EVERYWHERE

    @classmethod
    def parse(cls, text: str) -> Grant:
        """`role` or `role:project`.

        Example:
            >>> Grant.parse("viewer:digits")
            Grant(role='viewer', where='digits')
        """
        role, _, where = text.partition(":")
        return grant_of(role, where or EVERYWHERE)


@lru_cache(maxsize=4096)
def grant_of(role: str, where: str) -> Grant:
    """A grant: one object for all equal ones, since principals are hashed and compared at every call.

    Example:
        >>> grant_of("viewer", "digits") is grant_of("viewer", "digits")
        True
    """
    return Grant(role=role, where=where)


class Principal(Struct, frozen=True, kw_only=True, cache_hash=True):
    """Who is asking.

    `id` is the actor of events. What it may is what its grants allow and, of a token that acts for somebody,
    its `within` allow too. `custom` are the rules of roles that are not built in.
    """

    id: str
    grants: tuple[Grant, ...] = (Grant(role=OWNER),)
    within: tuple[Grant, ...] | None = None
    custom: tuple[tuple[str, RoleRule], ...] = ()
    work_id: str | None = None

    def where(self, operation: str, is_write: bool) -> frozenset[str]:
        """The projects in which it may do an operation; `*` among them stands for all but those with a `!`.

        Example:
            >>> ada = Principal(id="user:ada", grants=(Grant(role="viewer"), Grant(role="developer", where="digits")))
            >>> sorted(ada.where("run.get", False)), sorted(ada.where("run.submit", True))
            (['*'], ['digits'])
        """
        return _where_of(self, operation, is_write)


@lru_cache(maxsize=4096)
def _where_of(principal: Principal, operation: str, is_write: bool) -> frozenset[str]:
    allowed = _where(principal.grants, principal.custom, operation, is_write)
    if principal.within is None:
        return allowed
    return both(allowed, _where(principal.within, principal.custom, operation, is_write))


@lru_cache(maxsize=4096)
def _where(
    grants: tuple[Grant, ...], custom: tuple[tuple[str, RoleRule], ...], operation: str, is_write: bool
) -> frozenset[str]:
    rules = {**dict(custom), **ROLES}
    allowed: set[str] = set()
    denied: set[str] = set()
    for grant in grants:
        rule = rules.get(grant.role)
        if rule is None:
            continue  # the role was removed
        if matches(rule.deny, operation):
            # A built-in role only does not reach to what it leaves out; a custom one denies it, whatever allows it.
            denied |= {grant.where} if grant.role not in ROLES else set()
        elif matches(rule.allow, operation) or (rule.reads and not is_write):
            allowed.add(grant.where)
    if EVERYWHERE in denied:
        return frozenset()
    if EVERYWHERE in allowed:  # whatever it may in single projects besides is no more than that
        return frozenset({EVERYWHERE, *(f"!{project}" for project in denied)})
    return frozenset(allowed - denied)


def matches(patterns: Iterable[str], operation: str) -> bool:
    """Whether a pattern fits.

    Example:
        >>> matches(("run.*",), "run.get"), matches(("model.promote",), "model.get")
        (True, False)
    """
    return any(fnmatchcase(operation, pattern) for pattern in patterns)


def includes(where: frozenset[str], project: str) -> bool:
    """Whether a project is among those that `Principal.where` has returned.

    Example:
        >>> includes(frozenset({"*", "!secret"}), "digits"), includes(frozenset({"*", "!secret"}), "secret")
        (True, False)
    """
    return project in where or (EVERYWHERE in where and f"!{project}" not in where)


def both(left: frozenset[str], right: frozenset[str]) -> frozenset[str]:
    """The projects that are in both.

    Example:
        >>> sorted(both(frozenset({"*"}), frozenset({"a", "b"})))
        ['a', 'b']
    """
    named = {name for name in left | right if name[0] not in "*!"}
    found = {name for name in named if includes(left, name) and includes(right, name)}
    if EVERYWHERE in left and EVERYWHERE in right:
        out = {name for name in left | right if name.startswith("!")}
        return frozenset({EVERYWHERE, *out})
    return frozenset(found)


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


def check_scopes(scopes: Iterable[str], custom: Iterable[str] = ()) -> tuple[str, ...]:
    """Scopes, once each, in order: each a role, or `role:project`.

    A project that begins with `!` is none here: it would take that project from who may work in all of them. One
    with `|` is none either, which parts the id of a binding.

    Raises:
        InputError: One names an unknown role or no project, or there is none.

    Example:
        >>> check_scopes(["worker", "worker"])
        ('worker',)
    """
    given = sorted(set(scopes))
    known = {*ROLES, *custom} - {WORK}
    grants = {scope: Grant.parse(scope) for scope in given}
    unknown = [
        scope for scope, one in grants.items() if one.role not in known or one.where.startswith("!") or "|" in one.where
    ]
    if unknown or not given:
        raise InputError(
            f"a scope is a role, or role:project, of {', '.join(sorted(known))}; got {', '.join(unknown) or 'none'}"
        )
    return tuple(given)
