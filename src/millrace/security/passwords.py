"""Passwords: argon2id, few at a time, with the same work for names that nobody has."""

from __future__ import annotations

import base64
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

from millrace.core.errors import InputError, UnavailableError

T = TypeVar("T")
MIN_LENGTH, MAX_LENGTH = 12, 1000
AT_ONCE = max(1, min(3, (os.cpu_count() or 1) // 2))  # 64 MiB each, and the other processors are for the requests
MOST_WAITING = 128
NICENESS = 10  # of the threads that hash: requests of people who are signed in go first
# RFC 9106's second choice, with one lane: many lanes would take all processors from the requests.
_HASHER = PasswordHasher(time_cost=3, memory_cost=64 << 10, parallelism=1, type=Type.ID)
# What is left of a bad password when digits and signs are taken away.
_WORDS = frozenset(
    [
        "password",
        "passwort",
        "passwd",
        "passphrase",
        "admin",
        "administrator",
        "root",
        "owner",
        "user",
        "username",
        "login",
        "changeme",
        "letmein",
        "welcome",
        "secret",
        "default",
        "qwerty",
        "qwertyuiop",
        "qwertz",
        "qwertzuiop",
        "asdf",
        "asdfgh",
        "asdfghjkl",
        "iloveyou",
        "monkey",
        "dragon",
        "sunshine",
        "test",
        "testing",
        "example",
        "guest",
        "demo",
        "temp",
        "temporary",
        "millrace",
        "mlflow",
        "correcthorsebatterystaple",
    ]
)


class Desk:
    """Does so many things at once, lets some more wait, and refuses the rest. Thread-safe.

    Args:
        at_once: Threads.
        most_waiting: What may wait for one.
    """

    def __init__(self, at_once: int = AT_ONCE, most_waiting: int = MOST_WAITING) -> None:
        self._pool = ThreadPoolExecutor(at_once, "millrace-passwords", initializer=_yield_to_others)
        self._room = threading.BoundedSemaphore(at_once + most_waiting)

    def submit(self, work: Callable[..., T], *arguments: object) -> Future[T]:
        """Do it when its turn comes.

        Raises:
            UnavailableError: Too many wait already.

        Example:
            >>> Desk().submit(str.upper, "a").result()
            'A'
        """
        if not self._room.acquire(blocking=False):
            raise UnavailableError("too many passwords are being checked at once", hint="try again in some seconds")
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(lambda _: self._room.release())
        return future


def _yield_to_others() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


@cache
def desk() -> Desk:
    """The one of this process."""
    return Desk()


def hash_password(password: str) -> str:
    """A password as it is kept: argon2id in its PHC form.

    Raises:
        UnavailableError: Too many wait already.

    Example:
        >>> hash_password("blue tractor on mars")[:27]
        '$argon2id$v=19$m=65536,t=3,'
    """
    return desk().submit(_HASHER.hash, _normal(password)).result()


def check_password(stored: str, password: str) -> Future[bool]:
    """Whether it is the password, found out when its turn comes.

    Args:
        stored: What `hash_password` has returned; "" takes as long and is never right.
        password: What somebody has typed.

    Raises:
        UnavailableError: Too many wait already.
    """
    return desk().submit(_verify, stored, password)


def _verify(stored: str, password: str) -> bool:
    try:
        return _HASHER.verify(stored or _nobodys(), _normal(password)) and bool(stored)
    except (VerificationError, InvalidHashError):
        return False


@cache
def _nobodys() -> str:
    """What no password has; nothing is hashed to make it, or the first wrong name would take twice as long."""
    salt, digest = (base64.b64encode(os.urandom(size)).decode().rstrip("=") for size in (16, 32))
    return f"$argon2id$v=19$m={_HASHER.memory_cost},t={_HASHER.time_cost},p={_HASHER.parallelism}${salt}${digest}"


def _normal(password: str) -> str:
    """The same whichever way a keyboard spells it; what is too long is never hashed whole."""
    return unicodedata.normalize("NFKC", password[: MAX_LENGTH + 1])


def check_new_password(password: str, names: Iterable[str] = ()) -> None:
    """Refuse an empty, short, default or guessable password.

    Args:
        password: What somebody wants.
        names: What it may not be made of: the user's name and address.

    Raises:
        InputError: It is one; the message does not repeat it.

    Example:
        >>> check_new_password("blue tractor on mars", ["ada"])
        >>> check_new_password("Password1234!")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: this password is among the first that anybody would try
    """
    text = _normal(password)
    hint = "several words that do not belong together are easy to keep in mind"
    if not MIN_LENGTH <= len(text) <= MAX_LENGTH:
        raise InputError(
            f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters, got {min(len(text), MAX_LENGTH + 1)}", hint=hint
        )
    folded = text.casefold()
    core = "".join(one for one in folded if one.isalpha())
    own = {"".join(one for one in part if one.isalpha()) for name in names for part in _parts(name.casefold())}
    if _shortest_period(core) in _WORDS | own or len(set(folded)) < 5 or _is_sequence(folded):
        raise InputError("this password is among the first that anybody would try", hint=hint)


def _parts(name: str) -> list[str]:
    return [name, name.partition("@")[0], *name.replace("@", ".").split(".")]


def _shortest_period(text: str) -> str:
    """`abab` is `ab`, twice; a text that repeats nothing is itself."""
    at = (text + text).find(text, 1)
    return text[:at] if 0 < at < len(text) else text


def _is_sequence(text: str) -> bool:
    """Whether most characters follow the one before: 123456789012, abcdefghijkl."""
    steps = [abs(ord(b) - ord(a)) for a, b in pairwise(text)]
    return sum(step <= 1 for step in steps) > 0.7 * len(steps)
