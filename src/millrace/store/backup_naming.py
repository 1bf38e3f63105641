"""Which blobs the records name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from millrace.core.types import TREE_MEDIA_TYPE


class Named:
    """What the rows that were seen name.

    Attributes:
        blobs: By digest, whether it is a tree.
        wanted: Those that must be there; what only steps name may have been collected as garbage.
        stored: Of encrypted blobs the digest of what is stored, by that of the plain bytes.

    Example:
        >>> named = Named()
        >>> named.see("steps", ["id", '{"outputs": {"x": {"digest": "sha256:1", "size_bytes": 1}}}'])
        >>> named.blobs, named.wanted
        ({'sha256:1': False}, set())
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bool] = {}
        self.wanted: set[str] = set()
        self.stored: dict[str, str] = {}

    def see(self, table: str, row: Sequence[Any]) -> None:
        """Look at a row; records have their body in the last column."""
        body = row[-1]
        if not isinstance(body, str) or '"sha256:' not in body:
            return
        value = msgspec.json.decode(body)
        if table == "data_keys":
            self.stored[value["id"]] = value["stored"]
            return
        for artifact in artifacts_in(value):
            digest = artifact["digest"]
            self.blobs[digest] = self.blobs.get(digest, False) or artifact.get("media_type") == TREE_MEDIA_TYPE
            if table != "steps":
                self.wanted.add(digest)

    def add(self, table: str, blobs: dict[str, bool]) -> None:
        """What rows of a table name that were seen in another backup."""
        for digest, is_tree in blobs.items():
            self.blobs[digest] = self.blobs.get(digest, False) or is_tree
            if table != "steps":
                self.wanted.add(digest)

    def trees(self) -> list[str]:
        """Digests of the trees."""
        return [digest for digest, is_tree in self.blobs.items() if is_tree]

    def add_files(self, tree: str, files: list[str]) -> None:
        """A tree's files are wanted if it is."""
        for digest in files:
            self.blobs.setdefault(digest, False)
            if tree in self.wanted:
                self.wanted.add(digest)

    def place(self, digest: str) -> str:
        """The digest of what is stored."""
        return self.stored.get(digest, digest)

    def absent(self, listed: dict[str, int]) -> set[str]:
        """Wanted, and not among these."""
        return {one for one in self.wanted if self.place(one) not in listed}


def artifacts_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every artifact in a record's body, whatever holds it.

    Example:
        >>> [one["digest"] for one in artifacts_in({"outputs": {"x": {"digest": "sha256:1", "size_bytes": 1}}})]
        ['sha256:1']
    """
    if isinstance(value, dict):
        digest = value.get("digest")
        if isinstance(digest, str) and digest.startswith("sha256:") and "size_bytes" in value:
            yield value
        else:
            for item in value.values():
                yield from artifacts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from artifacts_in(item)
