"""Ed25519 signatures over digests, with the home's own key and the keys that the home trusts.

`keys/signing.key` (PKCS #8, mode 0600, made on first use) signs; `keys/signing.pub` is for others;
`keys/trusted/*.pub` are others' keys; more are in the home's records, with the times in which they count. Homes
that share records publish their public keys there. Trust comes from these places only, never from a bundle.

A signature has no time that could be trusted: whoever has a key dates what it signs as they please. So a key that
is revoked, or outside of its times, counts for nothing any more, whenever it has signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from millrace.core.errors import InputError, UntrustedError
from millrace.core.ids import canonical_json, new_id

ALGORITHM = "ed25519"
K = TypeVar("K")
_CONTEXT = b"millrace signature v1\n"  # a signature made for something else never fits here


_ALTERED = "take it again from where it was made, with its signature: `millrace models export MODEL --to FOLDER`"


class SignatureDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `sign` returns, as JSON."""

    algorithm: str
    key_id: str
    digest: str
    signature: str  # base64


_DECODER = msgspec.json.Decoder(SignatureDocument)


class HomeSigner:
    """Implements `core.ports.Signer` with the keys below a home. Thread- and process-safe.

    Args:
        home: The home folder; nothing is made before the first signature.
        find_shared: The PEM of a key by its id, if the home's records have it.
        find_refusal: Why a key does not count now, by its id ("was revoked on …"); None where it does. It is
            asked of every key, the home's own too.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     signer = HomeSigner(Path(home))
        ...     signature = signer.sign("sha256:" + "0" * 64)
        ...     signer.verify("sha256:" + "0" * 64, signature) == signer.key_id
        True
    """

    def __init__(
        self,
        home: Path,
        find_shared: Callable[[str], bytes | None] | None = None,
        find_refusal: Callable[[str], str | None] | None = None,
    ) -> None:
        self._folder = Path(home) / "keys"
        self._find_shared = find_shared
        self._find_refusal = find_refusal

    @property
    def key_id(self) -> str:
        """The id of the home's own key, made on first use."""
        return key_id(self._private_key().public_key())

    def public_key(self) -> bytes:
        """The home's own public key as PEM: others put it into their `keys/trusted/<name>.pub`."""
        return _pem(self._private_key().public_key())

    def sign(self, digest: str) -> bytes:
        """A signature document (JSON: key id, algorithm, digest, signature).

        Raises:
            UntrustedError: The home's own key was revoked: what it signs, nobody opens.
        """
        key = self._private_key()
        refusal = self._refusal(key_id(key.public_key()))
        if refusal is not None:
            old, own = self._folder / "signing.key", key_id(key.public_key())
            raise UntrustedError(
                f"nothing is signed: the home's own key {own} {refusal}",
                hint=f"the next signature makes a new one after `mv {old} {old}.revoked`",
            )
        signature = base64.b64encode(key.sign(_CONTEXT + digest.encode())).decode()
        document = SignatureDocument(
            algorithm=ALGORITHM, key_id=key_id(key.public_key()), digest=digest, signature=signature
        )
        return canonical_json(document)

    def verify(self, digest: str, signature: bytes) -> str:
        """The key id that signed.

        Raises:
            UntrustedError: Unsigned, signed for other bytes, altered, or by a key that is not trusted.
        """
        if not signature:
            raise UntrustedError(
                f"{digest} is unsigned: want a signature by a trusted key",
                hint="register it again, in a home that signs: `millrace run`, or `millrace models register FILE`",
            )
        try:
            document = _DECODER.decode(signature)
            raw = base64.b64decode(document.signature, validate=True)
            if base64.b64encode(raw).decode() != document.signature:  # spare bits: one signature, one spelling
                raise binascii.Error("the base64 text is not in its only form")
        except (msgspec.MsgspecError, binascii.Error, UnicodeError) as error:
            raise UntrustedError(f"the signature of {digest} is not a signature document: {error}") from error
        if document.algorithm != ALGORITHM:
            raise UntrustedError(f"want a signature by {ALGORITHM}, got {document.algorithm!r}")
        if document.digest != digest:
            raise UntrustedError(
                f"the signature is for {document.digest}, not for {digest}: the content was altered", hint=_ALTERED
            )
        _, key = self._files().get(document.key_id) or ("", self._published(document.key_id))
        refusal = self._refusal(document.key_id)
        if key is None and refusal is None:
            command = "millrace trusted-keys add SIGNERS_HOME/keys/signing.pub"
            raise UntrustedError(
                f"{digest} is signed by the key {document.key_id}, which is not trusted here",
                hint=f"only if you know whose key it is: `{command}`",
            )
        try:
            if key is not None:  # else its file is gone, and the records say that it was revoked
                key.verify(raw, _CONTEXT + digest.encode())
        except InvalidSignature:
            raise UntrustedError(
                f"the signature of {digest} by {document.key_id} is wrong: it was altered", hint=_ALTERED
            ) from None
        if refusal is not None:
            raise UntrustedError(
                f"{digest} is signed by the key {document.key_id}, which {refusal}",
                hint="if you know where its bytes are from, register them again in a home whose key counts: `millrace "
                "run`, or `millrace models register FILE`",
            )
        return document.key_id

    def held(self) -> dict[str, str]:
        """Key ids of the home's folder, each with its file's name.

        Raises:
            UntrustedError: A file is no key.
        """
        return {id: name for id, (name, _) in self._files().items()}

    def _refusal(self, id: str) -> str | None:
        return self._find_refusal(id) if self._find_refusal is not None else None

    def _files(self) -> dict[str, tuple[str, Ed25519PublicKey]]:
        """Own and trusted public keys by id, read anew: adding or removing a file takes effect at once."""
        found = {}
        for path in sorted((self._folder / "trusted").glob("*.pub")):
            key = _load(path, serialization.load_pem_public_key, Ed25519PublicKey)
            found[key_id(key)] = (f"trusted/{path.name}", key)
        if (self._folder / "signing.key").exists():
            own = self._private_key().public_key()
            found[key_id(own)] = ("signing.key", own)
        return found

    def _published(self, wanted: str) -> Ed25519PublicKey | None:
        """The key of another home on the same records; its id must be that of its bytes."""
        pem = self._find_shared(wanted) if self._find_shared is not None else None
        if pem is None:
            return None
        key = _parse(pem, f"the published key {wanted}", serialization.load_pem_public_key, Ed25519PublicKey)
        return key if key_id(key) == wanted else None

    def _private_key(self) -> Ed25519PrivateKey:
        path = self._folder / "signing.key"
        if not path.exists():
            self._make_key(path)
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise UntrustedError(
                f"the signing key {path} can be read by others (mode {mode:04o}, want 0600)",
                hint=f"chmod 600 {path}; if others may have read it, make a new one by removing the file",
            )
        return _load(path, _load_private, Ed25519PrivateKey)

    def _make_key(self, path: Path) -> None:
        """Make the key beside its place and link it there: of several first users exactly one wins."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = Ed25519PrivateKey.generate()
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        temp = self._folder / f".signing.{new_id()}"
        try:
            _write(temp, text, 0o600)
            os.link(temp, path)
        except FileExistsError:
            return
        finally:
            temp.unlink(missing_ok=True)
        public = self._folder / "signing.pub"
        public.unlink(missing_ok=True)
        _write(public, _pem(key.public_key()), 0o644)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def key_id(key: Ed25519PublicKey) -> str:
    """A key's id: `ed25519:` and the first 32 hexadecimal digits of the SHA-256 of its 32 bytes.

    Example:
        >>> key_id(Ed25519PublicKey.from_public_bytes(bytes(32)))
        'ed25519:66687aadf862bd776c8fc18b8e9f8e20'
    """
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return f"{ALGORITHM}:{hashlib.sha256(raw).hexdigest()[:32]}"


def public_key_id(pem: bytes) -> str:
    """The id of a public key as PEM.

    Raises:
        InputError: It is none, or one of another kind.
    """
    try:
        return key_id(_parse(pem, "the text", serialization.load_pem_public_key, Ed25519PublicKey))
    except UntrustedError as error:
        hint = "give the signer's keys/signing.pub: it begins with -----BEGIN PUBLIC KEY-----"
        raise InputError(f"want an {ALGORITHM} public key as PEM: {error.message}", hint=hint) from None


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_private(text: bytes) -> object:
    return serialization.load_pem_private_key(text, password=None)


def _load(path: Path, load: Callable[[bytes], object], key_type: type[K]) -> K:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UntrustedError(f"{path} is not a readable key: {error}", hint="remove the file or replace it") from error
    return _parse(text, str(path), load, key_type)


def _parse(text: bytes, place: str, load: Callable[[bytes], object], key_type: type[K]) -> K:
    try:
        key = load(text)
    except (ValueError, TypeError) as error:
        raise UntrustedError(f"{place} is no key that can be read", hint="remove it or replace it") from error
    if not isinstance(key, key_type):
        raise UntrustedError(f"{place} holds another kind of key, want {ALGORITHM}", hint="remove or replace it")
    return key


def _write(path: Path, text: bytes, mode: int) -> None:
    """Create a file that must not exist, with this mode from the first moment, durably."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
