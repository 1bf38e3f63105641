"""Envelopes: bytes under a key of their own, encrypted in chunks; and keys wrapped by other keys.

An envelope is a header and chunks (of 256 KiB), each AES-256-GCM with its tag. A chunk's nonce is its index and
whether it is the last one; its associated data are the header, the index and, of the last chunk, the total of plain
bytes. So a chunk that was altered, moved, dropped, added, or taken from another envelope does not open, and neither
does what was cut off between two chunks. A key encrypts one envelope: its nonces are never used twice.

The scheme is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015, https://eprint.iacr.org/2015/189), which needs to know
no size before it begins.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from millrace.core.errors import CorruptError

MAGIC, VERSION = b"MRE", 1
CHUNK_POWER = 18  # 256 KiB: as quick as larger ones, and little to decrypt for a look at a few bytes
CHUNK_BYTES = 1 << CHUNK_POWER
POWERS = range(6, 23)  # what a header may say
KEY_BYTES, TAG_BYTES, NONCE_BYTES = 32, 16, 12
HEADER_BYTES = len(MAGIC) + 2
_UNKNOWN = b"\xff" * 8  # in place of the total, in every chunk but the last


def new_key() -> bytes:
    """256 random bits.

    Example:
        >>> len(new_key())
        32
    """
    return os.urandom(KEY_BYTES)


def sealed_size(size: int, chunk_power: int = CHUNK_POWER) -> int:
    """How many bytes so many plain ones become.

    Example:
        >>> sealed_size(0), sealed_size(CHUNK_BYTES) - CHUNK_BYTES
        (21, 21)
    """
    return HEADER_BYTES + size + _chunks(size, 1 << chunk_power) * TAG_BYTES


class EncryptingReader(io.RawIOBase):
    """The envelope of a stream, made while it is read: two chunks of memory, whatever the size.

    Once it has been read to the end, `digest` and `size` are those of the plain bytes.

    Args:
        source: The plain bytes; read to its end, and not closed.
        key: 32 bytes that encrypt nothing else.
        chunk_power: Chunks have 2 to the power of it bytes.

    Example:
        >>> key = new_key()
        >>> sealed = EncryptingReader(io.BytesIO(b"hello"), key)
        >>> data = sealed.read()
        >>> sealed.size, DecryptingReader(io.BytesIO(data), key, 5).read()
        (5, b'hello')
    """

    def __init__(self, source: BinaryIO, key: bytes, chunk_power: int = CHUNK_POWER) -> None:
        super().__init__()
        self._source, self._cipher, self._chunk_bytes = source, AESGCM(key), 1 << chunk_power
        self._header = MAGIC + bytes([VERSION, chunk_power])
        self._left = memoryview(self._header)
        self._ahead: bytes | None = None
        self._index, self._size, self._hash = 0, 0, hashlib.sha256()
        self._is_over = False

    @property
    def size(self) -> int:
        """Plain bytes so far."""
        return self._size

    @property
    def digest(self) -> str:
        """`sha256:…` of the plain bytes so far."""
        return "sha256:" + self._hash.hexdigest()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one chunk goes; 0 at the end."""
        target = memoryview(buffer).cast("B")
        if not self._left and not self._is_over:
            self._left = memoryview(self._next())
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, less only at the end: what stores a stream cuts it by what one call returns."""
        parts, wanted = [], -1 if size is None else size
        while wanted:
            if not self._left:
                if self._is_over:
                    break
                self._left = memoryview(self._next())
            part = self._left if wanted < 0 else self._left[:wanted]
            self._left = self._left[len(part) :]
            wanted -= len(part) if wanted > 0 else 0
            parts.append(part)
        return b"".join(parts)

    def _next(self) -> bytes:
        """The next chunk, encrypted. Whether it is the last one is known by looking for another."""
        chunk = self._chunk() if self._ahead is None else self._ahead
        self._ahead = self._chunk() if len(chunk) == self._chunk_bytes else b""
        self._is_over = not self._ahead
        self._hash.update(chunk)
        self._size += len(chunk)
        total = self._size if self._is_over else None
        nonce, known = _nonce(self._index, self._is_over), _associated(self._header, self._index, total)
        self._index += 1
        return self._cipher.encrypt(nonce, chunk, known)

    def _chunk(self) -> bytes:
        """A whole chunk, unless the source ends."""
        chunk = self._source.read(self._chunk_bytes)
        if not chunk or len(chunk) == self._chunk_bytes:
            return chunk
        parts = bytearray(chunk)
        while len(parts) < self._chunk_bytes and (more := self._source.read(self._chunk_bytes - len(parts))):
            parts += more
        return bytes(parts)


class DecryptingReader(io.RawIOBase):
    """The plain bytes of an envelope; seekable where its source is. Nothing comes out that was not put in.

    Args:
        source: The envelope, at its beginning; closed with this.
        key: That it was encrypted with.
        size: Of the plain bytes.
        name: What it is, for errors.

    Raises:
        CorruptError: It is no envelope, or, while reading, a chunk does not open or something follows the last one.

    Example:
        >>> key = new_key()
        >>> data = EncryptingReader(io.BytesIO(bytes(1000)), key).read()
        >>> reader = DecryptingReader(io.BytesIO(data), key, 1000)
        >>> reader.seek(990), reader.read(), reader.read()
        (990, b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00', b'')
    """

    def __init__(self, source: BinaryIO, key: bytes, size: int, name: str = "the envelope") -> None:
        super().__init__()
        self._source, self._cipher, self._total, self._name = source, AESGCM(key), size, name
        self._header = self._exactly(HEADER_BYTES)
        if not self._header.startswith(MAGIC) or self._header[4] not in POWERS:
            raise self._damaged("it does not begin as encrypted bytes do")
        if self._header[3] != VERSION:
            raise self._damaged("it is encrypted in a way that this Millrace does not know")
        self._chunk_bytes = 1 << self._header[4]
        self._count = _chunks(size, self._chunk_bytes)
        self._position = 0
        self._index = 0  # of the chunk that comes next in the source
        self._held, self._held_index = memoryview(b""), -1
        if size == 0:
            self._decrypt(0)  # or nobody would look at an empty one

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Whether the source is."""
        return self._source.seekable()

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere; nothing is read."""
        if not self.seekable():
            raise io.UnsupportedOperation("this envelope can only be read forward")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._total}[whence]
        if start + offset < 0:
            raise ValueError(f"want a position of at least 0, got {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; less only at the end."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and self._position < self._total:
            index, inside = divmod(self._position, self._chunk_bytes)
            size = self._size_of(index)
            if inside == 0 and len(target) - done >= size and index != self._held_index:
                self._decrypt(index, target[done : done + size])
                count = size
            else:
                if index != self._held_index:
                    self._decrypt(index)
                part = self._held[inside : inside + len(target) - done]
                count = len(part)
                target[done : done + count] = part
            done += count
            self._position += count
        return done

    def readall(self) -> bytes:
        """All that is left."""
        whole = bytearray(max(0, self._total - self._position))
        count = self.readinto(whole)
        return bytes(whole) if count == len(whole) else bytes(whole[:count])

    def close(self) -> None:
        """Close the source with it."""
        if not self.closed:
            self._source.close()
        super().close()

    def _size_of(self, index: int) -> int:
        return min(self._chunk_bytes, self._total - index * self._chunk_bytes)

    def _decrypt(self, index: int, target: memoryview | None = None) -> None:
        """Open a chunk into `target`, or keep it."""
        if index != self._index:
            self._source.seek(HEADER_BYTES + index * (self._chunk_bytes + TAG_BYTES))
        is_last = index == self._count - 1
        sealed = self._exactly(self._size_of(index) + TAG_BYTES)
        known = _associated(self._header, index, self._total if is_last else None)
        self._index = -1  # unless it opens, the source is nowhere
        plain = None
        try:
            if target is None:
                plain = self._cipher.decrypt(_nonce(index, is_last), sealed, known)
            else:
                self._cipher.decrypt_into(_nonce(index, is_last), sealed, known, target)
        except InvalidTag:
            raise self._damaged("it was altered, or the key is another one") from None
        if is_last and self._read(1):
            raise self._damaged("something follows its end")
        if plain is not None:
            self._held, self._held_index = memoryview(plain), index
        self._index = -1 if is_last else index + 1

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        if len(data) < size:
            raise self._damaged("it is cut off")
        return data

    def _read(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except CorruptError as error:  # a store that looks at its own digests
            raise self._damaged("its ciphertext is not what was stored") from error

    def _damaged(self, why: str) -> CorruptError:
        return CorruptError(f"{self._name} does not open: {why}")


def wrap(kek: bytes, key: bytes, context: str) -> bytes:
    """A key, or another short secret, encrypted with a key of keys.

    Args:
        kek: 32 bytes.
        key: What to wrap.
        context: What it belongs to: it opens for nothing else.

    Example:
        >>> kek = new_key()
        >>> unwrap(kek, wrap(kek, b"secret", "a"), "a")
        b'secret'
    """
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(kek).encrypt(nonce, key, context.encode())


def unwrap(kek: bytes, wrapped: bytes, context: str) -> bytes:
    """The key again.

    Raises:
        CorruptError: It was altered, belongs to something else, or another key wrapped it.

    Example:
        >>> unwrap(new_key(), wrap(new_key(), b"secret", "a"), "a")
        Traceback (most recent call last):
        ...
        millrace.core.errors.CorruptError: the key of a does not open: it was altered, or another key wrapped it
    """
    if len(wrapped) < NONCE_BYTES + TAG_BYTES:
        raise CorruptError(f"the key of {context} is cut off")
    try:
        return AESGCM(kek).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], context.encode())
    except InvalidTag:
        raise CorruptError(f"the key of {context} does not open: it was altered, or another key wrapped it") from None


def _chunks(size: int, chunk_bytes: int) -> int:
    return max(1, -(-size // chunk_bytes))


def _nonce(index: int, is_last: bool) -> bytes:
    return index.to_bytes(NONCE_BYTES - 1, "big") + bytes([is_last])


def _associated(header: bytes, index: int, total: int | None) -> bytes:
    return header + index.to_bytes(8, "big") + (_UNKNOWN if total is None else total.to_bytes(8, "big"))
