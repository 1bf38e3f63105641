"""People who sign in elsewhere: which user here they are, and the groups that they come with."""

from __future__ import annotations

import re

import msgspec

from millrace.control.services import Services
from millrace.core.errors import UnauthenticatedError
from millrace.core.ports import Transaction
from millrace.core.types import User

_OTHER = re.compile(r"[^a-z0-9._@+-]+")
_RESERVED = re.compile(r"owner(-\d+)?")  # whom a server makes an owner at its first start
MAX_NAME = 56  # leaves room for a number


def known_user(
    services: Services, transaction: Transaction, external: str, name: str, email: str, groups: tuple[str, ...]
) -> User:
    """The user of an identity: found by what never changes of it, made at the first sign-in, who may nothing yet.

    A name that somebody here has already is not theirs: they get another one.

    Args:
        services: The home.
        transaction: In which the user is changed.
        external: `issuer|subject`.
        name: What they are called there.
        email: Their address there.
        groups: Of theirs, now.

    Raises:
        UnauthenticatedError: They are disabled here.
    """
    found = transaction.find(User, {"external": external})
    if found:
        user = found[0]
        if user.disabled_at is not None:
            raise UnauthenticatedError(f"{user.name} is disabled")
        changed = msgspec.structs.replace(user, email=email, groups=groups)
        return user if changed == user else transaction.put(changed, user.version)
    free = _free_name(transaction, name or email)
    user = User(id=free, name=free, created_at=services.clock.now(), email=email, groups=groups, external=external)
    return transaction.put(user, expect_version=0)


def _free_name(transaction: Transaction, wanted: str) -> str:
    name = plain_name(wanted)
    number = 1
    free = name
    while transaction.get(User, free) is not None:
        number += 1
        free = f"{name}-{number}"
    return free


def plain_name(text: str) -> str:
    """A name that a user may have, from one of elsewhere.

    Example:
        >>> plain_name("Ada Lovelace"), plain_name("--/"), plain_name("ada@example.org"), plain_name("Owner")
        ('ada-lovelace', 'user', 'ada@example.org', 'user')
    """
    name = _OTHER.sub("-", text.strip().lower()).lstrip("._@+-")[:MAX_NAME].rstrip("._@+-")
    return "user" if not name or _RESERVED.fullmatch(name) else name
