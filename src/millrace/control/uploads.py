"""Bytes from elsewhere: blobs and trees over the wire, and references to them where a path is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from millrace.control.dispatch import handles
from millrace.control.readable import check_path, check_readable, note_sent
from millrace.control.services import Services
from millrace.core.errors import InputError, NotFoundError
from millrace.core.ids import canonical_json
from millrace.core.operations import blobs as ops
from millrace.core.ports import Blobs
from millrace.core.project_files import project_files
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, TreeEntry
from millrace.store.blob_abilities import MAX_PRESIGNED_BYTES, SupportsPresign

CHUNK_BYTES = 1 << 20
BLOB, TREE = "blob:", "tree:"
PRESIGNED_S = 3600.0
MAX_NAME_BYTES = 255  # of one file, as file systems have it


@handles(ops.PUT_BLOB)
def put_blob(services: Services, body: ops.BlobPut) -> Artifact:
    """Store a file."""
    path = Path(body.path)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    stored = services.blobs.put(path)
    note_sent(services, stored)
    return stored


@handles(ops.GET_BLOB)
def get_blob(services: Services, body: ops.BlobGet) -> Iterator[bytes]:
    """The bytes in parts; the last one comes after the digest was verified."""
    check_readable(services, body.digest)
    return _parts(services.blobs.open(body.digest))


def _parts(reader) -> Iterator[bytes]:  # type: ignore[no-untyped-def]
    with reader:
        while part := reader.read(CHUNK_BYTES):
            yield part


@handles(ops.PRESIGN_BLOB)
def presign_blob(services: Services, body: ops.PresignRequest) -> ops.PresignedUpload | None:
    """Where a client may send the bytes by itself, if the store has such places."""
    blobs = services.blobs
    if not (isinstance(blobs, SupportsPresign) and blobs.can_presign) or body.size_bytes > MAX_PRESIGNED_BYTES:
        return None
    if services.where is not None:  # confirming names a digest, sending proves to have the bytes
        return None
    place = blobs.presign_put(body.digest, body.size_bytes, PRESIGNED_S)
    return ops.PresignedUpload(method=place.method, url=place.url, headers=place.headers, expires_at=place.expires_at)


@handles(ops.CONFIRM_BLOB)
def confirm_blob(services: Services, body: ops.PresignRequest) -> Artifact:
    """Read it back; the right bytes become a blob, others vanish."""
    blobs = services.blobs
    if not isinstance(blobs, SupportsPresign):
        raise InputError("these blobs are not kept in an object store: nothing can have been sent to one")
    check_readable(services, body.digest)
    return blobs.confirm(body.digest, body.size_bytes)


@handles(ops.PUT_TREE)
def put_tree(services: Services, body: ops.TreePut) -> Artifact:
    """Store a listing of blobs that are all here."""
    entries = sorted(body.entries, key=lambda entry: entry.path)
    for entry in entries:
        check_readable(services, entry.digest)
        if not services.blobs.exists(entry.digest):
            raise NotFoundError(f"the tree's {entry.path!r} is not stored: {entry.digest}", hint="upload it first")
    listing = services.blobs.put(canonical_json(entries), TREE_MEDIA_TYPE)
    services.blobs.tree(listing.digest)  # refuses paths that lead elsewhere
    note_sent(services, listing)
    return listing


@handles(ops.GET_TREE)
def get_tree(services: Services, body: ops.BlobGet) -> list[TreeEntry]:
    """A listing."""
    check_readable(services, body.digest)
    return services.blobs.tree(body.digest)


def store_project(blobs: Blobs, folder: Path) -> Artifact:
    """What a run may need of a spec's folder, as a tree."""
    entries = []
    for path in project_files(folder):
        stored = blobs.put(path)
        place = path.relative_to(folder).as_posix()
        entries.append(TreeEntry(path=place, digest=stored.digest, size_bytes=stored.size_bytes))
    return blobs.put(canonical_json(sorted(entries, key=lambda entry: entry.path)), TREE_MEDIA_TYPE)


def local_path(services: Services, text: str) -> Path:
    """A path as it was given, or the local copy of an upload.

    Args:
        services: The home.
        text: A path; `blob:sha256:…/NAME` for an uploaded file; `tree:sha256:…/PATH` for a place in an
            uploaded folder (`.` for the folder), which is copied as a whole into the home's `projects`.

    Raises:
        InputError: The reference is not one.
        NotFoundError: There is no such upload.

    Example:
        >>> local_path(None, "/data/rows.csv")
        PosixPath('/data/rows.csv')
    """
    kind = next((kind for kind in (BLOB, TREE) if text.startswith(kind + "sha256:")), None)
    if kind is None:
        check_path(text)
        return Path(text).absolute()
    digest, _, inside = text[len(kind) :].partition("/")
    check_readable(services, digest)
    parts = PurePosixPath(inside).parts
    is_place = not any(part in ("..", "/") or "\0" in part or len(part.encode()) > MAX_NAME_BYTES for part in parts)
    if (kind == BLOB and not parts) or not is_place:
        raise InputError(f"an upload's reference must end in a relative path, got {text[:300]!r}")
    name = digest.replace(":", "-")
    if kind == TREE:
        return _copy_project(services, digest, services.home / "projects" / name) / inside
    target = services.home / "scratch" / "uploads" / name / parts[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(services.blobs.path(digest), target)
    return target


def _copy_project(services: Services, digest: str, folder: Path) -> Path:
    """A writable copy of an uploaded folder; made once."""
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for entry in services.blobs.tree(digest):
            path = new / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(services.blobs.path(entry.digest), path)
        new.rename(folder)
    return folder
