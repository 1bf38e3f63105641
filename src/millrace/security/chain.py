"""The event chain, checked: whether sealed events are the ones that were sealed.

Pure, and on purpose not the code that seals (`store.sealing`): the two share only the formulas of
docs/notes/events-and-sealing.md.

* commitment = HMAC-SHA-256(key = salt, detail as canonical JSON), hexadecimal
* chain(n) = SHA-256(chain(n-1) as 32 bytes ‖ canonical JSON of [seq, at, actor, verb, subject, commitment])
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import msgspec

GENESIS = "0" * 64  # what the first event is chained to


class Link(Protocol):
    """A sealed event with what the check needs; salt and detail are None once erased."""

    @property
    def seq(self) -> int:
        """Its place: 1, 2, 3 …"""
        ...

    @property
    def at(self) -> float:
        """Seconds since 1970."""
        ...

    @property
    def actor(self) -> str:
        """An opaque id."""
        ...

    @property
    def verb(self) -> str:
        """What was done."""
        ...

    @property
    def subject(self) -> str:
        """To what."""
        ...

    @property
    def commitment(self) -> str:
        """HMAC of the detail."""
        ...

    @property
    def chain(self) -> str:
        """Digest that chains it to the one before."""
        ...

    @property
    def salt(self) -> bytes | None:
        """Key of the commitment."""
        ...

    @property
    def detail(self) -> bytes | None:
        """Canonical JSON."""
        ...


class Break(msgspec.Struct, frozen=True):
    """A place where the chain does not hold: the event `seq`, or what begins there."""

    seq: int
    problem: Literal["missing", "order", "altered", "detail", "cut"]
    explanation: str


class Checked(msgspec.Struct, frozen=True):
    """How far the check came: give `seq` and `chain` to the next call to go on from there."""

    seq: int
    chain: str
    erased: int = 0
    broken: Break | None = None


# seq, at, actor, verb, subject, commitment, chain, salt, detail: as they stand in the store, whatever their types
Row = tuple[Any, ...]
_encode = msgspec.json.Encoder(order="deterministic").encode


def commitment(salt: bytes, detail: bytes) -> str:
    """What the chain holds of a detail: without the salt nobody can guess the detail from it.

    Example:
        >>> commitment(b"salt", b"{}")[:16]
        '2a1e7d8006270f6e'
    """
    return hmac.digest(salt, detail, "sha256").hex()


def link_bytes(seq: int, at: float, actor: str, verb: str, subject: str, commitment: str) -> bytes:
    """What an event adds to the chain; also the leaf of the Merkle tree.

    Example:
        >>> link_bytes(1, 0.5, "user:a", "run.end", "run:1", "00")
        b'[1,0.5,"user:a","run.end","run:1","00"]'
    """
    return _encode((seq, at, actor, verb, subject, commitment))


def chain_digest(previous: str, link: Link) -> str:
    """The digest of an event chained to the one before."""
    leaf = link_bytes(link.seq, link.at, link.actor, link.verb, link.subject, link.commitment)
    return hashlib.sha256(bytes.fromhex(previous) + leaf).hexdigest()


class ChainCheck:
    """Checks sealed events as they are read, and goes on after a break, so that one break is not a thousand.

    Args:
        seq: The place up to which the chain is known to hold.
        chain: Its digest there, 64 hexadecimal digits.
    """

    def __init__(self, seq: int = 0, chain: str = GENESIS) -> None:
        self.seq, self.chain = seq, chain
        self.breaks: list[Break] = []
        self.erased: list[tuple[int, int]] = []  # first and last of each stretch of events without their detail
        self._previous: tuple[bytes, ...] = (bytes.fromhex(chain),)  # what the next may be chained to; (): not known

    def feed(self, rows: Iterable[Row], has_details: bool = True) -> list[bytes]:
        """Check the next events.

        Args:
            rows: In the order of seq.
            has_details: Whether salt and detail were read.

        Returns:
            The leaf hashes of the Merkle tree.
        """
        leaves: list[bytes] = []
        sha256, hmac_digest, fromhex = hashlib.sha256, hmac.digest, bytes.fromhex
        seq, chain = self.seq, self.chain
        previous = self._previous[0] if len(self._previous) == 1 else None
        for row in rows:
            number, at, actor, verb, subject, promise, stored, salt, detail = row
            if number == seq + 1 and previous is not None:  # the one quick path: 2 µs
                link = _encode((number, at, actor, verb, subject, promise))
                digest = sha256(previous + link)
                try:
                    is_good = digest.hexdigest() == stored and (
                        not has_details or hmac_digest(salt, detail.encode(), "sha256") == fromhex(promise)
                    )
                except (TypeError, ValueError, AttributeError):  # erased, or of another type than it must be
                    is_good = False
                if is_good:
                    leaves.append(sha256(b"\0" + link).digest())
                    seq, chain, previous = number, stored, digest.digest()
                    continue
            self.seq, self.chain = seq, chain
            if previous is not None:
                self._previous = (previous,)
            self._look_closely(row, has_details, leaves)
            seq, chain = self.seq, self.chain
            previous = self._previous[0] if len(self._previous) == 1 else None
        self.seq, self.chain = seq, chain
        if previous is not None:
            self._previous = (previous,)
        return leaves

    def _look_closely(self, row: Row, has_details: bool, leaves: list[bytes]) -> None:
        """What is wrong with a row, if anything."""
        number, at, actor, verb, subject, promise, stored, salt, detail = row
        seq = self.seq
        if not isinstance(number, int) or number <= seq:
            place = number if isinstance(number, int) else seq + 1
            self._break(place, "order", f"event {number} follows event {seq}: the order is broken")
            return
        if number > seq + 1:
            self._break(seq + 1, "missing", f"event {seq + 1} is missing: event {number} follows event {seq}")
            self._previous = ()
        link = _encode((number, at, actor, verb, subject, promise))
        leaves.append(hashlib.sha256(b"\0" + link).digest())
        digests = [hashlib.sha256(previous + link) for previous in self._previous]
        self.seq, self.chain = number, str(stored)
        good = [digest.digest() for digest in digests if digest.hexdigest() == stored]
        if good:
            self._previous = (good[0],)
        else:  # its own digest may have been altered, or the rest of it: the next one shows which
            if digests:
                self._break(number, "altered", f"event {number} ({verb} {subject}) has been altered")
            self._previous = tuple({*_as_digest(stored), *(digest.digest() for digest in digests)})
        if has_details and (good or not digests):
            self._check_detail(number, verb, promise, salt, detail)

    def _check_detail(self, seq: int, verb: str, promise: str, salt: Any, detail: Any) -> None:
        if salt is None and detail is None:
            if self.erased and self.erased[-1][1] == seq - 1:
                self.erased[-1] = (self.erased[-1][0], seq)
            else:
                self.erased.append((seq, seq))
        elif salt is None or detail is None:
            self._break(seq, "detail", f"the detail of event {seq} is there without its salt, or the reverse")
        elif not _keeps(promise, salt, detail):
            self._break(seq, "detail", f"the detail of event {seq} ({verb}) has been altered")

    def _break(self, seq: int, problem: Any, explanation: str) -> None:
        self.breaks.append(Break(seq, problem, explanation))


def _keeps(promise: Any, salt: Any, detail: Any) -> bool:
    if isinstance(detail, str):
        detail = detail.encode()
    return isinstance(salt, bytes) and isinstance(detail, bytes) and commitment(salt, detail) == promise


def _as_digest(stored: Any) -> list[bytes]:
    try:
        return [bytes.fromhex(stored)]
    except (TypeError, ValueError):
        return []


def verify(
    links: Iterable[Link],
    since: tuple[int, str] = (0, GENESIS),
    head: tuple[int, str] | None = None,
) -> Checked:
    """Check events in order and stop at the first break.

    Args:
        links: Sealed events after `since`, ordered by seq.
        since: The seq and chain digest up to which the chain is known to hold.
        head: The last seq and chain digest as kept elsewhere; shows a tail that was cut off.

    Returns:
        The last good place, how many details have been erased, and the break if there is one.

    Example:
        >>> verify([]).broken is None, verify([], head=(3, "f" * 64)).broken.problem
        (True, 'cut')
    """
    check = ChainCheck(*since)
    seq, chain = since
    for one in links:
        detail = one.detail.decode("utf-8", "replace") if one.detail is not None else None
        check.feed([(one.seq, one.at, one.actor, one.verb, one.subject, one.commitment, one.chain, one.salt, detail)])
        if check.breaks:
            return Checked(seq, chain, _count(check.erased), check.breaks[0])
        seq, chain = check.seq, check.chain
    broken = None
    if head is not None and (seq, chain) != head:
        broken = Break(seq, "cut", f"the chain ends at event {seq}, but event {head[0]} was the last to be sealed")
    return Checked(seq, chain, _count(check.erased), broken)


def _count(stretches: Iterable[tuple[int, int]]) -> int:
    return sum(last - first + 1 for first, last in stretches)
