"""Which keys count: those in the records, each home's own among them where records are shared, within their times."""

from __future__ import annotations

from datetime import UTC, datetime

from millrace.core.clock import Clock
from millrace.core.ports import Records
from millrace.core.types import TrustedKey


def publish_key(records: Records, clock: Clock, home: str, key_id: str, pem: bytes) -> None:
    """Let every home on these records trust a key; does nothing when they do.

    Who may write the records is trusted by all who work on them; who may write the blobs alone is not.

    Args:
        records: The shared records.
        clock: The time.
        home: Whose key, for people.
        key_id: Its id.
        pem: The public key.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from millrace.core.clock import FakeClock
        >>> from millrace.store.records_sql import open_records
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = open_records(Path(folder) / "records.db")
        ...     publish_key(records, FakeClock(), "/a", "ed25519:1", b"PEM")
        ...     found = published_key(records, "ed25519:1"), published_key(records, "ed25519:2")
        ...     records.close()
        >>> found
        (b'PEM', None)
    """
    if records.get(TrustedKey, key_id) is None:
        with records.transaction() as transaction:  # where it may be known by now, or revoked
            if transaction.get(TrustedKey, key_id) is None:
                key = TrustedKey(id=key_id, created_at=clock.now(), pem=pem.decode(), home=home)
                transaction.put(key, expect_version=0)


def published_key(records: Records, key_id: str) -> bytes | None:
    """A published key as PEM."""
    found = records.get(TrustedKey, key_id)
    return found.pem.encode() if found is not None and found.pem else None


def refusal_of(records: Records, now_s: float, key_id: str) -> str | None:
    """Why a key does not count now, as the end of a sentence; None where nothing speaks against it.

    A key of which the records say nothing is not refused here: whether it is trusted is another question.

    Args:
        records: Where times and revocations are.
        now_s: Seconds since 1970.
        key_id: Which key.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from millrace.store.records_sql import open_records
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = open_records(Path(folder) / "records.db")
        ...     _ = records.put(TrustedKey(id="ed25519:1", pem="PEM", not_after=86400.0))
        ...     found = [refusal_of(records, now_s, "ed25519:1") for now_s in (0.0, 86400.0)]
        ...     records.close()
        >>> found
        [None, 'was valid until 1970-01-02']
    """
    key = records.get(TrustedKey, key_id)
    if key is None:
        return None
    if key.revoked_at is not None:
        return f"was revoked on {time_of(key.revoked_at)}"
    if key.not_before is not None and now_s < key.not_before:
        return f"is not valid before {time_of(key.not_before)}"
    if key.not_after is not None and now_s >= key.not_after:
        return f"was valid until {time_of(key.not_after)}"
    return None


def time_of(at_s: float) -> str:
    """A moment in UTC for people, to the minute; midnight is a day.

    Example:
        >>> time_of(0.0), time_of(90.0)
        ('1970-01-01', '1970-01-01T00:01')
    """
    text = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="minutes")
    return text.removesuffix("+00:00").removesuffix("T00:00")
