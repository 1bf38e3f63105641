"""Who asks, where that matters: quotas per client, in bounded memory."""

from __future__ import annotations

import functools
import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

from millrace.core.addresses import is_loopback, is_within

FORWARDED = b"x-forwarded-for"
MAX_CLIENTS = 4096


class Client:
    """A token's principal or an address, with a bucket of requests that fills at `rate` a second.

    Args:
        name: For refusals.
        rate: Requests per second; 0: any number.
        burst: How many it may send at once after a pause.
        has_share: Whether its part of a queue is bounded: not that of an address which many programs share.

    Example:
        >>> client = Client("token:a", rate=2.0, burst=2.0)
        >>> client.take(10.0), client.take(10.0), client.wait_s(10.0), client.wait_s(10.5)
        (None, None, 0.5, 0.0)
    """

    __slots__ = ("__weakref__", "_at_s", "_burst", "_left", "has_share", "name", "rate")

    def __init__(self, name: str, rate: float = 0.0, burst: float = 1.0, has_share: bool = True) -> None:
        self.name = name
        self.rate = rate
        self.has_share = has_share
        self._burst = self._left = max(1.0, burst)
        self._at_s = float("-inf")

    def wait_s(self, now_s: float) -> float:
        """Seconds until its next request may come; 0: now."""
        if self.rate <= 0:
            return 0.0
        self._left = min(self._burst, self._left + max(0.0, now_s - self._at_s) * self.rate)
        self._at_s = now_s
        return 0.0 if self._left >= 1 else (1 - self._left) / self.rate

    def take(self, now_s: float) -> None:
        """Count one request."""
        self.wait_s(now_s)
        self._left -= 1


class Clients:
    """Finds the client of a key. Whoever still holds one finds the same again; of the others, the latest are kept.

    Args:
        rate: Requests per second of each; 0: any number.
        burst: How many at once after a pause; 0: as many as in a second.
        limit: How many are kept.
    """

    def __init__(self, rate: float = 0.0, burst: float = 0.0, limit: int = MAX_CLIENTS) -> None:
        self._rate, self._burst, self._limit = rate, burst or rate, limit
        self._known: WeakValueDictionary[str, Client] = WeakValueDictionary()
        self._latest: OrderedDict[str, Client] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str, *, has_share: bool = True) -> Client:
        """The client of a principal or an address."""
        client = self._known.get(key)
        if client is None:
            client = self._known[key] = Client(key, self._rate, self._burst, has_share)
        self._latest[key] = client
        self._latest.move_to_end(key)
        if len(self._latest) > self._limit:
            self._latest.popitem(last=False)
        return client

    def of_address(self, address: str) -> Client:
        """The client of a peer's address."""
        return self.find(network_of(address), has_share=not is_loopback(address))


@functools.lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """What counts as one client: an IPv4 address; of IPv6 the /64 that one customer is given.

    Example:
        >>> network_of("192.0.2.7"), network_of("2001:db8:1:2:3::4"), network_of("::ffff:192.0.2.7"), network_of("?")
        ('192.0.2.7', '2001:db8:1:2::/64', '192.0.2.7', 'unknown')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv4Address) or found.is_loopback:
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


def forwarded_for(header: bytes, peer: str, proxies: Sequence[str]) -> str:
    """The address for which trusted proxies forwarded a request: the last one that is not a proxy's.

    Whoever stands before it may have written anything.

    Args:
        header: X-Forwarded-For.
        peer: Who connected, a trusted proxy.
        proxies: Networks of trusted proxies.

    Example:
        >>> forwarded_for(b"6.6.6.6, 192.0.2.7, 10.0.0.2", "10.0.0.1", ["10.0.0.0/8"])
        '192.0.2.7'
    """
    found = peer
    for part in reversed(header.decode("latin-1").split(",")):
        address = part.strip()
        if network_of(address) == "unknown":
            break
        found = address
        if not is_within(address, proxies):
            break
    return found
