"""The second factor: one-time passwords by time (RFC 6238), each good once."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets

from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP

from millrace.core.errors import InputError

STEP_S, DIGITS = 30, 6
SKEW_STEPS = 1  # clocks of phones may be so many steps off
KEY_BYTES = 20
ISSUER = "Millrace"


def new_secret() -> str:
    """A new secret in base32, as apps take it.

    Example:
        >>> len(new_secret())
        32
    """
    return base64.b32encode(secrets.token_bytes(KEY_BYTES)).decode()


def uri(secret: str, name: str) -> str:
    """What an app reads as a picture.

    Example:
        >>> uri("A" * 32, "ada")[:60]
        'otpauth://totp/Millrace:ada?digits=6&secret=AAAAAAAAAAAAAAAA'
    """
    return _codes(secret).get_provisioning_uri(name, ISSUER)


def code(secret: str, at: float) -> str:
    """The code of a time.

    Example:
        >>> code(base64.b32encode(b"12345678901234567890").decode(), 59.0)  # RFC 6238, appendix B
        '287082'
    """
    return _codes(secret).generate(int(at)).decode()


def accepted_step(secret: str, given: str, now: float, last_step: int = 0) -> int | None:
    """The step that a code belongs to; None where it is wrong, too old, or used already.

    Args:
        secret: In base32.
        given: What somebody has typed.
        now: Seconds since 1970.
        last_step: The step of the last code that was used: none is good twice.

    Example:
        >>> secret = "A" * 32
        >>> accepted_step(secret, code(secret, 3000.0), 3010.0)
        100
        >>> accepted_step(secret, code(secret, 3000.0), 3010.0, last_step=100) is None
        True
    """
    typed = "".join(given.split()).encode()
    current = int(now) // STEP_S
    found: int | None = None
    for step in range(current - SKEW_STEPS, current + SKEW_STEPS + 1):
        if step >= 0 and hmac.compare_digest(_codes(secret).generate(step * STEP_S), typed) and step > last_step:
            found = step
    return found


def check_secret(secret: str) -> None:
    """Refuse what is no secret.

    Raises:
        InputError: It is not base32 of at least 16 bytes.

    Example:
        >>> check_secret("A" * 32)
    """
    _codes(secret)


def _codes(secret: str) -> TOTP:
    try:
        key = base64.b32decode(secret.upper())
        return TOTP(key, DIGITS, SHA1(), STEP_S)  # what every app understands; its key is random and long
    except (binascii.Error, ValueError):
        raise InputError("a secret of a second factor is base32 of at least 16 bytes") from None
