"""Runs of a user's own script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.control.dispatch import Dispatcher
from millrace.core.errors import InputError, NotFoundError
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
