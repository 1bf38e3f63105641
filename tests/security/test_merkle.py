"""The Merkle tree against the recursive definitions of RFC 6962, and known roots of Certificate Transparency."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.security import merkle
from millrace.security.merkle import CompactRange, leaf_hash, node_hash

# The leaves and roots of Certificate Transparency's own reference tests (merkletree/testdata).
CT_LEAVES = [bytes.fromhex(one) for one in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
CT_ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
SIZES = st.integers(1, 70)


def leaves_of(size: int) -> list[bytes]:
    return [leaf_hash(number.to_bytes(2, "big")) for number in range(size)]


def root_by_definition(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962, 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = power_below(len(leaves))
    return node_hash(root_by_definition(leaves[:k]), root_by_definition(leaves[k:]))


def power_below(size: int) -> int:
    k = 1
    while k * 2 < size:
        k *= 2
    return k


def path_by_definition(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 6962, 2.1.1."""
    if len(leaves) == 1:
        return []
    k = power_below(len(leaves))
    if m < k:
        return [*path_by_definition(m, leaves[:k]), root_by_definition(leaves[k:])]
    return [*path_by_definition(m - k, leaves[k:]), root_by_definition(leaves[:k])]


def subproof_by_definition(m: int, leaves: list[bytes], is_whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 6962, 2.1.2."""
    if m == len(leaves):
        return [] if is_whole else [root_by_definition(leaves)]
    k = power_below(len(leaves))
    if m <= k:
        return [*subproof_by_definition(m, leaves[:k], is_whole), root_by_definition(leaves[k:])]
    return [*subproof_by_definition(m - k, leaves[k:], False), root_by_definition(leaves[:k])]


def root_of(leaves: list[bytes]) -> bytes:
    tree = CompactRange()
    tree.extend(leaves)
    return tree.root()


def inclusion(leaves: list[bytes], index: int) -> list[bytes]:
    return merkle.subtree_roots(leaves, merkle.inclusion_ranges(index, len(leaves)))


def consistency(leaves: list[bytes], first: int) -> list[bytes]:
    return merkle.subtree_roots(leaves, merkle.consistency_ranges(first, len(leaves)))


def test_known_roots_of_certificate_transparency() -> None:
    tree = CompactRange()
    assert tree.root().hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for leaf, root in zip(CT_LEAVES, CT_ROOTS, strict=True):
        tree.extend([leaf_hash(leaf)])
        assert tree.root().hex() == root


@given(st.integers(0, 70), st.integers(0, 70))
def test_roots_are_those_of_the_definition_also_when_a_tree_goes_on(size: int, begun: int) -> None:
    leaves = leaves_of(size)
    first = CompactRange()
    first.extend(leaves[:begun])
    rest = CompactRange(first.size, first.nodes)
    rest.extend(leaves[begun:])
    assert rest.root() == root_by_definition(leaves)
    assert rest.size == size


def test_nodes_that_do_not_fit_the_size_are_refused() -> None:
    with pytest.raises(ValueError, match="2 complete subtrees"):
        CompactRange(5, [b"x" * 32])


@given(SIZES, st.data())
def test_inclusion_proofs_are_those_of_the_definition_and_prove_one_place_only(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    leaves = leaves_of(size)
    proof = inclusion(leaves, index)
    root = root_of(leaves)
    assert proof == path_by_definition(index, leaves)
    assert merkle.is_included(leaves[index], index, size, proof, root)
    other = data.draw(st.integers(0, size + 2))
    if other != index:
        assert not merkle.is_included(leaves[index], other, size, proof, root)
    assert not merkle.is_included(leaf_hash(b"another"), index, size, proof, root)
    assert not merkle.is_included(leaves[index], index, size, [*proof, root], root)
    if proof:
        changed = data.draw(st.integers(0, len(proof) - 1))
        forged = [bytes(32) if place == changed else node for place, node in enumerate(proof)]
        assert not merkle.is_included(leaves[index], index, size, forged, root)
        assert not merkle.is_included(leaves[index], index, size, proof[:-1], root)


@given(SIZES, st.data())
def test_consistency_proofs_are_those_of_the_definition_and_prove_one_beginning(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, size))
    leaves = leaves_of(size)
    proof = consistency(leaves, first)
    old, new = root_of(leaves[:first]), root_of(leaves)
    assert proof == subproof_by_definition(first, leaves, True)
    assert merkle.is_consistent(first, old, size, new, proof)
    assert not merkle.is_consistent(first, bytes(32), size, new, proof)
    assert not merkle.is_consistent(first, old, size, bytes(32), proof)
    assert not merkle.is_consistent(first, old, size, new, [*proof, new])
    rewritten = [leaf_hash(b"another"), *leaves[1:]]
    assert not merkle.is_consistent(first, old, size, root_of(rewritten), consistency(rewritten, first))
    if proof:
        assert not merkle.is_consistent(first, old, size, new, proof[1:])


@pytest.mark.parametrize(("index", "size"), [(0, 0), (3, 3), (-1, 3)])
def test_a_leaf_that_is_not_there_has_no_proof(index: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"no leaf {index}"):
        merkle.inclusion_ranges(index, size)
    assert not merkle.is_included(bytes(32), index, size, [], bytes(32))


@pytest.mark.parametrize(("first", "second"), [(0, 3), (4, 3)])
def test_a_tree_that_is_no_beginning_has_no_proof(first: int, second: int) -> None:
    with pytest.raises(ValueError, match="want 0 <"):
        merkle.consistency_ranges(first, second)
    assert not merkle.is_consistent(first, bytes(32), second, bytes(32), [])


def test_too_few_leaves_give_no_proof() -> None:
    with pytest.raises(ValueError, match="want 4 leaves, there are 3"):
        merkle.subtree_roots(leaves_of(3), [(0, 2), (2, 4)])
