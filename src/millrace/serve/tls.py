"""The certificate that a server shows, and whose certificates it wants of clients."""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.core.errors import InputError
from millrace.core.principals import EVERYWHERE
from millrace.serve.access import Caller

_MIN_TOKEN = 16
_SHORT = {
    "commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C",
    "localityName": "L", "stateOrProvinceName": "ST", "domainComponent": "DC", "userId": "UID",
}  # fmt: skip
_SPECIAL, _ESCAPED = re.compile(r'[,+"\\<>;=]'), r"\\\g<0>"


def server_context(cert: str, key: str = "", client_ca: str = "") -> ssl.SSLContext | None:
    """What a server speaks TLS with; None without a certificate: plain HTTP.

    Args:
        cert: Its certificate, with those between it and the authority (PEM).
        key: Its private key; empty: it stands with the certificate.
        client_ca: Of whom every client must bring a certificate (PEM); empty: none is asked for.

    Raises:
        InputError: A file cannot be read, or is not what it should be, or the certificate is missing.

    Example:
        >>> server_context("") is None
        True
    """
    if not cert:
        if key or client_ca:
            raise InputError(
                "a private key or an authority for clients was given without a certificate of the server",
                hint="add --tls-cert FILE",
            )
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the certificate {cert} cannot be used: {error}") from None
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"the authority {client_ca} cannot be used: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def subject_of(certificate: Mapping[str, Any] | None) -> str:
    r"""Whose certificate it is, in one line (RFC 4514), the nearest first; empty without one or its subject.

    Args:
        certificate: As of `ssl.SSLSocket.getpeercert`.

    Example:
        >>> subject_of({"subject": ((("organizationName", "A, B"),), (("commonName", "lee"),))})
        'CN=lee,O=A\\, B'
    """
    parts = [] if certificate is None else certificate.get("subject", ())
    shown = [
        "+".join(f"{_SHORT.get(name, name)}={_SPECIAL.sub(_ESCAPED, str(value))}" for name, value in part)
        for part in reversed(parts)
    ]
    return ",".join(shown)


def read_tokens(path: str) -> list[Caller]:
    """Who may call, from a file with a secret on each line; lines that begin with # say nothing.

    After a secret may stand `admin`: with that token models may be loaded and unloaded too.

    Raises:
        InputError: It cannot be read, holds no secret, or one that is too short.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the tokens in {path} cannot be read: {error}") from None
    secrets = [(number, *_secret_of(line)) for number, line in enumerate(lines, 1) if line and line[0] != "#"]
    if not secrets:
        raise InputError(f"{path} holds no token", hint="one on each line; `openssl rand -hex 32` makes one")
    for number, secret, _ in secrets:
        if len(secret) < _MIN_TOKEN:
            raise InputError(f"{path}, line {number}: want a token of at least {_MIN_TOKEN} characters")
    return [
        Caller(
            digest=hashlib.sha256(secret.encode()).hexdigest(), who=f"token:{number}", where=(EVERYWHERE,),
            may_load=is_admin,
        )
        for number, secret, is_admin in secrets
    ]  # fmt: skip


def _secret_of(line: str) -> tuple[str, bool]:
    """A line's secret, and whether it is an administrator's."""
    words = line.split()
    return (words[0], True) if words[1:] == ["admin"] else (line, False)
