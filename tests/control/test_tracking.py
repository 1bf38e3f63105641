"""Runs of a user's own script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.control.dispatch import Dispatcher
from millrace.control.runs import find_run
from millrace.core.errors import InputError, NotFoundError
from millrace.core.types import Run
from millrace.store.records_sql import SqlRecords
from millrace.wiring import open_transport


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_transport(str(tmp_path / "home"))
    yield opened
    opened.close()


def test_parameters_artifacts_and_the_end_are_kept(transport: Dispatcher, tmp_path: Path) -> None:
    run = transport.call("run.track", {"name": "script", "params": {"lr": 0.1}})
    transport.call("run.log", {"run": run.id, "params": {"depth": 3}, "tags": {"who": "me"}})
    for name in ("weights.bin", "notes.txt"):
        (tmp_path / name).write_text(name)
        transport.call("run.artifact", {"run": run.id, "name": name, "path": str(tmp_path / name)})
    transport.call("run.log", {"run": run.id, "params": {"depth": 4}, "points": [[run.id, "loss", 1, 0.5, 2.0]]})
    assert transport.call("run.end", {"run": run.id, "state": "succeeded"}).tags == {"source": "track"}
    view = transport.call("run.get", {"run": run.id})
    assert view.values.params == {"lr": "0.1", "depth": "4"}
    assert view.values.tags == {"who": "me"}
    assert view.values.metrics["loss"].value == 0.5
    (step,) = view.steps
    assert set(step.outputs) == {"weights.bin", "notes.txt"}


def test_what_is_not_there_is_named(transport: Dispatcher) -> None:
    run = transport.call("run.track", {"name": "script"})
    with pytest.raises(NotFoundError, match="there is no file or folder /nothing/here"):
        transport.call("run.artifact", {"run": run.id, "name": "x", "path": "/nothing/here"})
    with pytest.raises(InputError, match="got 'flying'"):
        transport.call("run.end", {"run": run.id, "state": "flying"})


def test_a_run_is_found_by_its_name_or_the_beginning_of_its_id(
    transport: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = transport.services.records
    for at, (id, name) in enumerate(
        (("ab12", "first"), ("ab34", "twice"), ("b1", "twice"), ("feed1", ""), ("c", "feed"))
    ):
        records.put(Run(id=id, name=name, created_at=at + 1.0, deleted_at=9.0 if id == "b1" else None))
    # One question to an index, whatever the number of runs: none of this may load them all.
    monkeypatch.setattr(SqlRecords, "find", lambda *given, **more: pytest.fail("it loads runs"))
    expected = {"ab12": "ab12", "ab3": "ab34", "twice": "b1", "feed": "c", "feed1": "feed1", "fee": "feed1", "b": "b1"}
    assert {text: find_run(transport.services, text).id for text in expected} == expected
    with pytest.raises(NotFoundError, match="more than one run with the id 'ab'"):
        find_run(transport.services, "ab")
    for text in ("nothing", "ab1234", "%", "", "a\0", "\ud800"):
        with pytest.raises(NotFoundError, match="no run with the id"):
            find_run(transport.services, text)
