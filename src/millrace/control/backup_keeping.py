"""Which backups are kept, and the removal of the others with what only they need."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from millrace.control.backup_making import home_of, quiet, whole_records
from millrace.control.services import Services
from millrace.core.errors import ConflictError
from millrace.core.types import Struct
from millrace.store import backup_rows
from millrace.store.backup_flow import in_order
from millrace.store.backup_vault import Manifest, Vault

AT_ONCE = 4


class Pruned(Struct, frozen=True, kw_only=True):
    """What was removed."""

    kept: list[str]
    removed: list[str]
    objects: int
    size_bytes: int


def made_at(id: str) -> float:
    """When a backup was made, by its id, in seconds since 1970.

    Example:
        >>> made_at("00000000f42400" + "0" * 18)
        16.0
    """
    return int(id[:14], 16) / 1e6


def kept(ids: Iterable[str], daily: int, weekly: int) -> set[str]:
    """The newest backup, the newest of each of the last days that have one, and the same for weeks (UTC).

    Example:
        >>> day = 86_400_000_000
        >>> ids = [f"{number * day:014x}{'0' * 18}" for number in range(20_000, 20_010)]  # Friday to Sunday
        >>> [ids.index(one) for one in sorted(kept(ids, daily=2, weekly=2))]
        [2, 8, 9]
    """
    newest_first = sorted(ids, reverse=True)
    found = set(newest_first[:1])
    for count, form in ((daily, "%Y-%m-%d"), (weekly, "%G-%V")):
        newest: dict[str, str] = {}
        for id in newest_first:
            period = datetime.datetime.fromtimestamp(made_at(id), datetime.UTC).strftime(form)
            newest.setdefault(period, id)
        found.update(list(newest.values())[: max(count, 0)])
    return found


def prune_backups(services: Services, vault: Vault, daily: int, weekly: int) -> Pruned:
    """Remove backups beyond `kept`, then objects that no kept one needs.

    No backup is made meanwhile. If any kept manifest cannot be read, nothing is removed: what it needs is not known.

    Raises:
        ConflictError: The destination is another home's.
        CorruptError: A kept manifest, or its list of blobs, cannot be read.
    """
    records = whole_records(services)
    with quiet(services):
        described = vault.describe()
        if described is not None and described.home and described.home != home_of(records):
            raise ConflictError(f"{vault.place.url} holds the backups of another home", hint="prune it from there")
        ids = vault.manifests()
        stay = kept(ids, daily, weekly)
        needed: set[str] = set()
        for id in sorted(stay):
            needed |= _needs(vault, vault.manifest(id)[0])
        gone = [id for id in ids if id not in stay]
        for id in gone:  # first: a backup whose objects are being removed must not count
            vault.place.remove(f"manifests/{id}")
        unneeded = [one for kind in ("chunks", "blobs") for one in vault.place.list(kind) if one.name not in needed]
        for _ in in_order(AT_ONCE, unneeded, lambda one: vault.place.remove(one.name)):
            pass
    size = sum(one.size_bytes for one in unneeded)
    return Pruned(kept=sorted(stay), removed=gone, objects=len(unneeded), size_bytes=size)


def _needs(vault: Vault, manifest: Manifest) -> set[str]:
    """The names of all objects of a backup."""
    names = {vault.name("chunks", ref.digest) for table in manifest.tables for ref in table.chunks}
    names |= {vault.name("chunks", ref.digest) for ref in manifest.blobs}
    names |= {vault.name("blobs", file.digest) for file in manifest.files}
    for ref in manifest.blobs:
        rows = backup_rows.rows_of(vault.read("chunks", ref), "blobs")
        names |= {vault.name("blobs", digest) for digest, _ in rows}
    return names
