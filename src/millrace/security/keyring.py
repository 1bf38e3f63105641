"""Keys of keys: they wrap the keys of blobs and the values of secrets, and encrypt nothing else.

Where they are: `keys/kek.json` of the home, made on first use; or what the setting `encryption_key` names: `file:PATH`
(made when absent, if nothing is encrypted yet), `env:NAME`, or `command:PROGRAM ARGS`, whose output is read. Each gives
a key ring (JSON, as `kek.json`), or one key: 32 bytes, raw, as 64 hexadecimal digits or as base64.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import logging
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from millrace.core.errors import ConflictError, CorruptError, InputError, NotFoundError, UnavailableError
from millrace.core.ids import new_id
from millrace.core.types import Struct
from millrace.security import envelope

FILE_NAME = "kek.json"
COMMAND_TIMEOUT_S = 15.0
_HEX = re.compile(rb"[0-9a-fA-F]{64}")
log = logging.getLogger(__name__)
_HINT = "set encryption_key to file:PATH, env:NAME or command:PROGRAM ARGS: the key that this home was encrypted with"


class KeyEntry(Struct, frozen=True, kw_only=True):
    """One key of keys; its id is made of it."""

    id: str
    key: str  # base64
    created_at: float = 0.0

    def __repr__(self) -> str:
        """Without the key."""
        return f"KeyEntry({self.id!r})"


class KeyRing(Struct, frozen=True, kw_only=True):
    """What `kek.json` holds. `current` wraps what is new; the others only open what is old."""

    current: str
    keys: tuple[KeyEntry, ...]


def key_id(key: bytes) -> str:
    """What a key is called: says that another key is not this one, and nothing else.

    Example:
        >>> key_id(bytes(32))
        'kek-71ffd5a19398'
    """
    return "kek-" + hashlib.sha256(b"millrace key of keys v1\n" + key).hexdigest()[:12]


class Keyring:
    """The keys of a home. Thread-safe; several processes may use one file, and see what others change.

    Args:
        home: Its folder.
        source: The setting `encryption_key`; "" is the home's own file.
        may_make: Asked before a file of keys is made: False when something is encrypted already.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ring = Keyring(Path(folder))
        ...     sealed = ring.seal(b"value", "secret default/TOKEN")
        ...     ring.unseal(sealed, "secret default/TOKEN"), sealed.startswith(ring.current)
        (b'value', True)
    """

    def __init__(self, home: Path, source: str = "", may_make: bool = True) -> None:
        self._own = Path(home) / "keys" / FILE_NAME
        self._kind, _, self._where = source.partition(":")
        if source and (self._kind not in ("file", "env", "command") or not self._where):
            raise InputError(  # what was given may be the key itself
                "encryption_key is none of file:PATH, env:NAME and command:PROGRAM ARGS",
                hint="it names where the key is, and never holds it",
            )
        with suppress(OSError):  # it is made on first use
            if self._kind == "file" and Path(self._where).stat().st_mode & 0o007:
                log.warning("the key of keys %s can be read by everybody: chmod 600", self._where)
        self._may_make = may_make
        self._lock = threading.RLock()
        self._seen: tuple[object, ...] = ()
        self._fetched = b""  # of a variable, which may be gone by now, or a command, which takes its time
        self._keys: dict[str, bytes] = {}
        self._ring = KeyRing(current="", keys=())

    def __repr__(self) -> str:
        """Without keys."""
        return f"Keyring({self._kind or 'home'})"

    @property
    def variable(self) -> str:
        """The environment variable that holds the keys; "" where none does."""
        return self._where if self._kind == "env" else ""

    @property
    def file(self) -> Path | None:
        """The file that holds the keys; None where the environment or a command does."""
        return Path(self._where).expanduser() if self._kind == "file" else None if self._kind else self._own

    @property
    def current(self) -> str:
        """The id of the key that wraps what is new."""
        with self._lock:
            self._refresh()
            return self._ring.current

    @property
    def entries(self) -> tuple[KeyEntry, ...]:
        """Every key, the home's own file included."""
        with self._lock:
            self._refresh()
            return self._ring.keys

    def has(self, id: str) -> bool:
        """Whether this key is here."""
        with self._lock:
            self._refresh()
            return id in self._keys

    def check_has(self, id: str) -> None:
        """Pass where this key is here.

        Raises:
            NotFoundError: It is not.
        """
        self._find(id)

    # ------------------------------------------------------------------ wrapping

    def wrap(self, key: bytes, context: str) -> tuple[str, str]:
        """The id of the current key, and `key` wrapped by it, base64."""
        with self._lock:
            current = self.current
            kek = self._keys[current]
        return current, base64.b64encode(envelope.wrap(kek, key, context)).decode()

    def unwrap(self, kek: str, wrapped: str, context: str) -> bytes:
        """The key again.

        Raises:
            NotFoundError: The key that wrapped it is not here.
            CorruptError: It was altered, or belongs to something else.
        """
        try:
            raw = base64.b64decode(wrapped, validate=True)
        except ValueError as error:
            raise CorruptError(f"the key of {context} is not base64") from error
        return envelope.unwrap(self._find(kek), raw, context)

    def seal(self, value: bytes, context: str) -> str:
        """A short value, wrapped: `KEY:BASE64`."""
        return ":".join(self.wrap(value, context))

    def unseal(self, sealed: str, context: str) -> bytes:
        """The value again; raises as `unwrap`."""
        kek, _, wrapped = sealed.partition(":")
        return self.unwrap(kek, wrapped, context)

    def new_key(self) -> bytes:
        """A key for one blob."""
        return envelope.new_key()

    def encrypting(self, source: BinaryIO, key: bytes) -> envelope.EncryptingReader:
        """The envelope of a stream."""
        return envelope.EncryptingReader(source, key)

    def decrypting(self, source: BinaryIO, key: bytes, size: int, name: str) -> envelope.DecryptingReader:
        """The plain bytes of an envelope."""
        return envelope.DecryptingReader(source, key, size, name)

    # ------------------------------------------------------------------ changing

    def add(self, now: float) -> str:
        """Make a new key the current one; its id. Where no file of ours holds the keys, they are changed there.

        Raises:
            InputError: The keys come from the environment or a command.
        """
        path = self._changeable("a new key")
        with self._lock:
            self._refresh()  # which makes the file, if there is none
        with self._lock, _locked(path):
            raw = envelope.new_key()
            made = KeyEntry(id=key_id(raw), key=base64.b64encode(raw).decode(), created_at=now)
            ring = _read(path)
            _write(path, KeyRing(current=made.id, keys=(*(ring.keys if ring else ()), made)))
            self._seen = ()
        return made.id

    def drop(self, id: str) -> None:
        """Forget a key that is not the current one. What it has wrapped opens never again.

        Raises:
            NotFoundError: It is not in the file.
            ConflictError: It is the current one.
            InputError: The keys come from the environment or a command.
        """
        path = self._changeable("fewer keys")
        with self._lock, _locked(path):
            ring = _read(path) or KeyRing(current="", keys=())
            if id == ring.current:
                raise ConflictError(f"{id} is the current key", hint="`millrace keys rotate` makes another one current")
            kept = tuple(one for one in ring.keys if one.id != id)
            if len(kept) == len(ring.keys):
                raise NotFoundError(f"there is no key {id[:40]!r} in {path}", hint="`millrace keys` lists them")
            _write(path, KeyRing(current=ring.current, keys=kept))
            self._seen = ()

    def _changeable(self, what: str) -> Path:
        path = self.file
        if path is None:
            raise InputError(
                f"the keys come from {self._kind}:…, which Millrace does not write",
                hint=f"put {what} there (JSON as in kek.json, the new key current), then `millrace keys rotate`",
            )
        return path

    # ------------------------------------------------------------------ reading

    def _find(self, id: str) -> bytes:
        with self._lock:
            self._refresh()
            if id not in self._keys and self._kind == "command":
                self._seen, self._fetched = (), b""  # it may have been rotated since
                self._refresh()
            if id not in self._keys:
                raise NotFoundError(f"the key {id[:40]!r} that this was encrypted with is not here", hint=_HINT)
            return self._keys[id]

    def _refresh(self) -> None:
        """Read again what others have changed."""
        seen = (_identity(self.file), _identity(self._own), bool(self._keys))
        if seen == self._seen and self._keys:
            return
        if self.file is not None:
            ring = _read(self.file) or self._make(self.file)
        else:
            self._fetched = self._fetched or self._fetch()
            ring = _parse(self._fetched, f"{self._kind}:…")
        own = _read(self._own) if self.file != self._own else None
        known = {one.id for one in ring.keys}
        others = tuple(one for one in own.keys if one.id not in known) if own else ()
        self._ring = KeyRing(current=ring.current, keys=(*ring.keys, *others))
        self._keys = {one.id: base64.b64decode(one.key) for one in self._ring.keys}
        self._seen = (_identity(self.file), _identity(self._own), True)

    def _make(self, path: Path) -> KeyRing:
        if self._keys or not self._may_make:  # keys that were here and are gone are not replaced by others
            raise NotFoundError(f"there are no keys in {path}, and something here is encrypted", hint=_HINT)
        raw = envelope.new_key()
        entry = KeyEntry(id=key_id(raw), key=base64.b64encode(raw).decode())
        with _locked(path):
            ring = _read(path)
            if ring is None:
                ring = KeyRing(current=entry.id, keys=(entry,))
                _write(path, ring)
        return ring

    def _fetch(self) -> bytes:
        if self._kind == "env":
            value = os.environ.get(self._where, "")
            if not value:
                raise NotFoundError(f"the variable {self._where} with the keys is not set", hint=_HINT)
            return value.encode()
        command = shlex.split(self._where)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=COMMAND_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"{command[0]} gave no key within {COMMAND_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise InputError(
                f"{command[0]}, which is to give the keys, does not start: {error.strerror}", hint=_HINT
            ) from None
        if done.returncode != 0:
            raise UnavailableError(
                f"{command[0]}, which is to give the keys, ended with code {done.returncode}",
                hint="run it by hand, as the user of the server: its exit code has to be 0, its output the key",
            )
        return done.stdout


def _parse(raw: bytes, where: str) -> KeyRing:
    """A ring, or one key as a ring. What was found is not shown."""
    if raw.lstrip().startswith(b"{") and len(raw) != envelope.KEY_BYTES:
        try:
            ring = msgspec.json.decode(raw, type=KeyRing)
            keys = {one.id: base64.b64decode(one.key, validate=True) for one in ring.keys}
        except (msgspec.MsgspecError, ValueError):
            raise InputError(f"{where} holds no ring of keys", hint=_HINT) from None
        if ring.current not in keys or any(
            len(key) != envelope.KEY_BYTES or key_id(key) != id for id, key in keys.items()
        ):
            raise InputError(f"the ring of keys in {where} is not whole", hint=_HINT)
        return ring
    key = one_key(raw)
    if key is None:
        raise InputError(f"the key in {where} must be 32 bytes, as 64 hexadecimal digits or as base64", hint=_HINT)
    entry = KeyEntry(id=key_id(key), key=base64.b64encode(key).decode())
    return KeyRing(current=entry.id, keys=(entry,))


def one_key(raw: bytes) -> bytes | None:
    """32 bytes, raw, as 64 hexadecimal digits or as base64; None: it is something else.

    Example:
        >>> one_key(b"00" * 32) == bytes(32), one_key(b"hunter2")
        (True, None)
    """
    if len(raw) == envelope.KEY_BYTES:
        return raw
    text = raw.strip()
    if _HEX.fullmatch(text):
        return bytes.fromhex(text.decode())
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return key if len(key) == envelope.KEY_BYTES else None


def _read(path: Path) -> KeyRing | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnavailableError(f"the keys in {path} cannot be read: {error.strerror}") from error
    return _parse(raw, str(path))


def _write(path: Path, ring: KeyRing) -> None:
    """Whole or not at all, durably, for its owner only."""
    temp = path.with_name(f".{path.name}.{new_id()}")
    try:
        with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(ring)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time changes a file of keys."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _identity(path: Path | None) -> tuple[int, int, int] | None:
    """What changes when a file is replaced."""
    try:
        state = path.stat() if path is not None else None
    except OSError:
        return None
    return (state.st_ino, state.st_mtime_ns, state.st_size) if state else None
