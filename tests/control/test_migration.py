"""`system migrate`: everything to Postgres and an object store, and back, compared by digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.core.errors import ConflictError, InputError
from millrace.core.types import MetricPoint, Run
from millrace.store.transfer import records_digest
from millrace.testing.postgres import new_records_url
from millrace.wiring import open_dispatcher

pytestmark = pytest.mark.xdist_group("postgres")


def test_there_and_back_gives_the_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, url, bucket = tmp_path / "home", new_records_url(), f"file://{tmp_path}/bucket"
    (tmp_path / "bucket").mkdir()
    here = open_dispatcher(str(home))
    run = here.call("run.track", {"name": "kept", "params": {"lr": 0.1}})
    here.call("run.log", {"run": run.id, "points": [MetricPoint(run.id, "loss", 1, 0.5, 1.0)], "tags": {"a": "b"}})
    (tmp_path / "weights").write_bytes(b"weights")
    step = here.call("run.artifact", {"run": run.id, "name": "w", "path": str(tmp_path / "weights")})
    here.call("run.end", {"run": run.id})
    there = here.call("system.migrate", {"records_to": url, "blobs_to": bucket})
    assert there.rows > 5
    assert there.blobs == 1
    assert url not in there.next
    with pytest.raises(InputError, match="not empty"):
        here.call("system.migrate", {"records_to": url})
    here.services.records.seal()
    assert records_digest(here.services.records) == there.digest  # type: ignore[arg-type]
    here.close()

    monkeypatch.setenv("MILLRACE_RECORDS_URL", url)
    monkeypatch.setenv("MILLRACE_BLOBS_URL", bucket)
    other = open_dispatcher(str(tmp_path / "other"))
    view = other.call("run.get", {"run": "kept"})
    assert view.values.params == {"lr": "0.1"}
    assert other.services.blobs.read(step.outputs["w"].digest) == b"weights"
    back = other.call("system.migrate", {"records_to": "home", "blobs_to": "home"})
    assert back.digest == records_digest(other.services.records)  # type: ignore[arg-type]
    assert back.rows >= there.rows  # the other home may have published its key there
    other.close()

    monkeypatch.delenv("MILLRACE_RECORDS_URL")
    monkeypatch.delenv("MILLRACE_BLOBS_URL")
    again = open_dispatcher(str(tmp_path / "other"))
    assert again.call("run.get", {"run": "kept"}).run == view.run
    assert again.services.blobs.read(step.outputs["w"].digest) == b"weights"
    again.close()


def test_nothing_is_migrated_while_a_run_goes_on_or_nowhere(tmp_path: Path) -> None:
    here = open_dispatcher(str(tmp_path / "home"))
    with pytest.raises(InputError, match="records-to"):
        here.call("system.migrate", {})
    here.services.records.put(Run(id="r", state="running"))
    with pytest.raises(ConflictError, match="running"):
        here.call("system.migrate", {"records_to": "home"})
    here.close()
