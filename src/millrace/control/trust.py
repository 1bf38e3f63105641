"""Which keys the homes on shared records trust: each home's own, published by itself."""

from __future__ import annotations

from collections.abc import Callable

from millrace.core.clock import Clock
from millrace.core.ports import Records
from millrace.core.types import TrustedKey


class RecordedKeys:
    """Public keys kept in the records: who may write these trusts, and is trusted by, all who work on them.

    Args:
        records: Opens the records.
        clock: The time.
        home: Said beside a key, for people.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from millrace.core.clock import FakeClock
        >>> from millrace.store.records_sql import open_records
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = open_records(Path(folder) / "records.db")
        ...     keys = RecordedKeys(lambda: records, FakeClock(), "/a")
        ...     keys.publish("ed25519:1", b"PEM")
        ...     found = keys.find("ed25519:1"), keys.find("ed25519:2")
        ...     records.close()
        >>> found
        (b'PEM', None)
    """

    def __init__(self, records: Callable[[], Records], clock: Clock, home: str) -> None:
        self._records, self._clock, self._home = records, clock, home

    def publish(self, key_id: str, pem: bytes) -> None:
        """Let the other homes trust a key; does nothing when they do."""
        if self._records().get(TrustedKey, key_id) is None:
            self._records().put(TrustedKey(id=key_id, created_at=self._clock.now(), pem=pem.decode(), home=self._home))

    def find(self, key_id: str) -> bytes | None:
        """A published key as PEM."""
        found = self._records().get(TrustedKey, key_id)
        return None if found is None else found.pem.encode()
