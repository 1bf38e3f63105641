"""Which keys the homes on shared records trust: each home's own, published there when it first opens them."""

from __future__ import annotations

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
        records.put(TrustedKey(id=key_id, created_at=clock.now(), pem=pem.decode(), home=home))


def published_key(records: Records, key_id: str) -> bytes | None:
    """A published key as PEM."""
    found = records.get(TrustedKey, key_id)
    return None if found is None else found.pem.encode()
