"""Trees: folders as a listing of (path, digest, size); what a listing may say, and how it becomes files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from millrace.core.errors import ConflictError, CorruptError, InputError
from millrace.core.ids import canonical_json, new_id
from millrace.core.types import Artifact, TreeEntry

_DECODER = msgspec.json.Decoder(list[TreeEntry])
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES})


def encode(entries: Sequence[TreeEntry]) -> bytes:
    """The listing's bytes: canonical JSON, sorted by path. Its digest is the tree's digest.

    Example:
        >>> encode([TreeEntry(path="a", digest="sha256:0", size_bytes=1)])
        b'[{"path":"a","digest":"sha256:0","size_bytes":1}]'
    """
    return canonical_json(sorted(entries, key=lambda entry: entry.path))


def decode(data: bytes, digest: str) -> list[TreeEntry]:
    """The entries of a listing, each checked to stay inside its folder.

    Raises:
        CorruptError: It is not a listing, is not in order, or has a path that leads elsewhere.

    Example:
        >>> decode(b'[{"digest":"sha256:0","path":"../a","size_bytes":1}]', "sha256:1")
        Traceback (most recent call last):
        ...
        millrace.core.errors.CorruptError: the tree sha256:1 has a path that is not allowed: '../a'
    """
    try:
        entries = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"the blob {digest} is not the listing of a tree: {error}") from error
    paths = [entry.path for entry in entries]
    for path in paths:
        if not is_portable(path):
            raise CorruptError(f"the tree {digest} has a path that is not allowed: {path!r}")
    files = set(paths)
    if paths != sorted(files) or any(str(parent) in files for path in paths for parent in PurePosixPath(path).parents):
        raise CorruptError(f"the tree {digest} is not sorted by path, or names a path twice")
    return entries


def is_portable(path: str) -> bool:
    r"""Whether a path is relative, normal and means the same everywhere.

    Example:
        >>> [is_portable(path) for path in ("a/b.txt", "/a", "a/../b", "a//b", "a\\b", "")]
        [True, False, False, False, False, False]
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    if "\\" in path or any(ord(char) < 32 or char == "\x7f" for char in path):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every regular file below a folder as (portable relative path, file).

    Raises:
        InputError: The folder does not exist, or holds a link, a device or a name that is not portable.
    """
    if not folder.is_dir():
        raise InputError(f"want a folder to store as a tree, got {folder}")
    yield from _walk(folder, "")


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        name = prefix + entry.name
        if not is_portable(name):
            raise InputError(
                f"the file name {entry.path!r} is not portable (no backslash, control character, not UTF-8)"
            )
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), name + "/")
        elif entry.is_file(follow_symlinks=False):
            yield name, Path(entry.path)
        else:
            raise InputError(f"{entry.path} is a symbolic link or a device: a tree holds regular files only")


def put_files(folder: Path, put: Callable[[Path], Artifact]) -> list[TreeEntry]:
    """Store every regular file below a folder; the entries of its listing.

    Raises:
        InputError: The folder does not exist, or holds a link, a device or a name that is not portable.
    """
    entries = []
    for name, file in files_below(folder):
        stored = put(file)
        entries.append(TreeEntry(path=name, digest=stored.digest, size_bytes=stored.size_bytes))
    return entries


def materialize(
    entries: Sequence[TreeEntry],
    folder: Path,
    blob: Callable[[str], Path],
    at_hand: Callable[[str], Path | None] | None = None,
) -> Path:
    """Write files into a new folder: built beside it, then renamed, so that it is never seen half.

    Args:
        entries: A checked listing.
        folder: Where; may exist only if it holds exactly this tree, or is empty.
        blob: Gives the verified file of a digest.
        at_hand: The same where asking costs nothing, else None: a folder that holds the tree needs no download.

    Raises:
        ConflictError: The folder exists and holds something else.
    """
    at_hand = at_hand or blob
    if folder.is_dir() and _holds(folder, entries, at_hand):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = folder.with_name(f".{folder.name}.{new_id()}")
    try:
        temp.mkdir()
        for entry in entries:
            target = temp / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(blob(entry.digest), target)
        try:
            os.rename(temp, folder)  # replaces an empty folder, never one with content
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not (folder.is_dir() and _holds(folder, entries, at_hand)):  # else: another process was quicker
                raise ConflictError(
                    f"{folder} exists and holds something else than the tree",
                    hint="remove it, or choose another folder",
                ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def _place(source: Path, target: Path) -> None:
    """A hard link where the filesystem has them, else a read-only copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
        target.chmod(0o444)


def _holds(folder: Path, entries: Sequence[TreeEntry], at_hand: Callable[[str], Path | None]) -> bool:
    """Whether a folder holds exactly these files: the blob's own inode, or equal bytes."""
    wanted = {entry.path: entry for entry in entries}
    found: set[str] = set()
    try:
        for name, file in files_below(folder):
            entry = wanted.get(name)
            if entry is None or not _is_intact(file, entry, at_hand):
                return False
            found.add(name)
    except InputError:  # a link or a device: not ours
        return False
    return found == set(wanted) and (bool(found) or not any(folder.iterdir()))


def _is_intact(file: Path, entry: TreeEntry, at_hand: Callable[[str], Path | None]) -> bool:
    state = file.lstat()
    if not stat.S_ISREG(state.st_mode) or state.st_size != entry.size_bytes:
        return False
    blob = at_hand(entry.digest)
    if blob is not None and os.path.samestat(state, blob.stat()):
        return True
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest() == entry.digest
