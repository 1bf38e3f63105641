"""Encryption of backups: AES-256-GCM in segments, a key of its own for every object, names that say nothing.

An object is `MRB1`, a random salt of 32 bytes, and segments of 1 MiB, each with its tag. Its key is
HKDF-SHA-256(secret, salt, name). A segment's nonce is its number and whether it is the last one; with the
name they are its associated data too: segments that are swapped, dropped, added or put under another name
do not open.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from millrace.core.errors import CorruptError, InputError
from millrace.store.backup_place import regular

SEGMENT_BYTES = 1 << 20
TAG_BYTES, SALT_BYTES, KEY_BYTES = 16, 32, 32
MAGIC = b"MRB1"
_HEX = re.compile(rb"[0-9a-fA-F]{64}")
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
    elif kind == "file":
        try:
            raw = Path(where).read_bytes()
            if Path(where).stat().st_mode & 0o007:
                log.warning("the key of the backups %s can be read by everybody: chmod 600", where)
        except OSError as error:
            raise InputError(f"the key {text} cannot be read: {error.strerror}", hint=_HINT) from error
    else:
        raise InputError("want the key of the backups as file:PATH or env:NAME", hint=_HINT)
    return BackupKey(_decoded(raw, text))


def _decoded(raw: bytes, where: str) -> bytes:
    if len(raw) == KEY_BYTES:
        return raw
    text = raw.strip()
    if _HEX.fullmatch(text):
        return bytes.fromhex(text.decode())
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(f"the key {where} must be 32 bytes, as 64 hexadecimal digits or as base64", hint=_HINT)
    return key


class BackupKey:
    """What encrypts the objects of a backup and hides their names.

    Args:
        secret: 32 bytes.

    Example:
        >>> key = BackupKey(bytes(32))
        >>> sealed = b"".join(key.seal("blobs/ab/cd", [b"hello"]))
        >>> len(sealed) == key.sealed_size(5), b"".join(key.open("blobs/ab/cd", [sealed]))
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
        segments = max(1, -(-size // SEGMENT_BYTES))
        return len(MAGIC) + SALT_BYTES + size + segments * TAG_BYTES

    def seal(self, name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Encrypt the bytes of an object."""
        salt = os.urandom(SALT_BYTES)
        cipher = AESGCM(self._derive(salt, name.encode()))
        yield MAGIC + salt
        for number, segment, is_last in _with_last(regular(parts, SEGMENT_BYTES)):
            nonce = _nonce(number, is_last)
            yield cipher.encrypt(nonce, segment, nonce + name.encode())

    def open(self, name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Decrypt the bytes of an object: whatever comes out was put in under this name.

        Raises:
            CorruptError: It was altered or cut, or another key sealed it.
        """
        header, rest = _take(iter(parts), len(MAGIC) + SALT_BYTES)
        if len(header) < len(MAGIC) + SALT_BYTES or not header.startswith(MAGIC):
            raise CorruptError(f"{name} of the backup is cut off, or is not encrypted", details={"object": name})
        cipher = AESGCM(self._derive(header[len(MAGIC) :], name.encode()))
        for number, segment, is_last in _with_last(regular(rest, SEGMENT_BYTES + TAG_BYTES)):
            nonce = _nonce(number, is_last)
            try:
                yield cipher.decrypt(nonce, segment, nonce + name.encode())
            except InvalidTag:
                raise CorruptError(
                    f"{name} of the backup does not open: it was altered or cut off, or sealed with another key",
                    details={"object": name},
                ) from None

    def _derive(self, salt: bytes, info: bytes) -> bytes:
        return HKDF(SHA256(), KEY_BYTES, salt, b"millrace backup v1\n" + info).derive(self._secret)


def _nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])


def _with_last(segments: Iterator[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Segments with their number and whether they are the last; there is always one."""
    number, held = 0, next(segments, b"")
    for segment in segments:
        yield number, held, False
        number, held = number + 1, segment
    yield number, held, True


def _take(parts: Iterator[bytes], count: int) -> tuple[bytes, Iterator[bytes]]:
    """The first bytes, and the others."""
    held = b""
    for part in parts:
        held += part
        if len(held) >= count:
            break

    def others() -> Iterator[bytes]:
        yield held[count:]
        yield from parts

    return held[:count], others()
