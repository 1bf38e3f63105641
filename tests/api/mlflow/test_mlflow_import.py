"""`millrace import mlflow`: what a store has is here afterwards, as MLflow's own API says; the rest is named."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.client.http import HttpTransport
from millrace.control.mlflow_import import verbs
from millrace.core.errors import InputError, NotFoundError, UnavailableError
from millrace.core.operations.imports import ImportRequest
from millrace.core.types import ArtifactFile, Project, Run
from millrace.formats.mlflow.source import is_plain_path
from millrace.testing.postgres import new_records_url
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

STORY = Path(__file__).with_name("stories") / "make_store.py"
API = "/api/2.0/mlflow"
FIRST, SECOND, THIRD = "a" * 32, "b" * 32, "c" * 32
MODEL = "m-" + "d" * 32
START_MS = 1_700_000_000_123


# --------------------------------------------------------------------------- a store by hand


def write(path: Path, content: Any) -> None:
    """A text or binary file, or YAML of anything else, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")


def write_run(folder: Path, **changes: Any) -> Path:
    """A run as the file store has it."""
    meta = {
        "artifact_uri": f"file://{folder}/artifacts", "end_time": START_MS + 1500, "entry_point_name": "",
        "experiment_id": folder.parent.name, "lifecycle_stage": "active", "run_id": folder.name, "run_name": "one",
        "source_name": "", "source_type": 4, "start_time": START_MS, "status": 3, "tags": [], "user_id": "ann",
    }  # fmt: skip
    write(folder / "meta.yaml", {**meta, **changes})
    for name in ("metrics", "params", "tags", "artifacts"):
        (folder / name).mkdir(exist_ok=True)
    return folder


def write_store(root: Path) -> Path:
    """Two experiments, one in the trash; three runs; a logged model; a registry."""
    stage = {"creation_time": START_MS, "last_update_time": START_MS + 1, "lifecycle_stage": "active"}
    write(root / "0/meta.yaml", {**stage, "experiment_id": "0", "name": "Default"})
    write(root / "77/meta.yaml", {**stage, "experiment_id": "77", "name": "a b/c"})
    write(root / "77/tags/team", "eyes")
    write(root / ".trash/88/meta.yaml", {**stage, "experiment_id": "88", "name": "gone", "lifecycle_stage": "deleted"})
    first = write_run(root / "77" / FIRST)
    write(first / "params/lr", "0.1")
    write(first / "params/note", "two\nlines\n")
    write(first / "tags/mlflow.runName", "one")
    write(first / "tags/kind", "demo")
    write(first / "metrics/train/loss", "".join(f"{START_MS + i} {1 / (i + 1)} {i}\n" for i in range(20)))
    write(first / "metrics/odd", f"{START_MS} nan 0\n{START_MS + 1} -inf 1\n{START_MS + 2} 3.5\n")
    write(first / "metrics/on", f"{START_MS} 0.5 4 iris d1\n")
    write(first / "artifacts/model/MLmodel", "flavors: {}\n")
    write(first / "artifacts/model/model.pkl", b"\x80\x04never loaded")
    write(first / "artifacts/empty.txt", "")
    source = '{"url": "http://example.org/a"}'
    write(root / "77/datasets/e1/meta.yaml", {"digest": "d1", "name": "iris", "source": source, "source_type": "http"})
    write(
        first / "inputs/i1/meta.yaml",
        {"source_type": "DATASET", "source_id": "e1", "tags": {"mlflow.data.context": "x"}},
    )
    write(first / f"outputs/{MODEL}/meta.yaml", {"source_id": MODEL, "step": 7})
    write_run(root / "0" / SECOND, status=5, lifecycle_stage="deleted", run_name="killed")
    write_run(root / "88" / THIRD).rename(root / ".trash/88" / THIRD)
    shutil.rmtree(root / "88")
    made = {"creation_timestamp": START_MS, "last_updated_timestamp": START_MS + 2}
    write(
        root / f"77/models/{MODEL}/meta.yaml",
        {**made, "model_id": MODEL, "name": "net", "source_run_id": FIRST, "status": 2},
    )
    write(root / f"77/models/{MODEL}/metrics/acc", f"{START_MS} 0.9 1 {FIRST}\n{START_MS} 0.8 1 {FIRST} iris d1\n")
    write(root / f"77/models/{MODEL}/params/depth", "3")
    write(root / f"77/models/{MODEL}/artifacts/MLmodel", "flavors: {net: {}}\n")
    write(root / "models/net/meta.yaml", {**made, "name": "net", "description": "a net", "aliases": {"champion": "3"}})
    write(root / "models/net/tags/a", "b")
    base = {**made, "name": "net", "status": "READY", "current_stage": "None", "run_id": FIRST}
    for number, source, changes in (
        (1, f"file:///old/place/77/{FIRST}/artifacts/model", {"current_stage": "Production", "description": "v1"}),
        (3, f"models:/{MODEL}", {"model_id": MODEL}),
        (4, "s3://elsewhere/model", {}),
        (5, "models:/net/1", {"current_stage": "Deleted_Internal"}),
    ):
        write(root / f"models/net/version-{number}/meta.yaml", {**base, "version": number, "source": source, **changes})
    write(root / "models/copy/meta.yaml", {**made, "name": "copy"})
    write(root / "models/copy/version-1/meta.yaml", {**base, "name": "copy", "version": 1, "source": "models:/net/1"})
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "mlruns")


def bring(api: Any, source: object, **fields: Any) -> tuple[dict[str, int], list[str]]:
    """Import; the counts and the problems."""
    events = list(api.dispatcher.stream("system.import_mlflow", {"source": str(source), **fields}))
    assert events[-1].kind == "done"
    return events[-1].counts, [event.text for event in events if event.kind == "problem"]


# --------------------------------------------------------------------------- what MLflow's API says


class Reader:
    """What a server of MLflow's API has, in a form that is equal for equal stores."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def ask(self, method: str, path: str, /, **fields: Any) -> Any:
        named = {"params": fields} if method == "GET" else {"json": fields}
        answer = self.http.request(method, API + path, **named)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def everything(self) -> dict[str, Any]:
        found = self.ask("POST", "/experiments/search", view_type="ALL", max_results=1000)["experiments"]
        models = self.ask("GET", "/registered-models/search", max_results=1000).get("registered_models", [])
        return {
            "experiments": {one["name"]: self.experiment(one) for one in found},
            "models": {one["name"]: self.model(one) for one in models},
        }

    def experiment(self, one: dict[str, Any]) -> Any:
        ids = [one["experiment_id"]]
        runs = self.ask("POST", "/runs/search", experiment_ids=ids, run_view_type="ALL", max_results=1000).get(
            "runs", []
        )
        models = self.ask("POST", "/logged-models/search", experiment_ids=ids).get("models", [])
        return {
            "stage": one["lifecycle_stage"], "tags": pairs(one), "created": one["creation_time"],
            "runs": {run["info"]["run_id"]: self.run(run) for run in runs},
            "models": {model["info"]["model_id"]: self.logged_model(model) for model in models},
        }  # fmt: skip

    def run(self, run: dict[str, Any]) -> Any:
        info, data = run["info"], run["data"]
        kept = ("run_name", "user_id", "status", "start_time", "end_time", "lifecycle_stage")
        names = {metric["key"] for metric in data.get("metrics", ())}
        outputs = [
            (one["model_id"], int(one.get("step", 0))) for one in run.get("outputs", {}).get("model_outputs", ())
        ]
        inputs = run.get("inputs", {})
        datasets = [(one["dataset"], pairs(one)) for one in inputs.get("dataset_inputs", ())]
        return {
            "info": {name: info[name] for name in kept if name in info},
            "params": pairs(data, "params"),
            "tags": {"mlflow.runName": info.get("run_name"), **pairs(data)},
            "metrics": {name: self.history(info["run_id"], name) for name in names},
            "latest": {one["key"]: number(one) for one in data.get("metrics", ())},
            "outputs": sorted(outputs),
            "inputs": (datasets, [one["model_id"] for one in inputs.get("model_inputs", ())]),
            "files": self.files("/artifacts/list", {"run_id": info["run_id"]}, "path", lambda path: self.http.get(
                "/get-artifact", params={"run_id": info["run_id"], "path": path})),
        }  # fmt: skip

    def history(self, run_id: str, name: str) -> Any:
        found = self.ask("GET", "/metrics/get-history", run_id=run_id, metric_key=name, max_results=25_000)
        return sorted({(one["timestamp"], number(one), one.get("step", 0)) for one in found["metrics"]}, key=str)

    def files(self, path: str, query: dict[str, Any], field: str, get: Callable[[str], httpx.Response]) -> Any:
        """The bytes of files by path."""
        found: dict[str, bytes] = {}
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            listed = self.ask("GET", path, **query, **({field: folder} if folder else {}))
            for one in listed.get("files", ()):
                if one.get("is_dir"):
                    waiting.append(one["path"])
                else:
                    answer = get(one["path"])
                    assert answer.status_code == 200, answer.text
                    found[one["path"]] = answer.content
        return found

    def logged_model(self, model: dict[str, Any]) -> Any:
        info, data = model["info"], model.get("data", {})
        kept = ("name", "creation_timestamp_ms", "status", "source_run_id")
        metrics = [(one["key"], number(one), one["timestamp"], one.get("step", 0), one.get("run_id"), one.get("dataset_name"))
                   for one in data.get("metrics", ())]  # fmt: skip
        listed = self.ask("GET", f"/logged-models/{info['model_id']}/artifacts/directories").get("files", ())
        return {
            "info": {name: info.get(name) for name in kept}, "params": pairs(data, "params"), "tags": pairs(info),
            "metrics": sorted(set(metrics), key=str), "files": sorted((one["path"], one["file_size"]) for one in listed),
        }  # fmt: skip

    def model(self, model: dict[str, Any]) -> Any:
        query = {"filter": f"name = '{model['name']}'", "max_results": 1000}
        versions = self.ask("GET", "/model-versions/search", **query).get("model_versions", [])
        kept = ("description", "current_stage", "status", "run_id", "creation_timestamp")
        return {
            "tags": pairs(model), "description": model.get("description", ""), "created": model["creation_timestamp"],
            "aliases": sorted((one["alias"], one["version"]) for one in model.get("aliases", ())),
            "versions": {
                one["version"]: ({name: one.get(name) or "" for name in kept}, pairs(one)) for one in versions
            },
        }  # fmt: skip


def pairs(one: dict[str, Any], field: str = "tags") -> dict[str, str]:
    return {pair["key"]: pair.get("value", "") for pair in one.get(field, ())}


def number(one: dict[str, Any]) -> str:
    return repr(float(one["value"]))


def version_files(api: Any, name: str, version: int) -> dict[str, bytes]:
    """The files of a version, as a client gets them."""
    uri = api.get("/model-versions/get-download-uri", name=name, version=str(version))["artifact_uri"]
    assert uri.startswith("mlflow-artifacts:/")
    root = uri.removeprefix("mlflow-artifacts:/")
    found: dict[str, bytes] = {}
    listed = api.http.get("/api/2.0/mlflow-artifacts/artifacts", params={"path": root}).json()
    for one in listed["files"]:
        answer = api.http.get(f"/api/2.0/mlflow-artifacts/artifacts/{root}/{one['path']}")
        found[one["path"]] = answer.content
    return found


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
    write(store / "77" / FIRST / "metrics/bad", f"{START_MS} 1 0\nnonsense\n{START_MS} x 0\n{START_MS} 1 {2**70}\n")
    write(store / "77" / FIRST / "params/binary", b"\xff\xfe")
    write(store / "models/net/version-7/meta.yaml", {"name": "net"})
    counts, problems = bring(api, store)
    for part in ("1" * 32, "2" * 32, "3" * 32, "not-hexadecimal", "4" * 32, "experiment 99", "'binary'", "version-7"):
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
    with pytest.raises(InputError, match="want the URL"):
        bring(api, "sqlite:///mlflow.db")
    with pytest.raises(InputError, match="password"):
        bring(api, "http://ann:secret@127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match="does not answer"):
        bring(api, f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match="cannot be read"):
        bring(api, f"{str(api.http.base_url).rstrip('/')}/elsewhere")


@pytest.fixture
def other_home(api: Any, tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second empty home on the same kind of store."""
    shutil.copytree(empty_home, tmp_path / "other")
    if "MILLRACE_RECORDS_URL" in os.environ:
        monkeypatch.setenv("MILLRACE_RECORDS_URL", new_records_url())
    return tmp_path / "other"


def test_a_kill_in_the_middle_is_made_up_for(api: Any, store: Path, other_home: Path) -> None:
    for index in range(60):
        run = write_run(store / "77" / f"{index:032x}", run_name=f"run {index}")
        write(run / "metrics/loss", "".join(f"{START_MS + i} {i} {i}\n" for i in range(200)))
        write(run / "artifacts/a.txt", f"file {index}")
    command = [
        sys.executable,
        "-m",
        "millrace",
        "--home",
        str(other_home),
        "--embedded",
        "import",
        "mlflow",
        str(store),
    ]
    watcher = open_dispatcher(str(other_home))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(watcher.services.records.find(Run)) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(watcher.services.records.find(Run)) <= 63
    watcher.close()
    again = type(api)(other_home)
    try:
        counts, _ = bring(again, store)
        assert counts.get("runs", 0) + counts.get("runs here already", 0) == 63
        bring(api, store)
        assert Reader(again.http).everything() == Reader(api.http).everything()
    finally:
        again.close()


# --------------------------------------------------------------------------- servers


def test_a_server_is_read_by_its_api(api: Any, store: Path, other_home: Path) -> None:
    """From one home to another, over the wire."""
    bring(api, store)
    other = type(api)(other_home)
    try:
        counts, problems = bring(other, str(api.http.base_url).rstrip("/"))
        assert len(problems) == 1, problems
        assert (counts["runs"], counts["files"], counts["points"]) == (3, 4, 24)
        assert Reader(other.http).everything() == Reader(api.http).everything()
        assert version_files(other, "net", 3) == version_files(api, "net", 3)
        assert version_files(other, "copy", 1) == version_files(api, "net", 1)
        counts, _ = bring(other, str(api.http.base_url).rstrip("/"))
        assert (counts["runs here already"], counts["versions here already"]) == (3, 4)
    finally:
        other.close()


def test_a_running_server_does_it_when_it_is_asked(store: Path, tmp_path: Path) -> None:
    with RunningServer(tmp_path / "home") as server:
        transport = HttpTransport(server.url)
        try:
            events = list(transport.stream("system.import_mlflow", {"source": str(store)}))
            assert (events[-1].kind, events[-1].counts["runs"]) == ("done", 3)
            with pytest.raises(NotFoundError, match="there is no folder"):
                list(transport.stream("system.import_mlflow", {"source": str(tmp_path / "absent")}))
        finally:
            transport.close()
        with httpx.Client(base_url=server.url) as http:
            assert set(Reader(http).everything()["experiments"]) == {"Default", "a b/c", "gone"}


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
        below = os.path.normpath(os.path.join("/root", text))
        assert below.startswith("/root/")
        assert below == f"/root/{text}"


# --------------------------------------------------------------------------- the real MLflow


@pytest.fixture(scope="module", params=["file store", "database"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A store that an unmodified MLflow filled: what to import, and the URL of an MLflow server that shows it."""
    python = os.environ.get("MILLRACE_MLFLOW_PYTHON")
    if not python:
        pytest.skip("set MILLRACE_MLFLOW_PYTHON to an interpreter that has MLflow")
    folder = tmp_path_factory.mktemp("real")
    environment = {**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true",
                   "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}  # fmt: skip
    is_files = request.param == "file store"
    backend = str(folder / "mlruns") if is_files else f"sqlite:///{folder}/mlflow.db"
    if is_files:
        tell(python, f"file://{folder}/mlruns", folder, environment)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", backend, "--artifacts-destination", str(folder / "mlartifacts")]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        wait_until_up(url, server, folder / "log")
        if not is_files:
            tell(python, url, folder, environment)
        yield (backend if is_files else url), url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def tell(python: str, uri: str, folder: Path, environment: dict[str, str]) -> None:
    """Fill a store."""
    command = [python, str(STORY), uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]


def wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_files_that_a_server_does_not_give_are_named(api: Any, store: Path, other_home: Path) -> None:
    """And fetched by the next import: the run was not complete."""
    bring(api, store)
    digest = api.services.records.get(ArtifactFile, f"{FIRST}/model/MLmodel").artifact.digest
    content = api.services.blobs.read(digest)
    api.services.blobs.delete(digest)
    other = type(api)(other_home)
    url = str(api.http.base_url).rstrip("/")
    try:
        _, problems = bring(other, url)
        assert [one for one in problems if "model/MLmodel" in one], problems
        assert set(Reader(other.http).everything()["experiments"]["a b/c"]["runs"][FIRST]["files"]) == {
            "model/model.pkl", "empty.txt"
        }  # fmt: skip
        api.services.blobs.put(content)
        counts, _ = bring(other, url)
        assert (counts["runs completed"], counts["files"]) == (1, 1)
        assert Reader(other.http).everything() == Reader(api.http).everything()
        assert version_files(other, "net", 1) == version_files(api, "net", 1)
    finally:
        other.close()


@pytest.mark.slow
def test_a_real_store_is_the_same_here(api: Any, real: tuple[str, str]) -> None:
    source, url = real
    counts, problems = bring(api, source)
    assert problems == []
    assert (counts["runs"], counts["logged models"], counts["versions"]) == (5, 1, 4)
    with httpx.Client(base_url=url, timeout=60) as http:
        theirs = Reader(http).everything()
    ours = Reader(api.http).everything()
    assert ours["models"] == theirs["models"]
    assert set(ours["experiments"]) == set(theirs["experiments"])
    for name, experiment in theirs["experiments"].items():
        assert ours["experiments"][name] == experiment
    assert "python_model.pkl" in version_files(api, "echo", 1)
    echo = api.get("/model-versions/get", name="echo", version="1")["model_version"]
    assert echo["source"] == f"models:/{echo['model_id']}"  # MLflow's own answer may leave the id out
    assert version_files(api, "copied", 1) == version_files(api, "echo", 1)
    assert version_files(api, "plain", 3) == {"a b.txt": b"hello"}
    again, _ = bring(api, source)
    assert again["runs here already"] == 4
    assert again["runs completed"] == 1  # the one that still runs
