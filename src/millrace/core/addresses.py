"""Which addresses are this machine's own: what may be bound as long as nobody is asked who they are."""

from __future__ import annotations

import ipaddress

from millrace.core.errors import InputError


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own: `localhost`, or a loopback address.

    Another name is not: resolving it could give any address.

    Example:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.9", "[::1]", "0.0.0.0", "example.com", "")]
        [True, True, True, False, False, False]
    """
    name = host.strip("[]")
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def loopback_address(host: str) -> str:
    """The address to bind for a host.

    Args:
        host: `localhost`, or an address; IPv6 with or without brackets.

    Raises:
        InputError: It is not this machine's own.

    Example:
        >>> loopback_address("localhost"), loopback_address("[::1]")
        ('127.0.0.1', '::1')
        >>> loopback_address("0.0.0.0")
        Traceback (most recent call last):
        millrace.core.errors.InputError: want a loopback address such as 127.0.0.1, got '0.0.0.0'
    """
    if not is_loopback(host):
        raise InputError(
            f"want a loopback address such as 127.0.0.1, got {host!r}",
            hint="a served model asks nobody who they are: put a proxy that does in front, or use ssh -L",
        )
    return "127.0.0.1" if host == "localhost" else host.strip("[]")
