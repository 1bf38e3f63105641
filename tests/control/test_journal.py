"""Transitions: allowed ones with their event, others refused, none after another driver's write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.control.journal import Journal
from millrace.core.clock import FakeClock
from millrace.core.errors import ConflictError, NotFoundError
from millrace.core.ports import Records, Transaction
from millrace.core.types import Run, Step
from millrace.store.records_sql import open_records


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    opened = open_records(tmp_path / "records.db")
    yield opened
    opened.close()


@pytest.fixture
def run(records: Records) -> Run:
    return records.put(Run(id="run1", created_at=1.0), expect_version=0)


@pytest.fixture
def journal(records: Records) -> Journal:
    return Journal(records, FakeClock())


def test_a_transition_is_stored_with_its_event(records: Records, journal: Journal, run: Run) -> None:
    step = journal.open_steps(run, [("data", "data")])["data"]
    journal.run(run.id, "running", started_at=5.0)
    running = journal.step(step, "running", attempt=1)
    done = journal.step(running, "succeeded", facts={"rows": 3})
    assert records.get(Step, step.id) == done
    assert (done.attempt, done.facts) == (1, {"rows": 3})
    records.seal()
    assert [event.verb for event in records.events()] == ["run.running", "step.running", "step.succeeded"]


def test_an_illegal_transition_changes_nothing(records: Records, journal: Journal, run: Run) -> None:
    step = journal.open_steps(run, [("data", "data")])["data"]
    with pytest.raises(ValueError, match="'pending' cannot become 'succeeded'"):
        journal.step(step, "succeeded")
    with pytest.raises(ValueError, match="'pending' cannot become 'succeeded'"):
        journal.run(run.id, "succeeded")
    assert records.get(Step, step.id) == step
    assert records.get(Run, run.id) == run
    assert records.seal() == 0


def test_another_drivers_write_is_a_conflict_and_nothing_of_this_one_stays(
    records: Records, journal: Journal, run: Run
) -> None:
    step = journal.open_steps(run, [("data", "data")])["data"]
    other = Journal(records, FakeClock()).step(step, "running")

    def commit(transaction: Transaction, changed: Step) -> Step:
        transaction.put(Run(id="beside"), expect_version=0)
        return changed

    with pytest.raises(ConflictError):
        journal.step(step, "running", commit)
    assert records.get(Step, step.id) == other
    assert records.get(Run, "beside") is None
    records.seal()
    assert [event.verb for event in records.events()] == ["step.running"]


def test_a_new_driver_resets_what_a_dead_one_left(records: Records, journal: Journal, run: Run) -> None:
    names = [("data", "data"), ("train", "train"), ("export", "export")]
    steps = journal.open_steps(run, names)
    done = journal.step(journal.step(steps["data"], "running"), "succeeded")
    journal.step(steps["train"], "running")
    again = journal.open_steps(run, names)
    assert again["data"] == done
    assert {name: step.state for name, step in again.items()} == {
        "data": "succeeded", "train": "pending", "export": "pending",
    }  # fmt: skip
    assert len(records.find(Step)) == 3


def test_a_deleted_run_is_not_found(journal: Journal) -> None:
    with pytest.raises(NotFoundError, match="run gone was deleted"):
        journal.run("gone", "running")
