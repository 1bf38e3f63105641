"""Cookies of browsers that have signed in, the token that their forms carry, and addresses that guess too often."""

from __future__ import annotations

import hmac
import ipaddress
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from millrace.api.bodies import read_body
from millrace.core.clock import Clock
from millrace.core.errors import DeniedError, InputError
from millrace.core.types import Session

SESSION, FORM, PENDING = "millrace", "millrace-form", "millrace-oidc"
CSRF_HEADER, CSRF_FIELD = "x-csrf-token", "csrf"
FORM_TYPE = "application/x-www-form-urlencoded"
MAX_FORM_BYTES, MAX_FIELDS = 64 << 10, 50
FREE_FAILURES = 20  # of an address: many people may share one
FORGET_S = 30.0  # one failure is forgotten so often
MOST_PAUSE_S = 300.0
MOST_ADDRESSES = 10_000
_USING: ContextVar[Session | None] = ContextVar("millrace_session", default=None)
_PLACE = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*")  # of this server: never //host or \host


@contextmanager
def using(session: Session | None) -> Iterator[None]:
    """What is answered inside is asked with this session's cookie."""
    before = _USING.set(session)
    try:
        yield
    finally:
        _USING.reset(before)


def current_session() -> Session | None:
    """The session whose cookie the request has."""
    return _USING.get()


# --------------------------------------------------------------------------- cookies


def is_secure(scope: Scope) -> bool:
    """Whether it came over TLS, to here or to a trusted proxy."""
    return scope.get("scheme") == "https"


def cookie_name(scope: Scope, name: str) -> str:
    """Over TLS with the prefix that lets no other host, path or plain connection set it."""
    return f"__Host-{name}" if is_secure(scope) else name


def cookie(request: Request, name: str) -> str:
    """A cookie's value, or ""."""
    return request.cookies.get(cookie_name(request.scope, name), "")


def set_cookie(request: Request, response: Response, name: str, value: str, *, strict: bool = False) -> None:
    """Only for requests, not for scripts; gone when the browser ends. Strict: never on a way here from elsewhere."""
    response.set_cookie(
        cookie_name(request.scope, name), value, path="/", secure=is_secure(request.scope), httponly=True,
        samesite="strict" if strict else "lax",
    )  # fmt: skip


def drop_cookie(request: Request, response: Response, name: str) -> None:
    """Forget it."""
    response.delete_cookie(
        cookie_name(request.scope, name), path="/", secure=is_secure(request.scope), httponly=True, samesite="lax"
    )


# --------------------------------------------------------------------------- forms


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a small form.

    Raises:
        InputError: It is none, or names a field twice.
        TooLargeError: It is large.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM_TYPE:
        raise InputError(f"want a form ({FORM_TYPE})")
    return form_fields(await read_body(request, MAX_FORM_BYTES))


def form_fields(data: bytes) -> dict[str, str]:
    """The fields of a form's body.

    Raises:
        InputError: It has too many fields, or one twice.

    Example:
        >>> form_fields(b"name=ada&next=%2Fruns")
        {'name': 'ada', 'next': '/runs'}
    """
    try:
        pairs = parse_qsl(
            data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace"
        )
    except ValueError:
        raise InputError(f"a form has at most {MAX_FIELDS} fields") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise InputError("the form names a field twice")
    return fields


def is_same(left: str, right: str) -> bool:
    """Whether two secrets are equal and not empty; how long that takes says nothing about them.

    Example:
        >>> is_same("a", "a"), is_same("a", "b"), is_same("", "")
        (True, False, False)
    """
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace")) and bool(left)


async def with_csrf_checked(scope: Scope, receive: Receive, session: Session) -> Receive:
    """Let an unsafe request pass that has the session's token, in a header or a field of its form.

    Returns:
        From where the application is to receive the request: what was read here comes again.

    Raises:
        DeniedError: It has no token, or another one: a page of somebody else may have sent it.
    """
    request = Request(scope, receive)
    given = request.headers.get(CSRF_HEADER, "")
    if not given and request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM_TYPE:
        data = await read_body(request, MAX_FORM_BYTES)
        given, receive = form_fields(data).get(CSRF_FIELD, ""), _again(data, receive)
    if not is_same(given, session.csrf):
        raise DeniedError(
            f"a request that changes something wants the session's token in {CSRF_HEADER} or the field {CSRF_FIELD}",
            hint="reload the page; scripts use a token: `millrace tokens create`",
        )
    return receive


def _again(data: bytes, receive: Receive) -> Receive:
    is_told = False

    async def tell() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": data, "more_body": False}

    return tell


def safe_next(place: str) -> str:
    """Where to go on after signing in: a place of this server, else its first page.

    Example:
        >>> [safe_next(one) for one in ("/runs?q=a", "//evil.example", "https://evil.example", "/\\\\evil.example", "")]
        ['/runs?q=a', '/', '/', '/', '/']
    """
    is_page = _PLACE.fullmatch(place) and len(place) <= 2000
    return place if is_page and not place.startswith(("/login?", "/logout")) and place != "/login" else "/"


# --------------------------------------------------------------------------- addresses


class Addresses:
    """Addresses that have failed to sign in, in this process. Thread-safe.

    Args:
        clock: Where the time comes from.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures: OrderedDict[str, tuple[float, float, float]] = OrderedDict()  # count, when, not before

    def wait_s(self, address: str) -> int:
        """How many seconds an address has to wait; 0: none."""
        with self._lock:
            _, _, not_before = self._failures.get(network(address), (0.0, 0.0, 0.0))
        return max(0, math.ceil(not_before - self._clock.now()))

    def failed(self, address: str) -> None:
        """Remember it; each failure beyond the free ones doubles the wait."""
        key, now = network(address), self._clock.now()
        with self._lock:
            count, at, _ = self._failures.pop(key, (0.0, now, 0.0))
            count = max(0.0, count - max(0.0, now - at) / FORGET_S) + 1
            over = math.ceil(count) - FREE_FAILURES
            pause = min(2.0 ** min(over, 20), MOST_PAUSE_S) if over >= 0 else 0.0
            self._failures[key] = (min(count, FREE_FAILURES + 10), now, now + pause)
            while len(self._failures) > MOST_ADDRESSES:
                self._failures.popitem(last=False)


def network(address: str) -> str:
    """An address as it is counted: of IPv6 the /64, which one person may have.

    Example:
        >>> network("10.0.0.7"), network("2001:db8::1:2"), network("::ffff:10.0.0.7"), network("?")
        ('10.0.0.7', '2001:db8::', '10.0.0.7', '?')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(found) >> 64 << 64))


def address_of(request: Request) -> str:
    """Whence a request comes; of one that a trusted proxy passes on, what that says."""
    return request.client.host if request.client is not None else "?"
