"""Splits: exact counts, shares, classes, groups, time; seeded; stable when rows are appended."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import DataError, InputError
from millrace.core.spec import Split
from millrace.data.row_hash import row_hash
from millrace.data.split import Sizes, assign, by_group, by_quota, by_threshold, by_time, quotas, sizes


def hashes(rows: int, seed: int = 0) -> np.ndarray:
    return row_hash(pl.DataFrame({"k": range(rows)}), ["k"], seed)


@pytest.mark.parametrize(
    ("split", "rows", "want"),
    [
        (Split(), 30, (10, 5)),
        (Split(), 1797, (599, 180)),
        (Split(), 2000, (600, 200)),
        (Split(), 20_000, (4000, 2000)),
        (Split(test=600, validation=150), 1797, (600, 150)),
        (Split(test=0.25, validation="5%"), 1000, (250, 50)),
        (Split(test="100", validation="10 %"), 1000, (100, 100)),
    ],
)
def test_sizes(split, rows, want):
    assert sizes(split, rows)[:2] == want


@pytest.mark.parametrize("split", [Split(test=90, validation=10), Split(test=0), Split(test="many"), Split(test=1.5)])
def test_impossible_sizes(split):
    with pytest.raises((DataError, InputError)):
        sizes(split, 100)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=40, max_size=200), st.integers(10, 15), st.integers(5, 10), st.integers(0, 9)
)
def test_counts_are_exact_and_classes_present(labels, test, validation, seed):
    strata = np.array(labels)
    places = by_quota(hashes(len(labels), seed), strata, Sizes(test, validation, None, None))
    assert np.bincount(places, minlength=3).tolist() == [len(labels) - test - validation, validation, test]
    for code in set(labels):
        count = (strata == code).sum()
        tests = (places[strata == code] == 2).sum()
        assert (count < 2) or (1 <= tests < count)
        assert count < 20 or abs(tests - test * count / len(labels)) < 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 60))
def test_quotas_add_up_or_are_refused(counts, total):
    numbers = np.array(counts)
    room = np.maximum(numbers - 1, 0)
    try:
        shared = quotas(numbers, total, room)
    except DataError:
        assert total > room.sum() or total < np.minimum(room, 1).sum()
        return
    assert shared.sum() == total
    assert (shared <= room).all()
    assert (shared >= np.minimum(room, 1)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 300), st.integers(1, 200), st.integers(0, 5))
def test_shares_move_no_row_when_rows_are_appended(rows, more, seed):
    want = Sizes(0, 0, 0.3, 0.2)
    before, after = by_threshold(hashes(rows, seed), want), by_threshold(hashes(rows + more, seed), want)
    assert (after[:rows] == before).all()


def test_shares_through_the_stage_move_no_row(project):
    def placed(rows: int) -> dict[str, str]:
        project.write("t.csv", "id,a,y\n" + "".join(f"r{i},{i * 37 % 101},{'abc'[i % 3]}\n" for i in range(rows)))
        _, reader = project.run(split={"test": 0.2, "validation": 0.1, "key": "id"})
        return {
            key: split
            for split in reader.manifest.splits
            for key in reader.table(split, ["id"]).column("id").to_pylist()
        }

    before, after = placed(400), placed(700)
    assert {key: after[key] for key in before} == before
    assert 80 < sum(place == "test" for place in after.values()) < 200


def test_exact_counts_keep_nearly_every_row(project):
    def placed(rows: int) -> dict[str, str]:
        project.write("t.csv", "id,a,y\n" + "".join(f"r{i},{i * 37 % 101},{'abc'[i % 3]}\n" for i in range(rows)))
        _, reader = project.run(split={"test": 100, "validation": 50, "stratify": True, "key": "id"})
        assert reader.manifest.rows["test"] == 100
        return {
            key: split
            for split in reader.manifest.splits
            for key in reader.table(split, ["id"]).column("id").to_pylist()
        }

    before, after = placed(600), placed(630)
    assert sum(after[key] == place for key, place in before.items()) > 570
    assert all(after[key] == "train" for key, place in before.items() if place == "train")


def test_another_seed_another_split_and_the_same_seed_the_same():
    labels = np.arange(300) % 3
    first = assign(Sizes(60, 30, None, None), hashes(300, 0), labels, True)
    assert (first == assign(Sizes(60, 30, None, None), hashes(300, 0), labels, True)).all()
    assert (first != assign(Sizes(60, 30, None, None), hashes(300, 1), labels, True)).sum() > 50


def test_the_hash_is_pinned():
    """Splits of users' data must stay where they are in later versions."""
    frame = pl.DataFrame({"n": [1.0, None, -0.0], "t": ["a", "é", None], "b": [True, False, None]})
    assert [hex(int(value)) for value in row_hash(frame, ["n", "t", "b"], 7)] == PINNED


PINNED = ["0x67495be702f2a899", "0x70b8dcd9ac2f9bb7", "0xd2fc0e4c5760e7ae"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=30, max_size=120).filter(lambda g: len(set(g)) >= 3), st.booleans())
def test_groups_are_never_torn(groups, exact):
    numbers = np.array(groups)
    keys = row_hash(pl.DataFrame({"g": groups}), ["g"])
    want = Sizes(10, 5, None, None) if exact else Sizes(0, 0, 0.3, 0.2)
    places = by_group(keys, np.unique(numbers, return_inverse=True)[1], want)
    assert all(len(set(places[numbers == group].tolist())) == 1 for group in set(groups))
    assert set(places.tolist()) == {0, 1, 2}


@given(st.lists(st.integers(0, 50), min_size=10, max_size=60))
def test_time_puts_the_latest_last(times):
    values = np.array(times)
    places = by_time(values, Sizes(3, 2, None, None))
    assert (places == 2).sum() == 3
    assert (places == 1).sum() == 2
    assert values[places == 0].max() <= values[places == 1].min()
    assert values[places == 1].max() <= values[places == 2].min()


def test_time_and_group_through_the_stage(project):
    project.write(
        "t.csv", "day,who,a,y\n" + "".join(f"2024-{i % 12 + 1:02d}-01,u{i % 9},{i % 17},{i / 3}\n" for i in range(120))
    )
    facts, reader = project.run(split={"time": "day", "test": 20, "validation": 10})
    days = {split: reader.table(split, ["day"]).column("day").to_pylist() for split in facts["split"]}
    assert max(days["train"]) <= min(days["validation"])
    assert max(days["validation"]) <= min(days["test"])
    assert {column.name: column.role for column in reader.manifest.columns}["day"] == "time"
    _, reader = project.run(split={"group": "who", "test": 0.3, "validation": 0.2}, ignore=["day"])
    seen = [set(reader.table(split, ["who"]).column("who").to_pylist()) for split in ("train", "validation", "test")]
    assert sum(map(len, seen)) == 9


def test_time_of_text_and_missing_time(project):
    project.write("t.csv", "day,a,y\n" + "".join(f"{'x' if i % 2 else 'z'},{i % 17},{i / 3}\n" for i in range(60)))
    with pytest.raises(DataError, match="dates or numbers"):
        project.run(split={"time": "day"})
    project.write("t.csv", "day,a,y\n" + "".join(f"{'' if i == 5 else i},{i % 17},{i / 3}\n" for i in range(60)))
    assert project.run(split={"time": "day"})[0]["rejected_by_reason"] == {"missing": 1}


def test_equal_rows_stay_together_or_are_counted(project):
    lines = [f"{i * 1.5},{i * 7 % 5},{'ab'[i % 2]}\n" for i in range(100)]
    project.write("t.csv", "a,b,y\n" + "".join(lines + lines[:40]))
    assert project.run(split={"test": 0.3, "validation": 0.2})[0]["warnings"] == []
    project.write("t.csv", "a,b,y\n" + "".join(f"{i % 3},{i % 2},{'ab'[i % 2]}\n" for i in range(120)))
    facts, _ = project.run(split={"test": 0.3, "validation": 0.2})
    assert any("same features as a training row" in warning for warning in facts["warnings"])
    assert 20 < facts["split"]["test"] < 55


def test_a_class_missing_in_the_test_split(project):
    project.write("t.csv", "t,a,y\n" + "".join(f"{i},{i % 17},{'b' if i < 5 else 'ac'[i % 2]}\n" for i in range(60)))
    with pytest.raises(DataError, match=r"class 'b' \(5 rows, first t.csv row 1\) is missing in the test split"):
        project.run(split={"time": "t", "test": 10, "validation": 10})
