"""The one rule of what may be bound without authentication."""

from __future__ import annotations

import pytest

from millrace.core.addresses import is_loopback, loopback_address
from millrace.core.errors import InputError


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.9.9.9", "127.9.9.9"),
        ("localhost", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
    ],
)
def test_this_machine(host: str, address: str) -> None:
    assert is_loopback(host)
    assert loopback_address(host) == address


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "[::]", "192.168.1.5", "localhost.example", "127.0.0.1.example", "127.1", "", " 127.0.0.1"],
)
def test_everywhere_else(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match="loopback") as refused:
        loopback_address(host)
    assert "no authentication" in refused.value.hint
