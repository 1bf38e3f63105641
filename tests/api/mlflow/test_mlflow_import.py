"""`millrace import mlflow` of folders: what a store has is here afterwards; the rest is named."""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.control.mlflow_import import verbs
from millrace.core.errors import InputError, NotFoundError, UnavailableError
from millrace.core.operations.imports import ImportRequest
from millrace.core.types import Project, Run
from millrace.formats.mlflow.source import is_plain_path
from millrace.wiring import open_dispatcher

sys.path.insert(0, str(Path(__file__).parent))

from import_stores import (
    FIRST,
    MODEL,
    SECOND,
    START_MS,
    THIRD,
    Reader,
    bring,
    version_files,
    write,
    write_run,
    write_store,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "mlruns")


# --------------------------------------------------------------------------- folders


def test_a_file_store_comes_over_whole(api: Any, store: Path) -> None:
    counts, problems = bring(api, store)
    assert problems == ["files of version 4 of model 'net': none are here; its source is s3://elsewhere/model"]
    assert (counts["experiments"], counts["runs"], counts["logged models"], counts["files"]) == (3, 3, 1, 4)
    assert (counts["models"], counts["versions"], counts["aliases"], counts["points"]) == (2, 4, 1, 24)
    here = Reader(api.http).everything()
    one = here["experiments"]["a b/c"]
    assert (one["stage"], one["tags"], one["created"]) == ("active", {"team": "eyes"}, START_MS)
    run = one["runs"][FIRST]
    assert run["info"] == {"run_name": "one", "user_id": "ann", "status": "FINISHED", "start_time": START_MS,
                           "end_time": START_MS + 1500, "lifecycle_stage": "active"}  # fmt: skip
    assert run["params"] == {"lr": "0.1", "note": "two\nlines\n"}
    assert run["tags"] == {"mlflow.runName": "one", "kind": "demo"}
    assert len(run["metrics"]["train/loss"]) == 20
    assert run["latest"]["odd"] == "-inf"
    assert run["metrics"]["on"] == [(START_MS, "0.5", 4)]
    assert run["outputs"] == [(MODEL, 7)]
    assert run["inputs"][0][0][0]["name"] == "iris"
    assert run["files"] == {
        "model/MLmodel": b"flavors: {}\n",
        "model/model.pkl": b"\x80\x04never loaded",
        "empty.txt": b"",
    }
    killed = here["experiments"]["Default"]["runs"][SECOND]["info"]
    assert (killed["status"], killed["lifecycle_stage"]) == ("KILLED", "deleted")
    assert here["experiments"]["gone"]["stage"] == "deleted"
    assert here["experiments"]["gone"]["runs"][THIRD]["info"]["lifecycle_stage"] == "deleted"
    model = one["models"][MODEL]
    assert model["info"]["status"] == "LOGGED_MODEL_READY"
    assert [metric[:2] for metric in model["metrics"]] == [("acc", "0.8"), ("acc", "0.9")]


def test_the_registry_keeps_numbers_stages_aliases_and_files(api: Any, store: Path) -> None:
    bring(api, store)
    net = Reader(api.http).everything()["models"]["net"]
    assert set(net["versions"]) == {"1", "3", "4"}
    assert net["versions"]["1"][0]["current_stage"] == "Production"
    assert (net["aliases"], net["tags"], net["description"]) == ([("champion", "3")], {"a": "b"}, "a net")
    assert version_files(api, "net", 1)["MLmodel"] == b"flavors: {}\n"
    assert version_files(api, "net", 3) == {"MLmodel": b"flavors: {net: {}}\n"}
    assert version_files(api, "copy", 1) == version_files(api, "net", 1)
    source = api.get("/model-versions/get", name="net", version="1")["model_version"]["source"]
    project = api.get("/experiments/get-by-name", experiment_name="a b/c")["experiment"]["experiment_id"]
    assert source == f"mlflow-artifacts:/{project}/{FIRST}/artifacts/model"
    made = api.post("/model-versions/create", name="net", source="s3://x/y")["model_version"]["version"]
    assert made == "6"  # 5 was deleted there: its number is not used again


def test_a_second_import_adds_nothing(api: Any, store: Path) -> None:
    bring(api, store)
    before = Reader(api.http).everything()
    counts, _ = bring(api, store)
    assert counts["runs here already"] == 3
    assert not {"runs", "runs completed", "logged models", "models", "versions", "aliases", "files"} & set(counts)
    assert Reader(api.http).everything() == before


def test_a_run_that_goes_on_is_completed_and_what_was_changed_here_stays(api: Any, store: Path) -> None:
    run = write_run(store / "77" / ("e" * 32), status=1, end_time=None)
    write(run / "metrics/loss", f"{START_MS} 1.0 0\n")
    bring(api, store)
    api.post("/runs/set-tag", run_id=run.name, key="mine", value="kept")
    api.post("/experiments/set-experiment-tag", experiment_id="0", key="mine", value="kept")
    write(run / "metrics/loss", f"{START_MS} 1.0 0\n{START_MS + 9} 0.5 1\n")
    write(run / "artifacts/late.txt", "late")
    write(run / "tags/mine", "theirs")
    write_run(run, status=4, end_time=START_MS + 10)
    counts, _ = bring(api, store)
    assert (counts["runs completed"], counts["files"]) == (1, 1)
    found = Reader(api.http).everything()["experiments"]["a b/c"]["runs"][run.name]
    assert (found["info"]["status"], found["info"]["end_time"]) == ("FAILED", START_MS + 10)
    assert len(found["metrics"]["loss"]) == 2
    assert found["files"] == {"late.txt": b"late"}
    assert found["tags"]["mine"] == "kept"
    assert bring(api, store)[0]["runs here already"] == 4


def test_what_is_broken_is_named_and_the_rest_comes(api: Any, store: Path) -> None:
    write(store / "77" / ("1" * 32) / "meta.yaml", "a: [unclosed")
    (store / "77" / ("2" * 32)).mkdir()
    write_run(store / "77" / ("3" * 32), status=9)
    write_run(store / "77" / "not-hexadecimal")
    write_run(store / "77" / ("4" * 32), run_id=FIRST)
    write(store / "99/meta.yaml", "just text")
    write_run(store / "77" / ("9" * 32), run_name="a\0b")
    write(store / "77" / ("0" * 32) / "meta.yaml", 'run_name: "\\ud800"')
    write(store / "77" / FIRST / "metrics/bad", f"{START_MS} 1 0\nnonsense\n{START_MS} x 0\n{START_MS} 1 {2**70}\n")
    write(store / "77" / FIRST / "params/binary", b"\xff\xfe")
    write(store / "models/net/version-7/meta.yaml", {"name": "net"})
    counts, problems = bring(api, store)
    for part in (
        "1" * 32,
        "2" * 32,
        "3" * 32,
        "not-hexadecimal",
        "4" * 32,
        "9" * 32,
        "0" * 32,
        "experiment 99",
        "'binary'",
        "version-7",
    ):
        assert [one for one in problems if part in one], (part, problems)
    assert [one.partition(":")[0].rpartition(" ")[2] for one in problems if "metric 'bad'" in one] == ["2", "3", "4"]
    assert counts["problems"] == len(problems)
    assert counts["runs"] == 3
    run = Reader(api.http).everything()["experiments"]["a b/c"]["runs"][FIRST]
    assert run["metrics"]["bad"] == [(START_MS, "1.0", 0)]
    assert "binary" not in run["params"]


def test_links_and_files_outside_are_not_read(api: Any, store: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret/meta.yaml", {"experiment_id": "5", "name": "secret"})
    write(tmp_path / "secret/key", "secret")
    run = store / "77" / FIRST
    (run / "artifacts/link.txt").symlink_to(tmp_path / "secret/key")
    (run / "artifacts/folder").symlink_to(tmp_path / "secret")
    (run / "params/link").symlink_to(tmp_path / "secret/key")
    (run / "metrics/link").symlink_to(tmp_path / "secret/key")
    os.mkfifo(run / "tags/pipe")
    (store / "66").symlink_to(tmp_path / "secret")
    (store / "77" / ("5" * 32)).symlink_to(run)
    outside = write_run(store / "77" / ("6" * 32), artifact_uri=f"file://{tmp_path}/secret")
    climbing = write_run(store / "77" / ("7" * 32), artifact_uri=f"file://{store}/../secret")
    (store / "inner").symlink_to(tmp_path / "secret")
    linked = write_run(store / "77" / ("8" * 32), artifact_uri=f"file://{store}/inner")
    _, problems = bring(api, store)
    named = ("'link.txt'", "'folder'", "parameter 'link'", "metric 'link'", "tag 'pipe'", "experiment 66", "5" * 32,
             outside.name, climbing.name, linked.name)  # fmt: skip
    for part in named:
        assert [one for one in problems if part in one], (part, problems)
    here = Reader(api.http).everything()
    assert "secret" not in here["experiments"]
    found = json.dumps(here, default=str)
    assert "'secret'" not in found
    assert '"secret"' not in found
    for run_id in (outside.name, climbing.name, linked.name):
        assert here["experiments"]["a b/c"]["runs"][run_id]["files"] == {}


def test_files_that_a_server_kept_elsewhere_are_found(api: Any, store: Path, tmp_path: Path) -> None:
    run = write_run(store / "77" / ("6" * 32), artifact_uri=f"mlflow-artifacts:/77/{'6' * 32}/artifacts")
    write(tmp_path / "mlartifacts/77" / run.name / "artifacts/a/b.txt", "kept")
    _, problems = bring(api, store, dry_run=False)
    assert [one for one in problems if run.name in one]
    counts, problems = bring(api, store, artifacts=str(tmp_path / "mlartifacts"))
    assert (counts["runs completed"], counts["files"]) == (1, 1)
    assert not [one for one in problems if run.name in one]


def test_a_moved_store_and_chosen_experiments(api: Any, store: Path, tmp_path: Path) -> None:
    moved = store.rename(tmp_path / "moved")
    counts, problems = bring(api, moved, experiments=["a b/c"])
    assert (counts["experiments"], counts["runs"], counts["files"]) == (1, 1, 4)
    assert len(problems) == 1
    with pytest.raises(NotFoundError, match="no experiment 'absent'"):
        bring(api, moved, experiments=["absent"])


def test_a_dry_run_writes_nothing(api: Any, store: Path) -> None:
    counts, _ = bring(api, store, dry_run=True)
    assert (counts["runs"], counts["versions"], counts["logged models"]) == (3, 4, 1)
    assert api.services.records.find(Run) == []
    assert api.services.records.find(Project) == []


def test_what_is_here_under_the_same_name_is_left_alone(api: Any, store: Path) -> None:
    api.post("/registered-models/create", name="net")
    api.post("/model-versions/create", name="net", source="s3://mine/model")
    api.post("/registered-models/alias", name="net", alias="champion", version="1")
    _, problems = bring(api, store)
    assert [one for one in problems if "another version has this number" in one]
    assert [one for one in problems if "alias 'champion'" in one]
    assert api.get("/model-versions/get", name="net", version="1")["model_version"]["source"] == "s3://mine/model"


def test_sources_that_are_none(api: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no folder"):
        bring(api, tmp_path / "absent")
    for odd in ("a" * 5000, "nul\0", "."):
        with pytest.raises((NotFoundError, InputError)):
            bring(api, odd)
    for odd in ("http://", "http://a:b", "http://\0"):
        with pytest.raises(InputError, match="want the URL"):
            bring(api, odd)
    with pytest.raises(InputError, match="no file store"):
        bring(api, tmp_path)
    with pytest.raises(InputError, match="got postgresql://") as refused:
        bring(api, "postgresql://ann:secret@host/mlflow")
    assert "secret" not in str(refused.value)
    assert "mlflow server --backend-store-uri" in refused.value.hint
    with pytest.raises(NotFoundError, match="there is no file"):
        bring(api, f"sqlite:///{tmp_path}/absent.db")
    write(tmp_path / "text.db", "no database, and longer than a header would be" * 100)
    with pytest.raises(InputError, match="cannot be read: file is not a database"):
        bring(api, tmp_path / "text.db")
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(InputError, match="no store of MLflow"):
        bring(api, f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(InputError, match="password"):
        bring(api, "http://ann:secret@127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match="does not answer"):
        bring(api, f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match="cannot be read"):
        bring(api, f"{str(api.http.base_url).rstrip('/')}/elsewhere")


def test_the_command_prints_counts_and_problems(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> Any:
        session = Session(lambda home, embedded: open_dispatcher(str(tmp_path / "home")))
        return CliRunner().invoke(cli, ["import", "mlflow", *words], obj=session, prog_name="millrace")

    monkeypatch.delenv("MILLRACE_URL", raising=False)
    done = run(str(store), "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["counts"]["runs"] == 3
    assert len(told["problems"]) == 1
    done = run(str(store))
    assert "a b/c: 1 logged models here already, 1 runs here already" in done.stdout
    assert "not brought over  files of version 4" in done.stderr
    monkeypatch.setenv("MILLRACE_URL", "http://127.0.0.1:1")
    refused = run(str(store))
    assert refused.exit_code == 2
    assert "cannot read the folder" in refused.stderr


# --------------------------------------------------------------------------- properties


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=("Cs",)), max_size=30)))
def test_every_line_of_a_metric_is_a_point_or_a_problem(
    lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("lines")
    write(root / "1/meta.yaml", {"name": "one"})
    write(write_run(root / "1" / FIRST) / "metrics/m", "\n".join([*lines, f"{START_MS} 2 1"]).encode())
    source = verbs.open_source(ImportRequest(source=str(root)))
    points = [
        point for found in source.runs(next(source.experiments())) for some in source.points(found) for point in some
    ]
    told = [line for line in lines if line.encode().decode("utf-8", "replace").split()]
    assert len(points) + source.problems.count == len(told) + 1
    assert points[-1].value == 2
    assert all(math.isfinite(point.at) for point in points)


@given(st.text(max_size=40))
def test_a_plain_path_stays_below_its_folder(text: str) -> None:
    if is_plain_path(text):
        below = os.path.normpath(os.path.join("/store", text))
        assert below.startswith("/store/")
        assert below == f"/store/{text}"
