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
from typing import Literal, Protocol

import msgspec

from millrace.core.ids import canonical_json

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
    """The first place where the chain does not hold."""

    seq: int
    problem: Literal["missing", "order", "altered", "detail", "cut"]
    explanation: str


class Checked(msgspec.Struct, frozen=True):
    """How far the check came: give `seq` and `chain` to the next call to go on from there."""

    seq: int
    chain: str
    erased: int = 0
    broken: Break | None = None


def commitment(salt: bytes, detail: bytes) -> str:
    """What the chain holds of a detail: without the salt nobody can guess the detail from it.

    Example:
        >>> commitment(b"salt", b"{}")[:16]
        '2a1e7d8006270f6e'
    """
    return hmac.digest(salt, detail, "sha256").hex()


def chain_digest(previous: str, link: Link) -> str:
    """The digest of an event chained to the one before."""
    fields = [link.seq, link.at, link.actor, link.verb, link.subject, link.commitment]
    return hashlib.sha256(bytes.fromhex(previous) + canonical_json(fields)).hexdigest()


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
    seq, chain = since
    erased = 0
    for link in links:
        broken = _break(link, seq, chain)
        if broken is not None:
            return Checked(seq, chain, erased, broken)
        erased += link.detail is None
        seq, chain = link.seq, link.chain
    broken = None
    if head is not None and (seq, chain) != head:
        broken = Break(seq, "cut", f"the chain ends at event {seq}, but event {head[0]} was the last to be sealed")
    return Checked(seq, chain, erased, broken)


def _break(link: Link, seq: int, chain: str) -> Break | None:
    """What is wrong with the next link."""
    if link.seq > seq + 1:
        return Break(seq + 1, "missing", f"event {seq + 1} is missing: event {link.seq} follows event {seq}")
    if link.seq != seq + 1:
        return Break(link.seq, "order", f"event {link.seq} follows event {seq}: the order is broken")
    if not hmac.compare_digest(chain_digest(chain, link), link.chain):
        return Break(link.seq, "altered", f"event {link.seq} ({link.verb} {link.subject}) has been altered")
    if (link.salt is None) != (link.detail is None):
        return Break(link.seq, "detail", f"the detail of event {link.seq} is there without its salt, or the reverse")
    if link.salt is not None and link.detail is not None and commitment(link.salt, link.detail) != link.commitment:
        return Break(link.seq, "detail", f"the detail of event {link.seq} ({link.verb}) has been altered")
    return None
