"""Encryption of backups: every object is an envelope under a key of its own; names say nothing.

An object is `MRB2`, a random salt of 32 bytes, and an envelope (see `security.envelope`: AES-256-GCM in chunks).
Its key is HKDF-SHA-256(secret, salt, name): what was altered, cut, or put under another name does not open.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from millrace.core.errors import CorruptError, InputError, SchemaVersionError
from millrace.security.envelope import (
    CHUNK_BYTES,
    HEADER_BYTES,
    KEY_BYTES,
    TAG_BYTES,
    DecryptingReader,
    EncryptingReader,
    sealed_size,
)
from millrace.security.keyring import one_key
from millrace.store.backup_place import regular

SALT_BYTES = 32
MAGIC, VERSION = b"MRB", b"2"
PREFIX_BYTES = len(MAGIC) + len(VERSION) + SALT_BYTES
_HINT = "make one with `openssl rand -hex 32`, and keep a copy where the backups are not"
log = logging.getLogger(__name__)


def read_key(text: str) -> BackupKey:
    """The key that `file:PATH` or `env:NAME` names: 32 bytes, raw, as 64 hexadecimal digits or as base64.

    Raises:
        InputError: There is none there, or it is no such key. What was found is not shown.

    Example:
        >>> os.environ["BACKUP_KEY"] = "00" * 32
        >>> read_key("env:BACKUP_KEY").check == BackupKey(bytes(32)).check
        True
    """
    kind, _, where = text.partition(":")
    if kind == "env":
        raw = os.environ.get(where, "").encode()
        if not raw:
            raise InputError(f"the variable {where} with the key of the backups is not set", hint=_HINT)
    elif kind == "file":
        try:
            raw = Path(where).read_bytes()
            if Path(where).stat().st_mode & 0o007:
                log.warning("the key of the backups %s can be read by everybody: chmod 600", where)
        except OSError as error:
            raise InputError(f"the key {text} cannot be read: {error.strerror}", hint=_HINT) from error
    else:
        raise InputError("want the key of the backups as file:PATH or env:NAME", hint=_HINT)
    key = one_key(raw)
    if key is None:
        raise InputError(f"the key {text} must be 32 bytes, as 64 hexadecimal digits or as base64", hint=_HINT)
    return BackupKey(key)


class BackupKey:
    """What encrypts the objects of a backup and hides their names.

    Args:
        secret: 32 bytes.

    Example:
        >>> key = BackupKey(bytes(32))
        >>> sealed = b"".join(key.seal("blobs/ab/cd", [b"hello"]))
        >>> len(sealed) == key.sealed_size(5), key.open("blobs/ab/cd", io.BytesIO(sealed), 5).read()
        (True, b'hello')
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._names = self._derive(b"", b"names")
        self.check = self.hidden("check")  # says that another key is not this one, and nothing else

    def __repr__(self) -> str:
        """Without the secret."""
        return "BackupKey(…)"

    def hidden(self, digest: str) -> str:
        """64 hexadecimal digits in place of a digest, for whoever does not have the key."""
        return hmac.digest(self._names, digest.encode(), hashlib.sha256).hex()

    def sealed_size(self, size: int) -> int:
        """How many bytes so many become."""
        return PREFIX_BYTES + sealed_size(size)

    def plain_size(self, sealed: int) -> int:
        """How many bytes are in so many; whether that is so is seen when they are opened.

        Example:
            >>> key = BackupKey(bytes(32))
            >>> [key.plain_size(key.sealed_size(size)) for size in (0, 1, 262_144, 262_145)]
            [0, 1, 262144, 262145]
        """
        chunks = sealed - PREFIX_BYTES - HEADER_BYTES
        return max(0, chunks - TAG_BYTES * max(1, -(-chunks // (CHUNK_BYTES + TAG_BYTES))))

    def seal(self, name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Encrypt the bytes of an object."""
        salt = os.urandom(SALT_BYTES)
        source: Any = _Parts(regular(parts, CHUNK_BYTES))
        yield MAGIC + VERSION + salt
        sealed = EncryptingReader(source, self._derive(salt, name.encode()))
        while part := sealed.read(CHUNK_BYTES + TAG_BYTES):
            yield part

    def open(self, name: str, source: BinaryIO, size: int) -> io.RawIOBase:
        """The plain bytes of an object, to be read forward: whatever comes out was put in under this name.

        Args:
            name: Of the object.
            source: At its beginning; closed with what is returned.
            size: Of the plain bytes.

        Raises:
            CorruptError: It was altered or cut, or another key sealed it. Also while reading.
            SchemaVersionError: Another version of Millrace has sealed it.
        """
        prefix = source.read(PREFIX_BYTES)
        if len(prefix) < PREFIX_BYTES or not prefix.startswith(MAGIC):
            raise CorruptError(f"{name} of the backup is cut off, or is not encrypted", details={"object": name})
        if prefix[len(MAGIC) :][:1] != VERSION:
            raise SchemaVersionError(
                f"{name} of the backup is encrypted in a way that this Millrace does not know",
                hint="read it with the Millrace version that made it; begin with a new destination here",
            )
        key = self._derive(prefix[-SALT_BYTES:], name.encode())
        return DecryptingReader(source, key, size, f"{name} of the backup")

    def _derive(self, salt: bytes, info: bytes) -> bytes:
        return HKDF(SHA256(), KEY_BYTES, salt, b"millrace backup v1\n" + info).derive(self._secret)


class _Parts:
    """Pieces of one size as a stream that is asked for such pieces."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts

    def read(self, _: int) -> bytes:
        return next(self._parts, b"")
