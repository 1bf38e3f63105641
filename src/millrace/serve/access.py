"""Who may call which model: asked of every request before its body, where others can reach the server.

The home's records are never opened here: the server's loop tells which tokens live and what they may call.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from millrace.core.principals import EVERYWHERE, includes
from millrace.core.types import Struct

PREFIX = b"/v2/repository/models/"  # below it models are loaded and unloaded
_HOW = "want a token with `admin` after it in the token file"
OPEN = frozenset({b"/v2/health/live", b"/v2/health/ready"})
BELIEVED_S = 300.0  # without news, what was told of tokens counts no longer
TOLD_EVERY_S = 60.0  # denials of one model become one event
_MAX_KNOWN, _MAX_TOLD, _MAX_WHO = 4096, 256, 20


class Caller(Struct, frozen=True, kw_only=True):
    """A token that lives.

    `digest` is the SHA-256 of its secret in hexadecimal, `where` the projects whose endpoints it may call, as
    `Principal.where` says it, `expires_at` in seconds since 1970. `may_load`: whether it may load and unload them,
    where that is done on request.
    """

    digest: str
    who: str
    where: tuple[str, ...]
    expires_at: float | None = None
    may_load: bool = True


class Denial(NamedTuple):
    """Why a request is not answered."""

    status: int
    message: str
    headers: bytes = b""


class Denied(Struct, frozen=True, kw_only=True):
    """Requests of one model that were denied: how many, with which status, and of whom, where that is known."""

    endpoint: str  # "*": of none, or of one that is not served
    statuses: dict[str, int]
    who: list[str] = []


class _Known(NamedTuple):
    who: str
    where: frozenset[str]
    expires_at: float
    may_load: bool


class Guard:
    """Lets pass or denies. For the event loop's thread; believes nobody until it is told of tokens.

    Args:
        shared: Paths that concern all models: open to whoever may call one, and showing those alone.

    Example:
        >>> digest = hashlib.sha256(b"mr_a").hexdigest()
        >>> guard = Guard()
        >>> guard.serve({"digits": "p"})
        >>> guard.believe([Caller(digest=digest, who="token:a", where=("p",))])
        >>> path = b"/v2/models/digits/infer"
        >>> guard.check(path, {b"authorization": b"Bearer mr_a"}), guard.check(path, {}).status
        (None, 401)
    """

    def __init__(self, shared: Iterable[bytes] = ()) -> None:
        self._shared = frozenset(shared)
        self._callers: dict[str, _Known] = {}
        self._projects: dict[bytes, str] = {}
        self._passes: dict[tuple[bytes, bytes], float] = {}  # header and target → until when
        self._believed_until = 0.0
        self.denied: Counter[str] = Counter()  # by endpoint
        self._untold: dict[str, tuple[Counter[str], set[str]]] = {}
        self._told_at: dict[str, float] = {}

    def believe(self, callers: Iterable[Caller], for_s: float | None = None) -> None:
        """These tokens live, and no others, from the next request on, for `BELIEVED_S` or as long as is said."""
        self._callers = {
            one.digest: _Known(
                one.who, frozenset(one.where), float("inf") if one.expires_at is None else one.expires_at, one.may_load
            )
            for one in callers
        }
        self._believed_until = time.monotonic() + (BELIEVED_S if for_s is None else for_s)
        self._passes.clear()

    def serve(self, projects: Mapping[str, str]) -> None:
        """These models are (to be) served, each of a project."""
        self._projects = {name.encode(): project for name, project in projects.items()}
        self._passes.clear()

    def check(self, target: bytes, headers: Mapping[bytes, bytes]) -> Denial | None:
        """Whether a request may go on: None, or why not.

        Args:
            target: As the client sent it.
            headers: By lower-case name.
        """
        given = headers.get(b"authorization", b"")
        until = self._passes.get((given, target))
        if until is not None and time.monotonic() < until:
            return None
        return self._decide(target, given)

    def _decide(self, target: bytes, given: bytes) -> Denial | None:
        path = path_of(target)
        if path in OPEN:
            return None
        name = b"" if path in self._shared else asked_model(path)
        now, steady = time.time(), time.monotonic()  # a token expires by the calendar; news age, whatever it jumps to
        if steady >= self._believed_until:
            return self._deny(name, "", Denial(503, "who may call is not known at this moment", b"Retry-After: 1\r\n"))
        caller = self._callers.get(digest_of(given))
        if caller is None or caller.expires_at <= now:
            what = "this token is unknown, expired or revoked" if given else "no token was sent"
            return self._deny(
                name, "", Denial(401, f"want `Authorization: Bearer TOKEN`: {what}", b"WWW-Authenticate: Bearer\r\n")
            )
        if not self._allows(caller.where, name):
            what = f"the model {name[:80].decode('utf-8', 'replace')!r}" if name else "any model here"
            may = ", ".join(sorted(one.decode() for one in self._projects if self._allows(caller.where, one)))
            return self._deny(
                name, caller.who, Denial(403, f"{caller.who} may not call {what}; it may: {may or 'none'}")
            )
        if path.startswith(PREFIX) and not caller.may_load:
            return self._deny(name, caller.who, Denial(403, f"{caller.who} may not load or unload models: {_HOW}"))
        if len(self._passes) >= _MAX_KNOWN:
            self._passes.clear()
        self._passes[given, target] = min(steady + caller.expires_at - now, self._believed_until)
        return None

    def _allows(self, where: frozenset[str], name: bytes) -> bool:
        """What is not served is only found missing by who may call everything: names of others' models stay theirs."""
        if not name:
            return bool(where)
        project = self._projects.get(name)
        return where == {EVERYWHERE} if project is None else includes(where, project)

    def sees(self, headers: Mapping[bytes, bytes], name: str) -> bool:
        """Whether whoever sent a request that passed may call a model."""
        caller = self._callers.get(digest_of(headers.get(b"authorization", b"")))
        return caller is not None and name.encode() in self._projects and self._allows(caller.where, name.encode())

    def who(self, headers: Mapping[bytes, bytes]) -> str:
        """Whose token a request brings that has passed."""
        caller = self._callers.get(digest_of(headers.get(b"authorization", b"")))
        return "unknown" if caller is None else caller.who

    def _deny(self, name: bytes, who: str, denial: Denial) -> Denial:
        endpoint = name.decode() if name in self._projects else "*"
        self.denied[endpoint] += 1
        if endpoint in self._untold or len(self._untold) < _MAX_TOLD:
            statuses, names = self._untold.setdefault(endpoint, (Counter(), set()))
            statuses[str(denial.status)] += 1
            if who and len(names) < _MAX_WHO:
                names.add(who)
        return denial

    def take_denied(self, now_s: float) -> list[Denied]:
        """What was denied since it was taken last: of one model at most once in `TOLD_EVERY_S`."""
        due = [name for name in self._untold if now_s - self._told_at.get(name, -TOLD_EVERY_S) >= TOLD_EVERY_S]
        self._told_at = {name: at for name, at in self._told_at.items() if now_s - at < TOLD_EVERY_S}
        self._told_at |= dict.fromkeys(due, now_s)
        taken = [(name, *self._untold.pop(name)) for name in due]
        return [Denied(endpoint=name, statuses=dict(counts), who=sorted(who)) for name, counts, who in taken]


def digest_of(header: bytes) -> str:
    """The digest of the secret in an Authorization header; of one that is none, a digest that no token has.

    Example:
        >>> digest_of(b"Bearer mr_x") == digest_of(b"bearer mr_x "), digest_of(b"Basic mr_x")
        (True, '')
    """
    return hashlib.sha256(header[7:].strip()).hexdigest() if header[:7].lower() == b"bearer " else ""


def path_of(target: bytes) -> bytes:
    """The path that is routed.

    Example:
        >>> path_of(b"/v2/models/a%62/?x=1")
        b'/v2/models/ab'
    """
    return unquote_to_bytes(target.partition(b"?")[0]).rstrip(b"/") or b"/"


def model_of(path: bytes) -> bytes:
    """The model's name in a path, empty where there is none.

    Example:
        >>> model_of(b"/v2/models/digits/infer"), model_of(b"/v1/models/digits:predict"), model_of(b"/v3")
        (b'digits', b'digits', b'')
    """
    parts = path.split(b"/")
    if len(parts) < 4 or parts[2] != b"models" or parts[1] not in (b"v1", b"v2"):
        return b""
    return parts[3].partition(b":")[0] if parts[1] == b"v1" else parts[3]


def asked_model(path: bytes) -> bytes:
    """The model that a request concerns: asked of one, or to load or unload one.

    Example:
        >>> asked_model(b"/v2/repository/models/digits/load"), asked_model(b"/v2/models/digits/infer")
        (b'digits', b'digits')
    """
    parts = path.split(b"/")
    return parts[4] if parts[1:4] == [b"v2", b"repository", b"models"] and len(parts) > 4 else model_of(path)
