"""The event chain: known answers, and every alteration is found at its place."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from millrace.security.chain import GENESIS, chain_digest, commitment, verify


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """A link as a store might give it."""

    seq: int
    at: float
    actor: str
    verb: str
    subject: str
    commitment: str
    chain: str
    salt: bytes | None
    detail: bytes | None


def make(count: int) -> list[Sealed]:
    """A good chain, made with nothing of ours but the formulas in docs/notes/events-and-sealing.md."""
    links, chain = [], "0" * 64
    for seq in range(1, count + 1):
        salt, detail = bytes([seq]) * 32, json.dumps({"n": seq}, separators=(",", ":")).encode()
        promise = hmac.new(salt, detail, hashlib.sha256).hexdigest()
        fields = [seq, 100.5, "user:é", "run.started", f"run:{seq}", promise]
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        chain = hashlib.sha256(bytes.fromhex(chain) + text).hexdigest()
        links.append(
            Sealed(
                seq=seq, at=100.5, actor="user:é", verb="run.started", subject=f"run:{seq}", commitment=promise,
                chain=chain, salt=salt, detail=detail,
            )
        )  # fmt: skip
    return links


def test_the_formulas_are_pinned() -> None:
    """Stored chains must verify for ever: these digests may never change."""
    first = make(1)[0]
    assert first.chain == "096a4a5f0f4b33de53b44dc1c26baea7d38b86458bee86d5ecd44b3d9d0d4f43"
    assert chain_digest(GENESIS, first) == first.chain
    assert commitment(b"\x01" * 32, b'{"n":1}') == first.commitment


@given(st.integers(0, 8))
def test_a_good_chain_verifies(count: int) -> None:
    links = make(count)
    head = (count, links[-1].chain if links else GENESIS)
    checked = verify(links, head=head)
    assert (checked.seq, checked.chain, checked.broken) == (*head, None)


ALTERED: dict[str, st.SearchStrategy[Any]] = {
    "at": st.floats(0, 1e9),
    "actor": st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
    "verb": st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
    "subject": st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
    "commitment": st.just("0" * 64),
    "chain": st.just("f" * 64),
    "salt": st.binary(max_size=32),
    "detail": st.binary(max_size=8),
}


@given(st.integers(1, 6), st.sampled_from(sorted(ALTERED)).flatmap(lambda f: st.tuples(st.just(f), ALTERED[f])))
def test_every_alteration_is_found_at_its_place(place: int, change: tuple[str, Any]) -> None:
    links = make(6)
    altered = msgspec.structs.replace(links[place - 1], **{change[0]: change[1]})
    if altered == links[place - 1]:
        return
    broken = verify([*links[: place - 1], altered, *links[place:]]).broken
    assert broken is not None
    assert broken.seq == place
    assert broken.problem == ("detail" if change[0] in ("salt", "detail") else "altered")


@given(st.permutations(range(6)), st.integers(0, 6))
def test_reordered_or_cut_chains_are_broken(order: list[int], kept: int) -> None:
    links = make(6)
    changed = [links[index] for index in order[:kept]]
    checked = verify(changed, head=(6, links[-1].chain))
    good = 0
    while good < kept and order[good] == good:
        good += 1
    assert checked.seq == good
    assert (checked.broken is None) == (changed == links)


def test_erased_details_are_counted_and_half_erased_ones_refused() -> None:
    links = make(3)
    links[1] = msgspec.structs.replace(links[1], salt=None, detail=None)
    assert verify(links).erased == 1
    assert verify(links).broken is None
    links[2] = msgspec.structs.replace(links[2], salt=None)
    broken = verify(links).broken
    assert broken is not None
    assert (broken.seq, broken.problem) == (3, "detail")
