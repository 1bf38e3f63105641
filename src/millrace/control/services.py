"""What handlers may use. Built by `wiring`; every expensive part is made on first use."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from millrace.core.clock import Clock
from millrace.core.ports import Blobs, Compute, Records, Signer, StageDescriptor
from millrace.core.principals import EVERYWHERE
from millrace.core.settings import Value
from millrace.store.scoped import ScopedRecords

T = TypeVar("T")


class Services:
    """One home, opened.

    Args:
        home: The folder.
        clock: Where the time comes from.
        stages: Stage descriptors by name, in the order of a default pipeline.
        settings: Resolved settings.
        open_records: Makes the records store.
        open_blobs: Makes the blob store.
        open_compute: Makes the compute, given modules worth importing early.
        open_signer: Makes the signer.
        open_records_at: Opens the records of another URL; "" means the home's file.
        open_blobs_at: The same for blobs.
        drives_apart: Runs are driven by processes of their own, never by the one that was asked: a server.
    """

    def __init__(
        self,
        *,
        home: Path,
        clock: Clock,
        stages: Mapping[str, StageDescriptor],
        settings: Mapping[str, Value],
        open_records: Callable[[], Records],
        open_blobs: Callable[[], Blobs],
        open_compute: Callable[[Sequence[str]], Compute],
        open_signer: Callable[[], Signer],
        open_records_at: Callable[[str], Records],
        open_blobs_at: Callable[[str], Blobs],
        drives_apart: bool = False,
    ) -> None:
        self.open_records_at, self.open_blobs_at = open_records_at, open_blobs_at
        self.home = home
        self.drives_apart = drives_apart
        self.clock = clock
        self.stages = stages
        self.settings = settings
        self._open: dict[str, Callable[[], Any]] = {
            "records": open_records,
            "blobs": open_blobs,
            "signer": open_signer,
        }
        self._open_compute = open_compute
        self._made: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._where: frozenset[str] | None = None

    def scoped(self, where: frozenset[str]) -> Services:
        """The same home for somebody who may work in these projects only (see `Principal.where`)."""
        if where == frozenset({EVERYWHERE}):
            return self
        narrowed = copy.copy(self)
        narrowed._where = where
        return narrowed

    @property
    def where(self) -> frozenset[str] | None:
        """The projects that may be seen; None: all."""
        return self._where

    @property
    def own_project(self) -> str:
        """Where something new goes that names no project: `default`, or the one project of who may see no other."""
        seen = sorted(self._where or ()) or ["default"]
        return seen[0] if len(seen) == 1 and seen[0] != EVERYWHERE else "default"

    def _get(self, name: str) -> Any:
        with self._lock:
            if name not in self._made:
                self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._made[name] = self._open[name]()
            return self._made[name]

    @property
    def records(self) -> Records:
        """The records store."""
        records = self._get("records")
        return records if self._where is None else ScopedRecords(records, self._where)

    @property
    def all_records(self) -> Records:
        """Those of every project: to decide what is of the whole home, such as its keys; never to show them."""
        return self._get("records")

    @property
    def blobs(self) -> Blobs:
        """The blob store."""
        return self._get("blobs")

    @property
    def signer(self) -> Signer:
        """Signs and verifies with the home's key."""
        return self._get("signer")

    def compute(self, preload: Sequence[str] = ()) -> Compute:
        """The compute; `preload` is used by the first call only."""
        with self._lock:
            if "compute" not in self._made:
                self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._made["compute"] = self._open_compute(preload)
            return self._made["compute"]

    def setting(self, name: str) -> Any:
        """A setting's value."""
        return self.settings[name].value

    @property
    def is_used(self) -> bool:
        """Whether there is a home on disk."""
        return bool(self.setting("records_url")) or (self.home / "records.db").is_file()

    def close(self) -> None:
        """Stop workers, seal events, flush records."""
        with self._lock:
            made = dict(self._made)
            self._made.clear()
        if "compute" in made:
            made["compute"].close()
        if "records" in made:
            try:
                made["records"].seal()
            finally:
                made["records"].close()
