"""What is served under which name: endpoints, each with revisions that share its requests. Without a transport."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from millrace.core.errors import NotFoundError, UnavailableError
from millrace.serve.dataplane import DataPlane


class Revision(NamedTuple):
    """A loaded version of an endpoint, and its share of the requests.

    `weight` is relative to the other revisions'; 0 is only reached by its version. A shadow gets copies of
    requests, and nobody sees its answers.
    """

    plane: DataPlane
    weight: float = 1.0
    is_shadow: bool = False


class Revisions:
    """The revisions of one endpoint.

    Args:
        name: The endpoint's.
        revisions: At least one with a weight that is no shadow.
    """

    def __init__(self, name: str, revisions: Sequence[Revision]) -> None:
        self.name = name
        self.all = {one.plane.info.version: one for one in revisions}
        live = [one for one in revisions if one.weight > 0 and not one.is_shadow]
        self._live = [one.plane for one in live]
        total = sum(one.weight for one in live)
        self._bounds = list(accumulate(one.weight / total for one in live))[:-1]
        self.primary = max(live, key=lambda one: one.weight).plane

    @property
    def planes(self) -> list[DataPlane]:
        """Of every revision."""
        return [one.plane for one in self.all.values()]

    @property
    def is_single(self) -> bool:
        """Whether every request without a version goes to the same plane."""
        return len(self._live) == 1

    def pick(self, key: bytes | None = None) -> DataPlane:
        """Where a request goes; requests with the same key go to the same revision while the weights stay.

        Args:
            key: Chosen by whoever calls: a user, a session. None: by chance.
        """
        if len(self._live) == 1:
            return self._live[0]
        return self._live[bisect_right(self._bounds, random.random() if key is None else share_of(key))]

    def at(self, version: str) -> DataPlane:
        """The plane of a version.

        Raises:
            NotFoundError: It is not served here.
        """
        found = self.all.get(version)
        if found is None:
            known = ", ".join(map(repr, self.all))
            raise NotFoundError(f"model {self.name!r} has no version {version[:40]!r} here: want {known}")
        return found.plane


class Directory:
    """All endpoints of a serving process. For the event loop's thread.

    Example:
        >>> Directory().find("digits")
        Traceback (most recent call last):
        millrace.core.errors.UnavailableError: model 'digits' is not served at this moment: it is just starting
    """

    def __init__(self) -> None:
        self._endpoints: dict[str, Revisions] = {}
        self._absent: dict[str, str] = {}
        self.is_told = False  # what to serve; before that, nobody's model is unknown
        self.changed: list[Callable[[], None]] = []  # called after every change

    def __iter__(self) -> Iterator[Revisions]:
        """Endpoints in the order of their names."""
        return iter([self._endpoints[name] for name in sorted(self._endpoints)])

    def __contains__(self, name: object) -> bool:
        return name in self._endpoints

    def put(self, name: str, revisions: Sequence[Revision]) -> list[DataPlane]:
        """Serve these from the next request on; the planes that they replace, whose requests still run."""
        old = self._endpoints.get(name)
        new = self._endpoints[name] = Revisions(name, revisions)
        self._absent.pop(name, None)
        self._tell()
        return [plane for plane in (old.planes if old is not None else []) if plane not in new.planes]

    def remove(self, name: str) -> list[DataPlane]:
        """Serve an endpoint no longer; its planes, whose requests still run."""
        self._absent.pop(name, None)
        old = self._endpoints.pop(name, None)
        self._tell()
        return old.planes if old is not None else []

    def _tell(self) -> None:
        for changed in self.changed:
            changed()

    def excuse(self, name: str, why: str) -> None:
        """Say of an endpoint that is to be served why it is not (yet), for as long as it is not."""
        self._absent[name] = why

    def excused(self) -> list[str]:
        """The endpoints of which that was said."""
        return list(self._absent)

    def find(self, name: str) -> Revisions:
        """An endpoint.

        Raises:
            UnavailableError: It is to be served, but is not at this moment.
            NotFoundError: It is not served here.
        """
        found = self._endpoints.get(name)
        if found is not None:
            return found
        why = self._absent.get(name, "" if self.is_told else "it is just starting")
        if why:
            raise UnavailableError(f"model {name[:80]!r} is not served at this moment: {why}")
        known = ", ".join(sorted(self._endpoints)) or "none"
        raise NotFoundError(f"model {name[:80]!r} is not served here: want one of {known}")

    @property
    def is_ready(self) -> bool:
        """Whether everything that is served is ready."""
        return self.is_told and all(plane.is_ready for endpoint in self for plane in endpoint.planes)


def share_of(key: bytes) -> float:
    """A place in [0, 1) that depends on nothing but the key.

    Example:
        >>> share_of(b"user-7") == share_of(b"user-7"), 0 <= share_of(b"x") < 1
        (True, True)
    """
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big") / (1 << 56)
