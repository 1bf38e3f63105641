"""What is in a backup's destination: pieces and blobs by digest, and manifests; plain or encrypted.

format.json          which format, which home, which key
chunks/ab/cd…        pieces of the records, and of the lists of blobs, compressed
blobs/ab/cd…         blobs and files as they are
manifests/ID         one backup each, written last: what has none does not count
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, Literal, Protocol

import msgspec

from millrace.core.errors import ConflictError, CorruptError, InputError, NotFoundError, SchemaVersionError
from millrace.core.types import Struct
from millrace.store.backup_place import Place
from millrace.store.blobs_local import CHUNK_BYTES

FORMAT = 1
FORMAT_NAME = "format.json"
LARGEST_MANIFEST_BYTES = 1 << 30
Kind = Literal["chunks", "blobs"]
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")


class ObjectKey(Protocol):
    """What encrypts objects and hides their names; see `control.backup_seal`."""

    @property
    def check(self) -> str:
        """Says that another key is not this one, and nothing else."""
        ...

    def hidden(self, digest: str) -> str:
        """64 hexadecimal digits in place of a digest."""
        ...

    def sealed_size(self, size: int) -> int:
        """How many bytes so many become."""
        ...

    def seal(self, name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Encrypt the bytes of an object."""
        ...

    def plain_size(self, sealed: int) -> int:
        """How many bytes are in so many."""
        ...

    def open(self, name: str, source: BinaryIO, size: int) -> io.RawIOBase:
        """The plain bytes: whatever comes out was put in under this name."""
        ...


class FormatDocument(Struct, frozen=True, kw_only=True):
    """What `format.json` says."""

    format: int
    home: str = ""  # the digest of the home's first event: no two homes write to one destination
    key: str = ""  # see `ObjectKey.check`; "" is not encrypted


class Ref(Struct, frozen=True, array_like=True):
    """An object by the digest of its plain bytes."""

    digest: str
    size_bytes: int
    rows: int = 0


class TablePart(Struct, frozen=True, kw_only=True):
    """A table's pieces, in order."""

    name: str
    columns: tuple[str, ...]
    rows: int
    chunks: list[Ref]


class FilePart(Struct, frozen=True, kw_only=True):
    """A file of the home, by its path there."""

    path: str
    digest: str
    size_bytes: int


class Manifest(Struct, frozen=True, kw_only=True):
    """One backup."""

    format: int = FORMAT
    id: str
    created_at: float
    millrace: str
    schema: str
    home: str
    head_seq: int
    head_chain: str
    tables: list[TablePart]
    blobs: list[Ref]  # pieces of the list of blobs: rows of digest and size
    blob_count: int
    blob_bytes: int
    files: list[FilePart] = []
    missing: list[str] = []  # named by the records, and not there when this was made
    signer: str = ""  # the public key as PEM

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(table.rows for table in self.tables)


class _Signed(Struct, frozen=True, kw_only=True):
    manifest: bytes
    signature: bytes


class Vault:
    """A destination, opened with its key. Thread-safe.

    Args:
        place: Where.
        key: None: not encrypted.
    """

    def __init__(self, place: Place, key: ObjectKey | None) -> None:
        self.place, self.key = place, key
        self.read_bytes = self.written_bytes = 0
        self._lock = threading.Lock()

    def describe(self) -> FormatDocument | None:
        """What the destination says of itself; None: there are no backups yet.

        Raises:
            SchemaVersionError: A newer Millrace has written it.
            InputError: It is encrypted and no key was given, or the reverse, or with another key.
            CorruptError: It cannot be read.
        """
        try:
            with self.place.open(FORMAT_NAME) as file:
                found = msgspec.json.decode(file.read(CHUNK_BYTES), type=FormatDocument)
        except NotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise CorruptError(f"{self.place.url}/{FORMAT_NAME} cannot be read: {error}") from error
        if found.format > FORMAT:
            raise _newer(f"{self.place.url} has backups", found.format)
        if bool(found.key) != (self.key is not None):
            said, want = ("is encrypted", "name") if found.key else ("is not encrypted", "leave out")
            raise InputError(f"{self.place.url} {said}", hint=f"{want} --encrypt-key; or use another destination")
        if self.key is not None and self.key.check != found.key:
            raise InputError(
                f"{self.place.url} was encrypted with another key",
                hint="name the key that the first backup was made with",
            )
        return found

    def prepare(self, home: str) -> None:
        """Make it a destination of this home.

        Raises:
            ConflictError: It belongs to another home, or is a folder of something else.
        """
        found = self.describe()
        if found is None and self.place.is_foreign:
            raise ConflictError(
                f"{self.place.url} has other files, and no backups", hint="name an empty or a new folder for backups"
            )
        if found is not None and found.home and home and found.home != home:
            raise ConflictError(
                f"{self.place.url} holds the backups of another home", hint="one destination for each home"
            )
        if found is None or (home and not found.home):
            made = FormatDocument(format=FORMAT, home=home, key=self.key.check if self.key else "")
            self.place.put(FORMAT_NAME, [msgspec.json.format(msgspec.json.encode(made))])

    # ------------------------------------------------------------------ objects

    def name(self, kind: Kind, digest: str) -> str:
        """Where the object with this digest is.

        Raises:
            CorruptError: It is no digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise CorruptError(f"the backup names {digest[:80]!r}, which is not a digest")
        text = digest[7:] if self.key is None else self.key.hidden(digest)
        return f"{kind}/{text[:2]}/{text[2:]}"

    def size_of(self, size: int) -> int:
        """How many bytes a blob has there."""
        return size if self.key is None else self.key.sealed_size(size)

    def put(self, kind: Kind, digest: str, parts: Iterable[bytes]) -> None:
        """Write an object; the digest is believed."""
        packed = _packed(parts) if kind == "chunks" else parts
        self._put(self.name(kind, digest), packed)

    def open_blob(self, ref: Ref) -> BinaryIO:
        """The plain bytes of a blob, whose digest nobody has looked at.

        Raises:
            NotFoundError: There is none.
            CorruptError: It does not open.
        """
        name = self.name("blobs", ref.digest)
        source = self.place.open(name)
        if self.key is None:
            return source
        with ExitStack() as stack:
            stack.enter_context(source)
            opened: Any = self.key.open(name, source, ref.size_bytes)
            stack.pop_all()
        return opened

    def stream(self, kind: Kind, ref: Ref) -> Iterator[bytes]:
        """The plain bytes of an object.

        Raises:
            NotFoundError: There is none.
            CorruptError: Its size or, at the end, its digest is another one.
        """
        name, digest, size = self.name(kind, ref.digest), hashlib.sha256(), 0
        for part in self._blob_parts(ref) if kind == "blobs" else self._unpacked(name, ref.size_bytes):
            size += len(part)
            if size > ref.size_bytes:
                break
            digest.update(part)
            yield part
        if size != ref.size_bytes or f"sha256:{digest.hexdigest()}" != ref.digest:
            raise CorruptError(
                f"{name} of the backup is damaged: it is not {ref.digest} of {ref.size_bytes} bytes",
                details={"digest": ref.digest, "object": name},
            )

    def read(self, kind: Kind, ref: Ref) -> bytes:
        """All plain bytes of an object, verified."""
        return b"".join(self.stream(kind, ref))

    # ------------------------------------------------------------------ manifests

    def manifests(self) -> list[str]:
        """The ids of all backups, oldest first."""
        found = (one.name.rpartition("/")[2] for one in self.place.list("manifests"))
        return sorted(id for id in found if _ID.fullmatch(id))

    def put_manifest(self, manifest: Manifest, sign: Any) -> None:
        """Write a backup's manifest: from now on it exists.

        Args:
            manifest: What it is.
            sign: Gives the signature over a digest.
        """
        data = msgspec.msgpack.encode(manifest)
        signature = sign(f"sha256:{hashlib.sha256(data).hexdigest()}")
        signed = msgspec.msgpack.encode(_Signed(manifest=data, signature=signature))
        self._put(f"manifests/{manifest.id}", _packed([signed]))

    def manifest(self, id: str) -> tuple[Manifest, str, bytes]:
        """A backup's manifest, its digest, and the signature over that.

        Raises:
            NotFoundError: There is none with this id.
            CorruptError: It cannot be read.
            SchemaVersionError: A newer Millrace has written it.
        """
        if not _ID.fullmatch(id):
            raise InputError(f"the id of a backup has 32 hexadecimal digits, got {id[:80]!r}")
        data = b"".join(self._unpacked(f"manifests/{id}", LARGEST_MANIFEST_BYTES))
        try:
            signed = msgspec.msgpack.decode(data, type=_Signed)
            version = msgspec.msgpack.decode(signed.manifest, type=_Version)
            if version.format > FORMAT:
                raise _newer(f"the backup {id}", version.format)
            manifest = msgspec.msgpack.decode(signed.manifest, type=Manifest)
        except msgspec.MsgspecError as error:
            raise CorruptError(f"the manifest of the backup {id} cannot be read: {error}") from error
        if manifest.id != id:
            raise CorruptError(f"the manifest of the backup {id} is that of {manifest.id[:80]!r}")
        return manifest, f"sha256:{hashlib.sha256(signed.manifest).hexdigest()}", signed.signature

    def close(self) -> None:
        """Let go of the place."""
        self.place.close()

    def _put(self, name: str, parts: Iterable[bytes]) -> None:
        size = self.place.put(name, parts if self.key is None else self.key.seal(name, parts))
        with self._lock:
            self.written_bytes += size

    def _blob_parts(self, ref: Ref) -> Iterator[bytes]:
        with self.open_blob(ref) as file:
            yield from self._parts(file)

    def _unpacked(self, name: str, limit: int) -> Iterator[bytes]:
        """A compressed object; it is read as a whole, for nothing else says how many bytes it has."""
        most = limit + limit // 100 + CHUNK_BYTES  # what grows when it is packed grows by less
        with self.place.open(name) as file:
            data = b"".join(self._parts(file, most))
        if self.key is not None:
            data = self.key.open(name, io.BytesIO(data), self.key.plain_size(len(data))).read() or b""
        return _unpacked([data], limit)

    def _parts(self, file: BinaryIO, most: int | None = None) -> Iterator[bytes]:
        while (most is None or most > 0) and (part := file.read(CHUNK_BYTES)):
            most = None if most is None else most - len(part)
            with self._lock:
                self.read_bytes += len(part)
            yield part


class _Version(Struct, frozen=True, kw_only=True):
    format: int


def _newer(what: str, found: int) -> SchemaVersionError:
    return SchemaVersionError(
        f"{what} of format {found}, which this Millrace does not know (its newest is {FORMAT})",
        hint="install the Millrace version that made them, or a newer one",
    )


def _packed(parts: Iterable[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(3)
    for part in parts:
        yield packer.compress(part)
    yield packer.flush()


def _unpacked(parts: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Never more than one piece beyond the limit, whatever the compressed bytes claim."""
    unpacker, size = zlib.decompressobj(), 0
    try:
        for part in parts:
            piece = unpacker.decompress(part, limit - size + 1)
            size += len(piece)
            yield piece
            if size > limit or unpacker.eof:
                break
        if size > limit or not unpacker.eof or unpacker.unused_data:
            raise CorruptError("a compressed object of the backup is damaged: it does not end where it should")
    except zlib.error as error:
        raise CorruptError(f"a compressed object of the backup is damaged: {error}") from error
