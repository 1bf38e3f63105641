"""What runs log and how they are searched, on both databases."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from millrace.core.search import RunValues
from millrace.core.types import MetricPoint, Run
from millrace.store import migrate
from millrace.store.records_sql import SqlRecords, open_records
from millrace.testing.postgres import STORES, open_place
from millrace.testing.tracking import TrackingConformance, add, log


class TestTrackingOnSqlite(TrackingConformance):
    """The suite on SQLite."""

    def open(self, place: Path) -> SqlRecords:
        return open_records(place / "records.db")


class TestTrackingOnPostgres(TrackingConformance):
    """The same on Postgres."""

    @pytest.fixture(autouse=True)
    def places(self) -> None:
        """A database for each folder that the suite opens."""
        self.urls: dict[Path, str] = {}

    def open(self, place: Path) -> SqlRecords:
        if place not in self.urls:
            self.urls[place] = STORES["postgres"](place)
        return open_place(self.urls[place])


def test_values_of_an_older_home_are_found_after_migration(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    migrate.upgrade(path, "0001")
    body = {
        "id": "r", "state": "succeeded", "started_at": 5.0, "ended_at": 6.5,
        "facts": {"params": {"lr": 0.1, "note": "a", "bad\0": 1}}, "tags": {"who": "me", "source": "track"},
    }  # fmt: skip
    points = [
        ("r", "loss", 0, 9.0, 3.0),
        ("r", "loss", 1, None, 2.0),
        ("r", "loss", 1, 4.0, 2.0),
        ("r", "acc", 0, None, 1.0),
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO runs (id, project, created_at, version, name, state, spec_path, body)"
            " VALUES (?, 'default', 0.0, 1, '', 'succeeded', '', ?)",
            [("r", msgspec.json.encode(body).decode()), *((f"p{n}", f'{{"id": "p{n}"}}') for n in range(1200))],
        )
        connection.executemany("INSERT INTO metrics (run_id, name, step, value, at) VALUES (?, ?, ?, ?, ?)", points)
    records = open_records(path)
    found = records.run_values(["r"])["r"]
    assert (found.params, found.tags) == ({"lr": "0.1", "note": "a"}, {"who": "me"})
    assert found.metrics["loss"] == MetricPoint("r", "loss", 1, 4.0, 2.0)
    assert repr(found.metrics["acc"].value) == "nan"
    assert [run.id for run in records.find(Run, {"started_at": 5.0, "ended_at": 6.5})] == ["r"]
    log(records, "r", params={"lr": "0.1"}, points=[MetricPoint("r", "loss", 0, 1.0, 9.0)])
    assert records.run_values(["r"])["r"].metrics["loss"].step == 1
    records.close()


@pytest.mark.parametrize("store", STORES)
def test_many_runs_at_once_are_one_question_per_table(store: str, tmp_path: Path) -> None:
    """More than a statement may have parameters."""
    records = open_place(STORES[store](tmp_path))
    add(records, "r", {"loss": 1.0}, params={"a": "1"}, tags={"b": "2"})
    found = records.run_values([*(f"none{number}" for number in range(70_000)), "r"])
    assert found.pop("r").params == {"a": "1"}
    assert len(found) == 70_000
    assert set(map(repr, found.values())) == {repr(RunValues())}
    records.close()
