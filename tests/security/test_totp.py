"""The second factor, against the vectors of RFC 6238."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.security import totp

SECRET = base64.b32encode(b"12345678901234567890").decode()
VECTORS = {59: "94287082", 1111111109: "07081804", 1111111111: "14050471", 1234567890: "89005924",
           2000000000: "69279037", 20000000000: "65353130"}  # fmt: skip


@pytest.mark.parametrize("at", VECTORS)
def test_the_vectors_of_the_rfc(at: int) -> None:
    assert totp.code(SECRET, at) == VECTORS[at][-6:]


@given(st.floats(1e6, 1e10), st.integers(-4, 4))
def test_one_step_to_either_side_is_good_once(now: float, steps: int) -> None:
    typed = totp.code(SECRET, now + steps * totp.STEP_S)
    step = totp.accepted_step(SECRET, typed, now)
    if abs(steps) <= totp.SKEW_STEPS:
        assert step is not None
        assert totp.accepted_step(SECRET, typed, now, step) is None, "none is good twice"
        assert totp.accepted_step(SECRET, f" {typed[:3]} {typed[3:]}", now) == step
    elif step is not None:  # one in a million: two steps with one code
        assert abs(step - int(now) // totp.STEP_S) <= totp.SKEW_STEPS


@pytest.mark.parametrize("typed", ["", "12345", "abcdef", "0000000", "１２３４５６", "\x00" * 6])
def test_what_is_no_code(typed: str) -> None:
    assert totp.accepted_step(SECRET, typed, 59.0) is None


@pytest.mark.parametrize("secret", ["", "A", "AAAA", "not base32!", "A" * 16, "é"])
def test_what_is_no_secret(secret: str) -> None:
    with pytest.raises(InputError, match="base32 of at least 16 bytes"):
        totp.check_secret(secret)


def test_an_app_can_read_it() -> None:
    secret = totp.new_secret()
    found = totp.uri(secret, "ada@example.org")
    assert found.startswith("otpauth://totp/Millrace:ada%40example.org?")
    assert f"secret={secret}" in found
    assert "issuer=Millrace" in found
