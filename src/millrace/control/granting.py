"""Who may give which role to whom: nobody gives, takes or wears what they do not have themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millrace.control.authorisation import acting_principal, custom_roles, work_scope
from millrace.control.services import Services
from millrace.core.errors import ConflictError, DeniedError, NotFoundError
from millrace.core.operations.table import OPERATIONS
from millrace.core.ports import Transaction
from millrace.core.principals import EVERYWHERE, OWNER, ROLES, Grant, Principal, RoleRule, includes, matches
from millrace.core.types import RoleBinding, User


def rule_of(services: Services, role: str) -> RoleRule:
    """What a role allows.

    Raises:
        NotFoundError: There is no such role.
    """
    rule = {**dict(custom_roles(services)), **ROLES}.get(role)
    if rule is None:
        raise NotFoundError(f"there is no role {role[:64]!r}", hint="`millrace roles` lists them")
    return rule


def allows(rule: RoleRule, operation: str) -> bool:
    """Whether a role allows an operation, where it is granted.

    Example:
        >>> allows(ROLES["viewer"], "run.get"), allows(ROLES["viewer"], "run.submit")
        (True, False)
    """
    if matches(rule.deny, operation):
        return False
    return matches(rule.allow, operation) or (rule.reads and not OPERATIONS[operation].is_write)


def is_everything(principal: Principal) -> bool:
    """Whether it may do everything everywhere."""
    return all(principal.where(one.name, one.is_write) == {EVERYWHERE} for one in OPERATIONS.values())


def check_may_grant(services: Services, grants: Iterable[Grant]) -> None:
    """Refuse to give or take what whoever is asking does not have.

    Raises:
        DeniedError: One allows, in its place, what they may not do there; or denies something, and they may not
            do everything everywhere.
    """
    for grant in grants if acting_principal() is not None else ():
        check_may_give(grant, rule_of(services, grant.role))


def check_may_give(grant: Grant, rule: RoleRule) -> None:
    """Refuse to give, take or make a role with this rule, for what `check_may_grant` says."""
    principal = acting_principal()
    if principal is None:
        return  # whoever runs this process could change the records as well
    if rule.deny and grant.role not in ROLES:
        lacks = not is_everything(principal)
    else:
        lacks = any(
            allows(rule, one.name) and not _reaches(principal.where(one.name, one.is_write), grant.where)
            for one in OPERATIONS.values()
        )
    if lacks:
        raise DeniedError(
            f"{principal.id} may not do all that {grant.role} allows {_place(grant.where)}: cannot give or take it",
            hint="ask an owner",
        )


def check_everywhere(what: str) -> None:
    """Users and roles are of all projects.

    Raises:
        DeniedError: Who asks may do that in some projects only.
    """
    where = work_scope()
    if where is not None and where != {EVERYWHERE}:
        raise DeniedError(f"only who may work in all projects may {what}")


def _reaches(where: frozenset[str], place: str) -> bool:
    return where == {EVERYWHERE} if place == EVERYWHERE else includes(where, place)


def _place(where: str) -> str:
    return "everywhere" if where == EVERYWHERE else f"in the project {where!r}"


def check_stands_above(services: Services, user: User) -> None:
    """Refuse to act on somebody who may do more.

    Raises:
        DeniedError: Whoever is asking does not have all that the user has.
    """
    check_may_grant(services, grants_of(user, services.records.find(RoleBinding)))


def grants_of(user: User, bindings: Sequence[RoleBinding]) -> tuple[Grant, ...]:
    """The grants of a user and of their groups."""
    names = {f"user:{user.name}", *(f"group:{group}" for group in user.groups)}
    found = sorted({(one.role, one.where) for one in bindings if one.principal in names})
    return tuple(Grant(role=role, where=where) for role, where in found)


class OwnerKept:
    """Within a transaction: somebody who was an owner is one afterwards, or nothing is changed.

    An owner is a user who can sign in, is enabled, has that role, and may do everything everywhere.

    Args:
        services: The home, for custom roles.
        transaction: In which users, roles or bindings are changed.
    """

    def __init__(self, services: Services, transaction: Transaction) -> None:
        self._custom, self._transaction = custom_roles(services), transaction
        self._had = self._has()

    def check(self) -> None:
        """After the change.

        Raises:
            ConflictError: There was an owner, and is none any more.
        """
        if self._had and not self._has():
            raise ConflictError("this would leave nobody who is an owner", hint="make somebody else one first")

    def _has(self) -> bool:
        bindings = self._transaction.find(RoleBinding)
        owners = {one.principal for one in bindings if one.role == OWNER and one.where == EVERYWHERE}
        for user in self._transaction.find(User):
            if f"user:{user.name}" not in owners or user.disabled_at is not None:
                continue
            if not (user.password or user.external):
                continue
            if is_everything(Principal(id=user.name, grants=grants_of(user, bindings), custom=self._custom)):
                return True
        return False
