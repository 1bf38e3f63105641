"""Whether events are as they were sealed: one pass over all of them, against the stored head and the signed ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from millrace.control.heads import head_digest, merged, statement_digest, stored_heads
from millrace.core.errors import CorruptError, UntrustedError
from millrace.core.operations.audit import AuditBreak, AuditReport, SignedHead
from millrace.core.ports import Verifier
from millrace.security.chain import ChainCheck
from millrace.security.merkle import CompactRange
from millrace.store import audit_sql
from millrace.store.audit_sql import ERASED, Row
from millrace.store.records_sql import SqlRecords

MOST_BREAKS = 1000  # in a report; a home with more is lost anyhow


class _Erasure(msgspec.Struct, frozen=True):
    """What the detail of an event `audit.erased` says."""

    erased: list[tuple[int, int]] = []


def check_events(records: SqlRecords, verifier: Verifier, published: Iterable[SignedHead] = ()) -> AuditReport:
    """Find every place where events or heads are not what they were; while others go on writing.

    Args:
        records: The events, and the heads that are stored with them.
        verifier: Knows whose signatures count.
        published: Heads that were kept elsewhere.
    """
    stored = stored_heads(records)  # before the end of the chain is looked up: none is beyond it
    checking = _Checking(verifier, stored, list(published))
    size, chain = checking.end(records)
    last, _ = audit_sql.last_event(records)
    is_beyond = not isinstance(last, int) or last > checking.end(records)[0]  # asked after: it may grow meanwhile
    checking.read(records, last if is_beyond and isinstance(last, int) else size)
    checking.check_end(size, chain, last if is_beyond else None)
    return checking.report(audit_sql.count_unsealed(records))


class _Checking:
    """The state of one pass."""

    def __init__(self, verifier: Verifier, stored: list[SignedHead], published: list[SignedHead]) -> None:
        self._breaks: list[AuditBreak] = []
        self._check = ChainCheck()
        self._tree = CompactRange()
        self._explained: list[tuple[int, int]] = []
        self._keys: set[str] = set()
        self._proven = 0
        self._matched = 0  # the size of the last head whose chain was right
        self._is_rewritten = False
        self._check_heads(stored, published)
        self._heads = self._signed(verifier, merged(stored, published))

    def end(self, records: SqlRecords) -> tuple[int, str]:
        """The number and the digest of the event that was sealed last."""
        try:
            return records.head()
        except CorruptError as error:
            if not any(one.explanation == error.message for one in self._breaks):
                self._break(0, 0, "head", error.message)
            seq, chain = audit_sql.last_event(records)
            return (seq, str(chain)) if isinstance(seq, int) else (0, "")

    def read(self, records: SqlRecords, size: int) -> None:
        """Check the events up to a number, and the heads on the way."""
        waiting = self._heads[::-1]
        for batch in audit_sql.rows(records, 0, size):
            rows = batch
            while rows and waiting and waiting[-1].size <= rows[-1][0]:  # a head inside: its tree ends there
                cut = next((at for at, row in enumerate(rows) if row[0] > waiting[-1].size), len(rows))
                self._feed(rows[:cut])
                head = waiting.pop()
                if self._check.seq == head.size:  # else its last event is missing, which the next one shows
                    self._match(head)
                rows = rows[cut:]
            self._feed(rows)
        if waiting:  # all are over more events than there are
            self._match(waiting[0])

    def check_end(self, size: int, chain: str, beyond: Any) -> None:
        """Whether the events end where the stored head says; `beyond`: the last one, if they do not."""
        check = self._check
        if beyond is not None:
            self._break(
                size + 1, beyond if isinstance(beyond, int) else size + 1, "extra",
                f"there is an event {beyond}, but only {size} were sealed: the stored head was rolled back, or the "
                "event put in",
            )  # fmt: skip
        elif check.seq < size:
            self._break(check.seq + 1, size, "cut", f"the events end at {check.seq}, but {size} were sealed")
        elif check.chain != chain and not any(one.seq == size for one in check.breaks):
            self._break(size, size, "altered", f"event {size} is not the one that was sealed last")

    def report(self, unsealed: int) -> AuditReport:
        """Everything that was found, in order."""
        self._check_erasures()
        breaks = [*self._breaks, *(AuditBreak(first=one.seq, last=one.seq, problem=one.problem,
                                              explanation=one.explanation) for one in self._check.breaks)]  # fmt: skip
        breaks.sort(key=lambda one: (one.first, one.last))
        return AuditReport(
            is_whole=not breaks, events=self._check.seq, chain=self._check.chain, unsealed=unsealed,
            heads=len(self._heads), erased=sum(last - first + 1 for first, last in self._check.erased),
            proven=self._proven, keys=sorted(self._keys), breaks=breaks[:MOST_BREAKS],
        )  # fmt: skip

    def _feed(self, rows: list[Row]) -> None:
        if rows:
            self._tree.extend(self._check.feed(rows))
            for row in rows:
                if row[3] == ERASED and isinstance(row[8], str):
                    self._explained += _stretches(row[8])

    def _match(self, head: SignedHead) -> None:
        """Whether the events so far are those of a head."""
        check, first = self._check, self._matched + 1
        if check.seq < head.size:
            proven = f"; the last signed head that still holds is over {self._matched}"
            text = f"the events end at {check.seq}, but a head was signed over {head.size}{proven}"
            self._break(first, head.size, "cut", text)
        elif check.chain != head.chain:
            if not self._is_rewritten and not any(
                one.problem == "altered" and first <= one.seq <= head.size for one in check.breaks
            ):
                text = f"events {first} to {head.size} are not those that were signed: some were rewritten"
                self._break(first, head.size, "rewritten", text)
            self._is_rewritten = True  # then every later head differs too
        elif not check.breaks and self._tree.root().hex() != head.root:
            self._break(head.size, head.size, "head", f"the root of the head over {head.size} events is wrong")
        else:
            self._matched = head.size
            self._proven = max(self._proven, head.size) if not check.breaks else self._proven

    def _check_heads(self, stored: list[SignedHead], published: list[SignedHead]) -> None:
        """Whether one is missing: each names the one before."""
        digest, size = "", 0
        for head in stored:
            if head.previous != digest:
                self._break(
                    size + 1, head.size, "head",
                    f"a signed head between those over {size} and {head.size} events is gone, or one is altered",
                )  # fmt: skip
            digest, size = head_digest(head), head.size
        kept = {head_digest(head) for head in stored}
        for head in merged(published):
            if head_digest(head) not in kept:
                text = f"the head over {head.size} events that was published is not stored any more"
                self._break(head.size, head.size, "head", text)

    def _signed(self, verifier: Verifier, heads: list[SignedHead]) -> list[SignedHead]:
        """Those that a trusted key has signed; a head that a signed one names needs no signature looked at."""
        found: list[SignedHead] = []
        named: set[str] = set()
        for head in reversed(heads):
            if head_digest(head) in named or self._is_signed(verifier, head):
                found.append(head)
                named.add(head.previous)
        return found[::-1]

    def _is_signed(self, verifier: Verifier, head: SignedHead) -> bool:
        try:
            self._keys.add(verifier.verify(statement_digest(head), head.signature.encode()))
        except UntrustedError as error:
            self._break(head.size, head.size, "signature", f"the head over {head.size} events: {error.message}")
            return False
        return True

    def _check_erasures(self) -> None:
        """Details that are gone, and no event says that they were erased."""
        for first, last in _outside(self._check.erased, self._explained):
            text = f"the detail of event {first} is gone, and no event says that it was erased"
            if last > first:
                text = f"the details of events {first} to {last} are gone, and no event says that they were erased"
            self._break(first, last, "erased", text)

    def _break(self, first: int, last: int, problem: str, explanation: str) -> None:
        self._breaks.append(AuditBreak(first=first, last=last, problem=problem, explanation=explanation))


def _stretches(detail: str) -> list[tuple[int, int]]:
    try:
        return msgspec.json.decode(detail, type=_Erasure).erased
    except msgspec.MsgspecError:
        return []  # it was altered, which the chain tells


def _outside(stretches: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of sorted stretches no other one covers.

    Example:
        >>> _outside([(1, 5), (8, 9)], [(2, 3), (9, 20)])
        [(1, 1), (4, 5), (8, 8)]
    """
    found: list[tuple[int, int]] = []
    covers = sorted(others)
    at = 0
    for first, last in stretches:
        while at < len(covers) and covers[at][1] < first:
            at += 1
        place, here = first, at
        while here < len(covers) and covers[here][0] <= last:
            if covers[here][0] > place:
                found.append((place, covers[here][0] - 1))
            place = max(place, covers[here][1] + 1)
            here += 1
        if place <= last:
            found.append((place, last))
    return found


def as_stretches(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of ascending numbers.

    Example:
        >>> as_stretches([1, 2, 3, 7])
        [(1, 3), (7, 7)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
