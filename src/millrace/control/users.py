"""Users: made, disabled; their passwords and second factors. Never shown: what they prove themselves with."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from millrace.control import sign_in
from millrace.control.authorisation import acting_principal, is_over_others
from millrace.control.dispatch import handles
from millrace.control.granting import OwnerKept, check_everywhere, check_stands_above, grants_of
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.operations import Operation, Page
from millrace.core.operations import users as ops
from millrace.core.operations.live import NameRequest
from millrace.core.ports import Records, Transaction
from millrace.core.principals import EVERYWHERE, Grant
from millrace.core.types import RoleBinding, User

NAME = re.compile(r"[a-z0-9][a-z0-9._@+-]{0,63}")
MAX_EMAIL = 254
TOTP = "millrace.security.totp"


def check_name(name: str) -> str:
    """A name that a user may have.

    Raises:
        InputError: It is none.

    Example:
        >>> check_name("ada.lovelace")
        'ada.lovelace'
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"a user's name has 1 to 64 of a-z, 0-9 and ._@+- and begins with a letter or digit, got {name[:80]!r}"
        )
    return name


def view(user: User, bindings: Sequence[RoleBinding]) -> ops.UserView:
    """A user as others see them."""
    return ops.UserView(
        name=user.name, email=user.email, is_service=user.is_service, has_password=bool(user.password),
        has_totp=bool(user.totp), groups=user.groups, external=user.external, created_at=user.created_at,
        disabled_at=user.disabled_at, roles=tuple(scope(grant) for grant in grants_of(user, bindings)),
    )  # fmt: skip


def scope(grant: Grant) -> str:
    """A grant as people write it.

    Example:
        >>> scope(Grant(role="viewer")), scope(Grant(role="viewer", where="digits"))
        ('viewer', 'viewer:digits')
    """
    return grant.role if grant.where == EVERYWHERE else f"{grant.role}:{grant.where}"


def find_user(records: Records | Transaction, name: str) -> User:
    """A user by name.

    Raises:
        NotFoundError: There is none.
    """
    user = records.get(User, name)
    if user is None:
        raise NotFoundError(f"there is no user {name[:80]!r}", hint="`millrace users` lists them")
    return user


def _viewed(services: Services, user: User) -> ops.UserView:
    return view(user, services.records.find(RoleBinding))


@handles(ops.LIST_USERS)
def list_users(services: Services, body: Page) -> list[ops.UserView]:
    """By name."""
    if not services.is_used:
        return []
    bindings = services.records.find(RoleBinding)
    users = services.records.find(User, order="name", limit=body.limit, offset=body.offset)
    return [view(user, bindings) for user in users]


@handles(ops.GET_USER)
def get_user(services: Services, body: NameRequest) -> ops.UserView:
    """Oneself, or anybody for who may look."""
    _is_own(ops.GET_USER, body.name)
    return _viewed(services, find_user(services.records, body.name))


@handles(ops.CREATE_USER)
def create_user(services: Services, body: ops.UserCreate) -> ops.UserView:
    """May do nothing yet."""
    check_everywhere("make a user")
    name = check_name(body.name)
    if len(body.email) > MAX_EMAIL or not body.email.isprintable():
        raise InputError(f"an address has at most {MAX_EMAIL} printable characters")
    if body.service and body.password is not None:
        raise InputError("a service account has no password", hint="make it a token: `millrace tokens create`")
    stored = "" if body.password is None else _hashed(body.password, name, body.email)
    with services.records.transaction() as transaction:
        if transaction.get(User, name) is not None:
            raise ConflictError(
                f"there is a user {name!r} already", hint="take another name; those of disabled users stay taken"
            )
        user = User(
            id=name, name=name, created_at=services.clock.now(), email=body.email, is_service=body.service,
            password=stored,
        )  # fmt: skip
        transaction.put(user, expect_version=0)
    return _viewed(services, user)


def _hashed(password: str, name: str, email: str) -> str:
    extras.load(f"{sign_in.PASSWORDS}:check_new_password")(password, (name, email))
    return extras.load(f"{sign_in.PASSWORDS}:hash_password")(password)


@handles(ops.SET_PASSWORD)
def set_password(services: Services, body: ops.PasswordSet) -> ops.UserView:
    """Their own with the one before; somebody else's for who may do at least as much."""
    user = _mine_or_below(services, ops.SET_PASSWORD, body.name, body.current)
    if user.is_service or user.external:
        raise InputError(f"{user.name} signs in without a password: it is a service account, or of elsewhere")
    stored = _hashed(body.password, user.name, user.email)
    with services.records.transaction() as transaction:
        present = find_user(transaction, body.name)
        if present.password != user.password:  # what was given as the present one is that no more
            raise ConflictError(f"somebody else has changed the password of {user.name} meanwhile")
        user = sign_in.set_password(services, transaction, present, stored)
    return _viewed(services, user)


@handles(ops.PREPARE_TOTP)
def prepare_totp(services: Services, body: NameRequest) -> ops.TotpSecret:
    """A secret, for `enable_totp` to be given back with a code."""
    _is_own(ops.PREPARE_TOTP, body.name)
    user = find_user(services.records, body.name)
    secret = extras.load(f"{TOTP}:new_secret")()
    return ops.TotpSecret(secret=secret, uri=extras.load(f"{TOTP}:uri")(secret, user.name))


@handles(ops.ENABLE_TOTP)
def enable_totp(services: Services, body: ops.TotpEnable) -> ops.UserView:
    """Once a code shows that an app has the secret; the code is used up with that."""
    user = _mine_or_below(services, ops.ENABLE_TOTP, body.name, body.password)
    if not user.password:
        raise InputError(f"{user.name} has no password, so no second factor either")
    extras.load(f"{TOTP}:check_secret")(body.secret)
    step = extras.load(f"{TOTP}:accepted_step")(body.secret, body.code, services.clock.now(), 0)
    if step is None:
        raise InputError("this is no code of this secret and this minute", hint="is the clock of the phone right?")
    return _changed(services, body.name, totp=body.secret.upper(), totp_step=step)


@handles(ops.DISABLE_TOTP)
def disable_totp(services: Services, body: ops.TotpDisable) -> ops.UserView:
    """Their own with the password; somebody else's, who has lost their phone, for who may do at least as much."""
    _mine_or_below(services, ops.DISABLE_TOTP, body.name, body.password)
    return _changed(services, body.name, totp="", totp_step=0)


def _changed(services: Services, name: str, **values: object) -> ops.UserView:
    with services.records.transaction() as transaction:
        user = find_user(transaction, name)
        user = transaction.put(msgspec.structs.replace(user, **values), user.version)
    return _viewed(services, user)


@handles(ops.DISABLE_USER)
def disable_user(services: Services, body: NameRequest) -> ops.UserView:
    """From the next request on; the name stays taken, since events name it."""
    check_everywhere("disable a user")
    check_stands_above(services, find_user(services.records, body.name))
    with services.records.transaction() as transaction:
        kept = OwnerKept(services, transaction)
        user = find_user(transaction, body.name)
        if user.disabled_at is None:
            user = msgspec.structs.replace(user, disabled_at=services.clock.now())
            user = transaction.put(user, user.version)
        sign_in.end_sessions(transaction, user.name)
        kept.check()
    return _viewed(services, user)


@handles(ops.ENABLE_USER)
def enable_user(services: Services, body: NameRequest) -> ops.UserView:
    """With the roles that they had."""
    check_everywhere("enable a user")
    check_stands_above(services, find_user(services.records, body.name))
    return _changed(services, body.name, disabled_at=None, failures=0, not_before=0.0)


def _is_own(operation: Operation, name: str) -> bool:
    """Whether somebody asks about themselves.

    Raises:
        DeniedError: They ask about somebody else, and may not.
    """
    principal = acting_principal()
    if principal is None:
        return False  # whoever runs this process
    if principal.id.partition("/")[0] == f"user:{name}":
        return True
    # A user is of all projects: who may do it in some could take a colleague's name before they have a role elsewhere.
    if not is_over_others(principal, operation, everywhere=operation.is_write):
        raise DeniedError(f"{principal.id} may {operation.name} for themselves alone")
    return False


def _mine_or_below(services: Services, operation: Operation, name: str, password: str | None) -> User:
    """The user, if it is oneself with the password, or somebody who may not do more.

    Raises:
        DeniedError: It is neither, or the password is wrong.
    """
    is_own = _is_own(operation, name)
    user = find_user(services.records, name)
    if not is_own:
        check_stands_above(services, user)
    elif user.password:
        attempt = sign_in.begin(services, name)
        if not sign_in.check(attempt, password or "").result():
            raise DeniedError("the present password is wrong, or there were too many attempts", hint="wait a minute")
        with services.records.transaction() as transaction:
            if sign_in.succeed(services, transaction, attempt, None) is None:
                raise ConflictError(f"somebody else has changed the password of {user.name} meanwhile")
    return user
