"""Endpoints with several revisions: how requests are divided, and that a change of them drops none."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import NotFoundError, UnavailableError
from millrace.serve.dataplane import DataPlane, ModelInfo
from millrace.serve.revisions import Directory, Revision, Revisions, share_of


class FakePlane:
    """The name of a plane; nothing here is asked to run."""

    def __init__(self, version: str) -> None:
        self.info = ModelInfo(name="m", version=version)
        self.is_ready = True


def plane(version: str) -> DataPlane:
    return FakePlane(version)  # type: ignore[return-value]


def versions(endpoint: Revisions, keys: int) -> Counter[str]:
    return Counter(endpoint.pick(b"user-%d" % number).info.version for number in range(keys))


def test_keys_are_divided_as_the_weights_say_and_stick() -> None:
    endpoint = Revisions("m", [Revision(plane("1"), 90), Revision(plane("2"), 10)])
    found = versions(endpoint, 20_000)
    assert 0.09 < found["2"] / 20_000 < 0.11
    assert versions(endpoint, 20_000) == found
    assert {endpoint.pick(b"one").info.version for _ in range(100)} in ({"1"}, {"2"})


def test_without_keys_chance_decides_as_the_weights_say() -> None:
    endpoint = Revisions("m", [Revision(plane("1"), 3), Revision(plane("2"), 1)])
    found = Counter(endpoint.pick().info.version for _ in range(20_000))
    assert 0.23 < found["2"] / 20_000 < 0.27


def test_a_growing_weight_only_moves_keys_to_the_one_that_grows() -> None:
    """A user who was answered by the candidate stays with it while the rollout goes on."""
    base, candidate = plane("1"), plane("2")
    small = Revisions("m", [Revision(candidate, 1), Revision(base, 9)])
    large = Revisions("m", [Revision(candidate, 5), Revision(base, 5)])
    keys = [b"k%d" % number for number in range(2000)]
    stayed = [large.pick(key) is candidate for key in keys if small.pick(key) is candidate]
    assert stayed
    assert all(stayed)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=5), st.binary())
def test_every_key_has_a_place(weights: list[float], key: bytes) -> None:
    endpoint = Revisions("m", [Revision(plane(str(n)), weight) for n, weight in enumerate(weights)])
    assert endpoint.pick(key) in endpoint.planes
    assert 0 <= share_of(key) < 1


def test_what_has_no_weight_is_reached_by_its_version_alone() -> None:
    endpoint = Revisions("m", [Revision(plane("1")), Revision(plane("2"), 0), Revision(plane("3"), 5, is_shadow=True)])
    assert versions(endpoint, 500) == {"1": 500}
    assert endpoint.is_single
    assert endpoint.at("2").info.version == "2"
    with pytest.raises(NotFoundError, match="has no version '9' here: want '1', '2', '3'"):
        endpoint.at("9")


def test_a_directory_says_what_is_not_served_and_why() -> None:
    directory = Directory()
    with pytest.raises(UnavailableError, match="it is just starting"):
        directory.find("m")
    directory.is_told = True
    with pytest.raises(NotFoundError, match="want one of none"):
        directory.find("m")
    directory.excuse("m", "it is being loaded")
    with pytest.raises(UnavailableError, match="it is being loaded"):
        directory.find("m")
    old, new = plane("1"), plane("2")
    assert directory.put("m", [Revision(old)]) == []
    assert directory.put("m", [Revision(old, 1), Revision(new, 1)]) == []
    assert directory.put("m", [Revision(new)]) == [old]
    assert directory.remove("m") == [new]
