"""The Merkle tree of RFC 6962 over sealed events: roots, and proofs that need a few hashes instead of all events.

Pure. A leaf is the link of an event as docs/notes/events-and-sealing.md defines it. Hashes are SHA-256: of a leaf
with 0x00 before it, of two nodes with 0x01 before them, so that neither can pass for the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()
Range = tuple[int, int]  # leaves from the first up to, and without, the second


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of a leaf (RFC 6962, 2.1).

    Example:
        >>> leaf_hash(b"").hex()[:16]
        '6e340b9cffb37a98'
    """
    return hashlib.sha256(b"\0" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of a node over two others.

    Example:
        >>> node_hash(leaf_hash(b""), leaf_hash(b"\\0")).hex()[:16]
        'fac54203e7cc696c'
    """
    return hashlib.sha256(b"\1" + left + right).digest()


class CompactRange:
    """A tree that grows at its right end and remembers only its complete subtrees: one for each bit of its size.

    Args:
        size: How many leaves it has already.
        nodes: The roots of its complete subtrees, largest first.

    Raises:
        ValueError: So many nodes do not belong to this size.

    Example:
        >>> tree = CompactRange()
        >>> tree.extend([leaf_hash(b""), leaf_hash(b"\\0"), leaf_hash(b"\\x10")])
        >>> tree.size, len(tree.nodes), tree.root().hex()[:16]
        (3, 2, 'aeb6bcfe274b70a1')
    """

    def __init__(self, size: int = 0, nodes: Iterable[bytes] = ()) -> None:
        self.size = size
        self.nodes = list(nodes)
        if len(self.nodes) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} complete subtrees, got {len(self.nodes)}")

    def extend(self, leaf_hashes: Iterable[bytes]) -> None:
        """Add leaves, by their hashes."""
        nodes, size, sha256 = self.nodes, self.size, hashlib.sha256
        for node in leaf_hashes:
            carry = size
            while carry & 1:
                node = sha256(b"\1" + nodes.pop() + node).digest()
                carry >>= 1
            nodes.append(node)
            size += 1
        self.size = size

    def root(self) -> bytes:
        """The root of the whole tree."""
        if not self.nodes:
            return EMPTY_ROOT
        root = self.nodes[-1]
        for node in self.nodes[-2::-1]:
            root = node_hash(node, root)
        return root


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """Which subtrees prove that a leaf is in a tree, from the leaf up (RFC 6962, 2.1.1).

    Args:
        index: The leaf, from 0.
        size: Of the tree, in leaves.

    Raises:
        ValueError: There is no such leaf.

    Example:
        >>> inclusion_ranges(2, 5)
        [(3, 4), (0, 2), (4, 5)]
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    found: list[Range] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            found.append((middle, end))
            end = middle
        else:
            found.append((start, middle))
            start = middle
    return found[::-1]


def consistency_ranges(first: int, second: int) -> list[Range]:
    """Which subtrees prove that a tree is the beginning of a larger one (RFC 6962, 2.1.2).

    Args:
        first: Leaves of the older tree, at least 1.
        second: Leaves of the newer one.

    Raises:
        ValueError: The first is empty, or larger than the second.

    Example:
        >>> consistency_ranges(3, 7)
        [(2, 3), (3, 4), (0, 2), (4, 7)]
    """
    if not 0 < first <= second:
        raise ValueError(f"want 0 < {first} <= {second}")
    found: list[Range] = []
    start, end = 0, second
    while first != end:
        middle = start + _split(end - start)
        if first <= middle:
            found.append((middle, end))
            end = middle
        else:
            found.append((start, middle))
            start = middle
    if start:  # else that subtree is the older tree, which who checks has
        found.append((start, end))
    return found[::-1]


def subtree_roots(leaf_hashes: Iterable[bytes], ranges: Sequence[Range]) -> list[bytes]:
    """The roots of subtrees that do not overlap, in one pass over the leaves and with little memory.

    Args:
        leaf_hashes: All leaves from the first on.
        ranges: From `inclusion_ranges` or `consistency_ranges`.

    Returns:
        One hash of 32 bytes for each range, in the order of `ranges`: the proof.

    Raises:
        ValueError: There are fewer leaves.
    """
    roots: dict[Range, bytes] = {}
    place, leaves = 0, iter(leaf_hashes)
    for start, end in sorted(ranges):
        while place < start and next(leaves, None) is not None:
            place += 1
        tree = CompactRange()
        while place < end and (leaf := next(leaves, None)) is not None:
            tree.extend((leaf,))
            place += 1
        if place != end:
            raise ValueError(f"want {end} leaves, there are {place}")
        roots[start, end] = tree.root()
    return [roots[one] for one in ranges]


def is_included(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a proof shows that a leaf stands at a place of a tree (RFC 9162, 2.1.3.2).

    Args:
        leaf: The leaf's hash.
        index: Its place, from 0.
        size: Of the tree, in leaves.
        proof: The hashes of `inclusion_ranges`.
        root: Of the tree.
    """
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for node in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(node, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, node)
        place, last = place >> 1, last >> 1
    return last == 0 and found == root


def is_consistent(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether a proof shows that the first tree is the beginning of the second (RFC 9162, 2.1.4.2).

    Args:
        first: Leaves of the older tree.
        first_root: Its root.
        second: Leaves of the newer one.
        second_root: Its root.
        proof: The hashes of `consistency_ranges`.
    """
    if not 0 < first <= second:
        return False
    if first == second:
        return not proof and first_root == second_root
    hashes = [first_root, *proof] if first & (first - 1) == 0 else list(proof)
    if not hashes:
        return False
    place, last = first - 1, second - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = hashes[0]
    for node in hashes[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = node_hash(new, node)
        place, last = place >> 1, last >> 1
    return last == 0 and old == first_root and new == second_root


def _split(size: int) -> int:
    """The largest power of two below a size."""
    return 1 << ((size - 1).bit_length() - 1)
