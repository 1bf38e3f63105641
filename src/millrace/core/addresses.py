"""Which addresses are this machine's own: what may be bound while nobody is asked, what is not called for somebody."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from millrace.core.errors import InputError

# Where clouds tell a machine its secrets, besides the link-local ones (AWS, Alibaba, Oracle).
_TELLING = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))
_WITH_V4_INSIDE = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96"))  # compatible, NAT64


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
            hint="there is no authentication here: `millrace up` with a certificate asks for tokens; or use ssh -L",
        )
    return "127.0.0.1" if host == "localhost" else host.strip("[]")


def may_be_called(address: str, *, is_local_allowed: bool = False) -> bool:
    """Whether a server may call an address that somebody has named (CWE-918).

    Args:
        address: As the resolver gives it; a name is none.
        is_local_allowed: This machine's own are meant.

    Example:
        >>> [may_be_called(one) for one in ("192.0.2.1", "127.0.0.1", "169.254.169.254", "64:ff9b::7f00:1")]
        [True, False, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour
        if inside is None and not (found.is_loopback or found.is_unspecified):
            is_inside = any(found in network for network in _WITH_V4_INSIDE)
            inside = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if is_inside else None
        found = inside or found
    if found.is_loopback:
        return is_local_allowed
    return not (found.is_link_local or found.is_unspecified or found.is_multicast or found in _TELLING)


def check_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """Networks whose machines are trusted proxies.

    Raises:
        InputError: One is no network, or is every address.

    Example:
        >>> check_networks(["10.0.0.7", "fd00::/8"])
        ('10.0.0.7/32', 'fd00::/8')
        >>> check_networks(["0.0.0.0/0"])
        Traceback (most recent call last):
        millrace.core.errors.InputError: 0.0.0.0/0 is every address: anybody could say that they came over TLS
    """
    found: list[str] = []
    for text in texts:
        try:
            network = ipaddress.ip_network(text.strip())
        except ValueError as error:
            raise InputError(
                f"want the address or network of the proxy, got {text[:80]!r}: {error}",
                hint="such as --tls-terminated-by-proxy 10.0.0.7 or 10.0.0.0/24",
            ) from None
        if network.prefixlen == 0:
            raise InputError(f"{network} is every address: anybody could say that they came over TLS")
        found.append(str(network))
    return tuple(found)


def plain_address(address: str) -> str:
    """Without its zone; one of IPv4 in IPv6 as IPv4.

    Example:
        >>> plain_address("::ffff:10.0.0.7"), plain_address("fe80::1%eth0")
        ('10.0.0.7', 'fe80::1')
    """
    plain = address.partition("%")[0]
    return plain[7:] if plain.lower().startswith("::ffff:") and "." in plain else plain


def is_within(address: str, networks: Sequence[str]) -> bool:
    """Whether an address is in one of the networks; what is no address is not.

    Example:
        >>> is_within("10.0.0.7", ("10.0.0.0/24",)), is_within("10.0.1.7", ("10.0.0.0/24",)), is_within("?", ("::/1",))
        (True, False, False)
    """
    try:
        found = ipaddress.ip_address(plain_address(address))
    except ValueError:
        return False
    return any(found in network for network in _networks(tuple(networks)))


@lru_cache(maxsize=64)
def _networks(texts: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)
