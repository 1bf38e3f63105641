"""Where backups are kept: objects by name in a folder, or in an object store. Written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from millrace.core import extras
from millrace.core.errors import CorruptError, InputError, NotFoundError
from millrace.core.ids import new_id
from millrace.store.blobs_local import disk_errors

STALE_TEMP_S = 86_400.0  # a temporary file that nobody has written to for so long belongs to a dead process
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}(/[a-z0-9][a-z0-9.-]{0,127}){0,3}")
_TEMP = ".writing-"
OWN = frozenset({"format.json", "chunks", "blobs", "manifests", "lost+found"})  # of a destination, or an empty disk
_LINKS = frozenset({errno.ELOOP, errno.EMLINK, errno.ENOTDIR})  # what O_NOFOLLOW makes of a link


class Stored(NamedTuple):
    """An object that is there."""

    name: str
    size_bytes: int


class Place(Protocol):
    """Objects by name. Thread-safe; an object is seen when it is whole, and durable when `put` returns."""

    @property
    def url(self) -> str:
        """How people call it."""
        ...

    @property
    def is_foreign(self) -> bool:
        """Whether something else than backups is kept there."""
        ...

    def put(self, name: str, parts: Iterable[bytes]) -> int:
        """Write, or replace, an object; when `parts` raises, nothing changes. Returns its bytes."""
        ...

    def open(self, name: str) -> BinaryIO:
        """The bytes of an object, to be read forward; a file where it is one.

        Raises:
            NotFoundError: There is none.
        """
        ...

    def list(self, prefix: str) -> Iterator[Stored]:
        """Every object whose name begins with `prefix/`, in any order."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...

    def close(self) -> None:
        """Let go of threads and connections."""
        ...


def open_place(text: str) -> Place:
    """A folder, or the URL of an object store, reached as the blobs are (`AWS_*`, `GOOGLE_*`, `AZURE_*`).

    Raises:
        InputError: It is neither an absolute path nor such a URL.

    Example:
        >>> open_place("/srv/backups").url
        '/srv/backups'
        >>> open_place("backups")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: want an absolute folder or a URL (s3://bucket/prefix) for ...
    """
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if text.startswith("/") and "\0" not in text:
        return FolderPlace(Path(text))
    if "://" not in text:
        raise InputError(f"want an absolute folder or a URL (s3://bucket/prefix) for backups, got {text[:200]!r}")
    extras.require([("obstore", "s3")], "keeping backups in an object store")
    return extras.load("millrace.store.backup_objects:ObjectPlace")(text)


def checked_name(name: str) -> str:
    """A name that means nothing to any filesystem but itself.

    Raises:
        InputError: It is another one.

    Example:
        >>> checked_name("blobs/ab/cd")
        'blobs/ab/cd'
        >>> checked_name("blobs/../keys")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: 'blobs/../keys' is not the name of an object of a backup
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name[:200]!r} is not the name of an object of a backup")
    return name


def regular(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of one size, the last one smaller.

    Example:
        >>> list(regular([b"ab", b"cdefg"], 3))
        [b'abc', b'def', b'g']
    """
    held = bytearray()
    for part in parts:
        if len(part) == size and not held:
            yield part
            continue
        held += part
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


class FolderPlace:
    """Implements `Place` below a folder. Whoever can write there cannot lead us elsewhere: no link is followed.

    Args:
        root: The folder; made by the first write. It may itself be reached through links.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = FolderPlace(Path(folder) / "backups")
        ...     place.put("blobs/ab/cd", [b"some ", b"bytes"])
        ...     with place.open("blobs/ab/cd") as file:
        ...         file.read()
        ...     [*place.list("blobs")]
        10
        b'some bytes'
        [Stored(name='blobs/ab/cd', size_bytes=10)]
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    @property
    def is_foreign(self) -> bool:
        """Whether the folder has files that are not ours: it was named by mistake."""
        if not self.root.is_dir():
            return False
        return any(one.name not in OWN and not one.name.startswith(_TEMP) for one in self.root.iterdir())

    def put(self, name: str, parts: Iterable[bytes]) -> int:
        """Temporary file, fsync, rename, fsync of the folder."""
        *folders, last = checked_name(name).split("/")
        temp, size = _TEMP + new_id(), 0
        with _errors(self.root, name):
            self.root.mkdir(parents=True, exist_ok=True)
            folder = self._folder(folders, make=True)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with os.fdopen(os.open(temp, flags, 0o600, dir_fd=folder), "wb", buffering=0) as file:
                    for part in parts:
                        size += len(part)
                        rest = memoryview(part)
                        while rest:
                            rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                os.rename(temp, last, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=folder)
                os.close(folder)
        return size

    def open(self, name: str) -> BinaryIO:
        """The file of an object."""
        *folders, last = checked_name(name).split("/")
        with _errors(self.root, name):
            folder = self._folder(folders)
            try:
                descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            finally:
                os.close(folder)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise CorruptError(f"{self.root}/{name} is not a file", hint="backups hold files only: remove it")
            return io.FileIO(descriptor, "rb")

    def list(self, prefix: str) -> Iterator[Stored]:
        """Every object below a prefix."""
        folder = self.root / checked_name(prefix)
        if folder.is_symlink():
            raise _link(str(folder))
        if folder.is_dir():
            with _errors(self.root, prefix):
                yield from _walk(folder, prefix)

    def remove(self, name: str) -> None:
        """Remove an object."""
        *folders, last = checked_name(name).split("/")
        with suppress(NotFoundError), _errors(self.root, name):
            folder = self._folder(folders)
            try:
                os.unlink(last, dir_fd=folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Nothing to let go of."""

    def _folder(self, parts: list[str], make: bool = False) -> int:
        """A descriptor of a folder below the root, reached through no link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        found = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        for part in parts:
            try:
                below = self._step(part, found, flags, make)
            finally:
                os.close(found)
            found = below
        return found

    @staticmethod
    def _step(part: str, above: int, flags: int, make: bool) -> int:
        try:
            return os.open(part, flags, dir_fd=above)
        except FileNotFoundError:
            if not make:
                raise
        with suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=above)
            os.fsync(above)
        return os.open(part, flags, dir_fd=above)


def _walk(folder: Path, prefix: str) -> Iterator[Stored]:
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        name = f"{prefix}/{entry.name}"
        if entry.is_symlink():
            raise _link(entry.path)
        if entry.name.startswith(_TEMP):
            with suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > STALE_TEMP_S:
                    os.unlink(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), name)
        elif _NAME.fullmatch(name):
            with suppress(FileNotFoundError):  # removed meanwhile
                yield Stored(name, entry.stat(follow_symlinks=False).st_size)


def _link(path: str) -> CorruptError:
    return CorruptError(
        f"{path} is a symbolic link: backups hold files only", hint="remove it, then verify the backups"
    )


@contextmanager
def _errors(root: Path, name: str) -> Iterator[None]:
    """The disk's errors as ours."""
    with disk_errors(root):
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"{root} has no {name}", hint="`millrace system verify` says what is whole") from error
        except OSError as error:
            if error.errno in _LINKS:
                raise CorruptError(
                    f"{root}/{name} is reached through a symbolic link, or through a file: backups hold neither",
                    hint="somebody else has written there: remove it, then verify the backups",
                ) from error
            raise
