"""Signed heads of the Merkle tree over the sealed events: made by the leading server, kept, read back.

A head says: there were so many events, and these. Who keeps one elsewhere can show later that an event was altered,
removed or put in, also by somebody who can write the records.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import msgspec

from millrace.control.head_publishing import WEBHOOK_TIMEOUT_S, publish_pending
from millrace.control.services import Services
from millrace.core.errors import CorruptError, DeniedError, InputError, MillraceError
from millrace.core.ids import digest_json
from millrace.core.operations.audit import SignedHead
from millrace.core.types import AuditHead, Lease
from millrace.security.chain import ChainCheck
from millrace.security.merkle import CompactRange
from millrace.store import audit_sql, queries
from millrace.store.leases import check_fence
from millrace.store.records_sql import SqlRecords

STATEMENT = "millrace audit head v1"
BATCHES_AT_ONCE = 2  # of the store's batches in one tick: a tenth of a second; the leader has other things to do
log = logging.getLogger(__name__)


def ledger(services: Services) -> SqlRecords:
    """The records with all their events.

    Raises:
        DeniedError: Who asks may see some projects only.
    """
    records = services.records
    if not isinstance(records, SqlRecords):
        raise DeniedError("the audit is about all projects, and you may work in some", hint="ask an owner")
    return records


def statement_digest(head: SignedHead) -> str:
    """What of a head is signed: the digest of canonical JSON of everything but the signature.

    Example:
        >>> statement_digest(SignedHead(size=1, root="00", chain="11", at=0.5, previous="", signature=""))[:14]
        'sha256:e74bc11'
    """
    return digest_json(
        {
            "statement": STATEMENT, "size": head.size, "root": head.root, "chain": head.chain, "at": head.at,
            "previous": head.previous,
        }
    )  # fmt: skip


def head_digest(head: SignedHead) -> str:
    """What the next head names as the one before: its digest, the signature too."""
    return digest_json(head)


def as_signed(head: AuditHead) -> SignedHead:
    """A stored head as it is published."""
    return SignedHead(
        size=head.size, root=head.root, chain=head.chain, at=head.created_at, previous=head.previous,
        signature=head.signature,
    )  # fmt: skip


def stored_heads(records: SqlRecords) -> list[SignedHead]:
    """All, the smallest first."""
    return [as_signed(head) for head in records.find(AuditHead, order="size")]


def newest_head(records: SqlRecords) -> AuditHead | None:
    """The largest."""
    return next(iter(records.find(AuditHead, order="-size", limit=1)), None)


def parse_heads(text: str) -> list[SignedHead]:
    """Heads in lines of JSON, as a server publishes them; events among them (an export) are passed over.

    A line that its server did not finish, and wrote again, is passed over too.

    Raises:
        InputError: A line is something else.

    Example:
        >>> parse_heads('{"kind":"event","seq":1}\\n')
        []
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found: list[SignedHead] = []
    for number, line in enumerate(lines):
        try:
            kind = msgspec.json.decode(line, type=dict[str, object]).get("kind")
            if kind == "head":
                found.append(msgspec.json.decode(line, type=SignedHead))
                continue
        except msgspec.MsgspecError:
            kind = None
        if kind != "event" and not any(later.startswith(line) for later in lines[number + 1 :]):
            raise InputError(f"line {number + 1} of the heads is neither a head nor an event: {line[:80]!r}")
    return found


class Extension:
    """The tree of the newest head on its way to all that is sealed now.

    Args:
        records: Where events and heads are.

    Raises:
        CorruptError: What the newest head was over has been altered.
    """

    def __init__(self, records: SqlRecords) -> None:
        self._records = records
        self.last = newest_head(records)
        self.size, self.chain = records.head()
        begun = self.last or AuditHead(id="", size=0, root="", chain="0" * 64, signature="")
        try:
            self._tree = CompactRange(begun.size, map(bytes.fromhex, begun.nodes))
            is_good = begun.size == 0 or self._tree.root().hex() == begun.root
        except ValueError:
            is_good = False
        if not is_good or audit_sql.chain_at(records, begun.size) != begun.chain or self.size < begun.size:
            raise CorruptError(
                f"nothing is signed: the events up to {begun.size} are not those of the last signed head",
                hint="`millrace system audit verify` shows what was altered",
            )
        self._check = ChainCheck(begun.size, begun.chain)

    @property
    def is_needed(self) -> bool:
        """Whether there are new events."""
        return self.size > (self.last.size if self.last else 0)

    def advance(self, batches: int | None = None) -> bool:
        """Take so many batches of events in, all by default; True once all are in.

        Raises:
            CorruptError: The chain does not hold.
        """
        found = audit_sql.rows(self._records, self._tree.size, self.size, has_details=False)
        for number, rows in enumerate(found, start=1):
            self._tree.extend(self._check.feed(rows, has_details=False))
            if self._check.breaks:
                raise CorruptError(
                    f"nothing is signed: {self._check.breaks[0].explanation}", hint="`millrace system audit verify`"
                )
            if number == batches and self._tree.size < self.size:
                return False
        if (self._check.seq, self._check.chain) != (self.size, self.chain):
            raise CorruptError(
                f"nothing is signed: the events end at {self._check.seq}, but {self.size} were sealed",
                hint="`millrace system audit verify`",
            )
        return True

    def store(self, services: Services, lease: Lease | None) -> AuditHead | None:
        """Sign and keep the head; None when another one was faster.

        Raises:
            ConflictError: Another process leads.
        """
        before = as_signed(self.last) if self.last else None
        unsigned = SignedHead(
            size=self.size, root=self._tree.root().hex(), chain=self.chain, at=services.clock.now(),
            previous=head_digest(before) if before else "", signature="",
        )  # fmt: skip
        signature = services.signer.sign(statement_digest(unsigned)).decode()
        with self._records.transaction() as transaction:
            if lease is not None:
                check_fence(transaction, lease)
            newest = next(iter(queries.find(transaction.connection, AuditHead, None, "-size", 1)), None)
            if (newest and newest.id) != (self.last and self.last.id):
                return None
            head = AuditHead(
                id=f"{self.size:020d}", created_at=unsigned.at, size=self.size, root=unsigned.root, chain=self.chain,
                signature=signature, previous=unsigned.previous, nodes=tuple(node.hex() for node in self._tree.nodes),
            )  # fmt: skip
            return transaction.put(head, expect_version=0)


def sign_now(services: Services) -> AuditHead | None:
    """A head over all that is sealed; the newest there is, or None where no event is.

    Raises:
        CorruptError: What would be signed has been altered.
    """
    records = ledger(services)
    extension = Extension(records)
    if extension.is_needed:
        extension.advance()
        extension.store(services, None)
    return newest_head(records)


class HeadSigner:
    """A part of the loop: signs a head every interval when there are new events, and has heads published.

    Not thread-safe; publishing, which may wait for others, happens in a thread of its own.

    Args:
        services: The home; its settings `audit_head_interval_s` and `audit_publish` say how often and where to.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._interval_s = float(services.setting("audit_head_interval_s"))
        self._due_at = services.clock.monotonic()
        self._extension: Extension | None = None
        self._publishing: threading.Thread | None = None

    def __call__(self, lease: Lease) -> None:
        """One round of the leader."""
        if self._extension is None:
            now = self._services.clock.monotonic()
            if self._interval_s <= 0 or now < self._due_at:
                return
            self._due_at = now + self._interval_s
            try:
                extension = Extension(ledger(self._services))
            except CorruptError:
                self._publish()  # what was signed before is good
                raise
            if not extension.is_needed:
                self._publish()
                return
        else:
            extension, self._extension = self._extension, None  # a failure begins anew at the next interval
        if not extension.advance(BATCHES_AT_ONCE):
            self._extension = extension
            return
        if extension.store(self._services, lease) is not None:
            self._publish()

    def close(self) -> None:
        """Wait for what is being published, for as long as one answer of a webhook may take."""
        if self._publishing is not None:
            self._publishing.join(WEBHOOK_TIMEOUT_S)
            self._publishing = None

    def _publish(self) -> None:
        if not self._services.setting("audit_publish") or (self._publishing and self._publishing.is_alive()):
            return
        self._publishing = threading.Thread(target=self._publish_apart, name="audit heads", daemon=True)
        self._publishing.start()

    def _publish_apart(self) -> None:
        try:
            publish_pending(self._services, ledger(self._services), as_line)
        except MillraceError as error:
            log.warning("signed heads could not be published, it will be tried again: %s", error.message)


def as_line(head: AuditHead) -> bytes:
    """A head as it is published: one line of JSON, without its end."""
    return msgspec.json.encode(as_signed(head))


def merged(*lists: Iterable[SignedHead]) -> list[SignedHead]:
    """Heads of several places, once each, the smallest first."""
    found = {head_digest(head): head for heads in lists for head in heads}
    return sorted(found.values(), key=lambda head: (head.size, head.at))
