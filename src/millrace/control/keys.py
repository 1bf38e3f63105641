"""Keys of keys: which blobs are encrypted, rotation, and erasing the data of somebody by throwing keys away."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec

from millrace.control.dispatch import handles
from millrace.control.heads import ledger
from millrace.control.privacy import SUBJECT_ERASERS
from millrace.control.services import Services
from millrace.core.errors import ConflictError, CorruptError, DeniedError, InputError, NotFoundError
from millrace.core.operations import Page
from millrace.core.operations import keys as ops
from millrace.core.operations.live import NameRequest
from millrace.core.ports import Blobs, Records
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, DataKey, Secret
from millrace.security.keyring import Keyring
from millrace.store.blobs_encrypted import EncryptedBlobs

BATCH = 500  # records of one transaction
_RINGS: dict[tuple[Path, str], Keyring] = {}
_LOCK = threading.Lock()


def open_keyring(home: Path, source: str, records: Records) -> Keyring:
    """The keyring of a home, one in a process: a command is asked once.

    Args:
        home: Its folder.
        source: The setting `encryption_key`.
        records: Tell whether something is encrypted already: then no new file of keys is made.
    """
    with _LOCK:
        ring = _RINGS.get((home, source))
        if ring is None:
            is_fresh = not records.find(DataKey, limit=1) and not records.find(Secret, limit=1)
            ring = _RINGS[home, source] = Keyring(home, source, may_make=is_fresh)
        return ring


def keyring_of(services: Services) -> Keyring:
    """The keyring of the home."""
    return open_keyring(services.home, services.setting("encryption_key"), services.all_records)


def protect(inner: Blobs, records: Records, home: Path, source: str) -> Blobs:
    """Blobs as the home wants them: encrypted where the setting names a key, else as they are.

    Args:
        inner: Where the bytes lie.
        records: Where the data keys are; all of them, not those of some projects.
        home: The home's folder.
        source: The setting `encryption_key`.

    Raises:
        InputError: The home's blobs are encrypted, and the key is not named, or another one is.
    """
    newest = records.find(DataKey, order="-created_at", limit=1)
    known = newest[0] if newest and newest[0].wrapped else None
    if not source:
        if newest:
            raise InputError(
                "the blobs of this home are encrypted, and the setting encryption_key names no key",
                hint="set encryption_key (MILLRACE_ENCRYPTION_KEY) to file:PATH, env:NAME or command:PROGRAM ARGS",
            )
        return inner
    ring = open_keyring(home, source, records)
    current = ring.current  # reads the keys: what is wrong with them is said now, not at the first blob
    if known is not None and not ring.has(known.kek):
        raise InputError(
            f"the blobs of this home are encrypted under {known.kek}, and encryption_key gives {current}",
            hint="name the key that this home was encrypted with",
        )
    return EncryptedBlobs(inner, records, ring, home / "cache" / "plain")


# --------------------------------------------------------------------------- verbs


@handles(ops.LIST_KEYS)
def list_keys(services: Services, body: Page) -> list[ops.KeyView]:
    """The newest last; none where nothing is encrypted."""
    if not services.is_used or not _is_encrypting(services):
        return []
    return _views(services)[body.offset :][: body.limit]


@handles(ops.ROTATE_KEYS)
def rotate_keys(services: Services, body: ops.RotateRequest) -> ops.Rotated:
    """Blobs stay as they are: only their keys are wrapped again.

    Raises:
        InputError: The keys come from where Millrace cannot write; put a new one there, and keep it.
    """
    _refuse_scoped(services)
    ring = keyring_of(services)
    before = ring.current
    is_new = not body.keep_key and ring.file is not None
    current = ring.add(services.clock.now()) if is_new else before
    old = [entry.id for entry in ring.entries if entry.id != current]
    return ops.Rotated(
        current=current, is_new=is_new, blobs=_rewrap_blobs(services.records, ring, old),
        secrets=_rewrap_secrets(services.records, ring, current),
    )  # fmt: skip


@handles(ops.DROP_KEY)
def drop_key(services: Services, body: NameRequest) -> ops.KeyView:
    """In one transaction with the look at what needs it: nothing can be wrapped by it meanwhile.

    Raises:
        ConflictError: Something needs it.
    """
    _refuse_scoped(services)
    ring = keyring_of(services)
    view = next((one for one in _views(services) if one.id == body.name), None)
    if view is None:
        raise NotFoundError(f"there is no key {body.name[:40]!r}", hint="`millrace keys` lists them")
    with services.records.transaction() as transaction:
        blobs = len(transaction.find(DataKey, {"kek": body.name}))
        secrets = sum(kek_of(one) == body.name for one in transaction.find(Secret))
        if blobs or secrets:
            raise ConflictError(
                f"{body.name} still opens {blobs} blobs and {secrets} secrets",
                hint="`millrace keys rotate` wraps them with another one",
            )
        ring.drop(body.name)
    return view


@handles(ops.ERASE_DATA)
def erase_data(services: Services, body: ops.EraseRequest) -> ops.Erased:
    """Everything that is kept as somebody's data.

    Raises:
        InputError: Nobody is named.
    """
    _refuse_scoped(services)
    if not body.subject:
        raise InputError("want --subject: whose data is to be erased")
    with ledger(services).erasing():
        return erase_subject_data(services, body.subject)


def erase_subject_data(services: Services, subject: str) -> ops.Erased:
    """Keys, ciphertext, plain copies and working folders of somebody's data."""
    blobs = services.blobs
    if not isinstance(blobs, EncryptedBlobs):
        return ops.Erased(blobs=0, size_bytes=0, folders=0)
    keys = services.records.find(DataKey, {"data_subject": subject})
    digests = {key.id for key in (*keys, *services.records.find(DataKey, {"kek": ""}))}  # or erased on another host
    folders = list(_folders_with(services, blobs, digests))  # found by listings, which may be erased as well
    count, size = blobs.erase(digests)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=False)
    return ops.Erased(blobs=count, size_bytes=size, folders=len(folders))


def _erase_for_privacy(services: Services, name: str) -> dict[str, int]:
    count = erase_subject_data(services, name).blobs
    return {"blobs": count} if count else {}


SUBJECT_ERASERS.append(_erase_for_privacy)


def mark_subject(services: Services, artifact: Artifact, subject: str) -> None:
    """Say whose data an artifact is, its files included, so that it can be erased.

    Raises:
        InputError: This home does not encrypt: it has nothing to throw away.
        ConflictError: A part of it is kept as data of somebody else.
    """
    blobs = services.blobs
    if not isinstance(blobs, EncryptedBlobs):
        raise InputError(
            "a data subject can be named where blobs are encrypted: erasing is throwing their keys away",
            hint="set encryption_key, for example file:/etc/millrace/kek.json",
        )
    files = [entry.digest for entry in blobs.tree(artifact.digest)] if artifact.media_type == TREE_MEDIA_TYPE else []
    blobs.mark([artifact.digest, *files], subject)


# --------------------------------------------------------------------------- parts


def _refuse_scoped(services: Services) -> None:
    """Keys are of the whole home.

    Raises:
        DeniedError: Who asks may work in some projects only.
    """
    if services.where is not None:
        raise DeniedError("keys are of all projects, and you may work in some", hint="ask an owner of the home")


def _is_encrypting(services: Services) -> bool:
    ring_file = services.home / "keys" / "kek.json"
    return bool(services.setting("encryption_key")) or ring_file.is_file()


def _views(services: Services) -> list[ops.KeyView]:
    ring, records = keyring_of(services), services.records
    current, source = ring.current, services.setting("encryption_key").partition(":")[0] or "home"
    sealed = [kek_of(secret) for secret in records.find(Secret)]
    return [
        ops.KeyView(
            id=one.id, is_current=one.id == current, created_at=one.created_at, source=source,
            blobs=len(records.find(DataKey, {"kek": one.id})), secrets=sealed.count(one.id),
        )
        for one in ring.entries
    ]  # fmt: skip


def _rewrap_blobs(records: Records, ring: Keyring, old: list[str]) -> int:
    count = 0
    while old:
        found = records.find(DataKey, {"kek": old}, limit=BATCH)
        with records.transaction() as transaction:
            # None is asked again in here, when whoever took the old key before there was a new one has written.
            found = found or transaction.find(DataKey, {"kek": old})
            if not found:
                break
            for key in found:
                present = transaction.get(DataKey, key.id)
                if present is None or present.kek not in old:
                    continue  # erased, or wrapped by somebody else meanwhile
                secret = ring.unwrap(present.kek, present.wrapped, present.id)
                kek, wrapped = ring.wrap(secret, present.id)
                transaction.put(msgspec.structs.replace(present, kek=kek, wrapped=wrapped), present.version)
                count += 1
    return count


def _rewrap_secrets(records: Records, ring: Keyring, current: str) -> int:
    count = 0
    with records.transaction() as transaction:
        for secret in transaction.find(Secret):
            if kek_of(secret) == current:
                continue
            context = secret_context(secret)
            sealed = ring.seal(ring.unseal(secret.sealed, context), context)
            transaction.put(msgspec.structs.replace(secret, sealed=sealed), secret.version)
            count += 1
    return count


def secret_context(secret: Secret) -> str:
    """What a secret's value is bound to: it opens for no other name, and not for a later number."""
    return f"secret {secret.id} {secret.number}"


def kek_of(secret: Secret) -> str:
    """Which key of keys a secret is sealed by."""
    return secret.sealed.partition(":")[0]


def _folders_with(services: Services, blobs: EncryptedBlobs, digests: Iterable[str]) -> Iterable[Path]:
    """Plain working copies that hold one of these blobs: trees of steps and of served models."""
    wanted = set(digests)
    trees = services.home / "scratch" / "trees"
    for folder in sorted(trees.glob("sha256-*")) if trees.is_dir() else ():
        digest = folder.name.replace("-", ":", 1)
        try:
            entries = blobs.tree(digest)
        except (NotFoundError, CorruptError):  # its listing is gone: what it was made of cannot be told
            entries = []
        if digest in wanted or any(entry.digest in wanted for entry in entries):
            yield folder
