"""MLflow stores for tests of the import: written by hand, and what MLflow's API says of them."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

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


SCHEMA = """
CREATE TABLE experiments (experiment_id INTEGER, name, artifact_location, lifecycle_stage, creation_time,
    last_update_time, workspace DEFAULT 'default');
CREATE TABLE experiment_tags (key, value, experiment_id INTEGER);
CREATE TABLE runs (run_uuid, name, user_id, status, start_time, end_time, lifecycle_stage, artifact_uri,
    experiment_id INTEGER);
CREATE TABLE tags (key, value, run_uuid);
CREATE TABLE params (key, value, run_uuid);
CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan);
CREATE TABLE datasets (dataset_uuid, experiment_id INTEGER, name, digest, dataset_source_type, dataset_source,
    dataset_schema, dataset_profile);
CREATE TABLE inputs (input_uuid, source_type, source_id, destination_type, destination_id, step);
CREATE TABLE input_tags (input_uuid, name, value);
CREATE TABLE logged_models (model_id, experiment_id INTEGER, name, artifact_location, creation_timestamp_ms,
    last_updated_timestamp_ms, status, lifecycle_stage, model_type, source_run_id);
CREATE TABLE logged_model_params (model_id, param_key, param_value);
CREATE TABLE logged_model_tags (model_id, tag_key, tag_value);
CREATE TABLE logged_model_metrics (model_id, metric_name, metric_timestamp_ms, metric_step, metric_value, run_id,
    dataset_name, dataset_digest);
CREATE TABLE registered_models (name, creation_time, last_updated_time, description, workspace DEFAULT 'default');
CREATE TABLE registered_model_tags (name, key, value, workspace DEFAULT 'default');
CREATE TABLE registered_model_aliases (name, alias, version INTEGER, workspace DEFAULT 'default');
CREATE TABLE model_versions (name, version INTEGER, creation_time, last_updated_time, description, user_id,
    current_stage, source, run_id, run_link, status, status_message, storage_location, workspace DEFAULT 'default');
CREATE TABLE model_version_tags (name, version INTEGER, key, value, workspace DEFAULT 'default');
"""


def write_database(path: Path) -> Path:
    """What `write_store` writes, as MLflow keeps it in a database; its files are below `mlruns` beside it."""
    root, stamps = path.parent / "mlruns", (START_MS, START_MS + 1)
    database = sqlite3.connect(path)
    database.executescript(SCHEMA)

    def add(table: str, *rows: tuple[Any, ...]) -> None:
        marks = ", ".join("?" * len(rows[0]))
        columns = ", ".join(
            row[1] for row in database.execute(f"PRAGMA table_info({table})").fetchall()[: len(rows[0])]
        )
        database.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)

    stages = ((0, "Default", "active"), (77, "a b/c", "active"), (88, "gone", "deleted"))
    add("experiments", *((id, name, str(root / str(id)), stage, *stamps) for id, name, stage in stages))
    add("experiment_tags", ("team", "eyes", 77))
    for id, name, status, stage, experiment in (
        (FIRST, "one", "FINISHED", "active", 77),
        (SECOND, "killed", "KILLED", "deleted", 0),
        (THIRD, "one", "FINISHED", "active", 88),
    ):
        place = str(root / str(experiment) / id / "artifacts")
        add("runs", (id, name, "ann", status, START_MS, START_MS + 1500, stage, place, experiment))
    add("params", ("lr", "0.1", FIRST), ("note", "two\nlines\n", FIRST))
    add("tags", ("mlflow.runName", "one", FIRST), ("kind", "demo", FIRST))
    add("metrics", *(("train/loss", 1 / (step + 1), START_MS + step, FIRST, step, 0) for step in range(20)))
    add("metrics", ("odd", 0.0, START_MS, FIRST, 0, 1), ("odd", -math.inf, START_MS + 1, FIRST, 1, 0),
        ("odd", 3.5, START_MS + 2, FIRST, 0, 0), ("on", 0.5, START_MS, FIRST, 4, 0))  # fmt: skip
    add("datasets", ("e1", 77, "iris", "d1", "http", '{"url": "http://example.org/a"}', None, None))
    add("inputs", ("i1", "DATASET", "e1", "RUN", FIRST, 0), ("i2", "RUN_OUTPUT", FIRST, "MODEL_OUTPUT", MODEL, 7))
    add("input_tags", ("i1", "mlflow.data.context", "x"))
    place = str(root / "77/models" / MODEL / "artifacts")
    add("logged_models", (MODEL, 77, "net", place, START_MS, START_MS + 2, 2, "active", None, FIRST))
    add("logged_model_params", (MODEL, "depth", "3"))
    add("logged_model_metrics", (MODEL, "acc", START_MS, 1, 0.9, FIRST, None, None),
        (MODEL, "acc", START_MS, 1, 0.8, FIRST, "iris", "d1"))  # fmt: skip
    add("registered_models", ("net", START_MS, START_MS + 2, "a net"), ("copy", START_MS, START_MS + 2, None))
    add("registered_model_tags", ("net", "a", "b"))
    add("registered_model_aliases", ("net", "champion", 3))
    for name, number, source, stage, description in (
        ("net", 1, f"file:///old/place/77/{FIRST}/artifacts/model", "Production", "v1"),
        ("net", 3, f"models:/{MODEL}", "None", None),
        ("net", 4, "s3://elsewhere/model", "None", None),
        ("net", 5, "models:/net/1", "Deleted_Internal", None),
        ("copy", 1, "models:/net/1", "None", None),
    ):
        add("model_versions", (name, number, START_MS, START_MS + 2, description, None, stage, source, FIRST, None,
                               "READY", None))  # fmt: skip
    database.commit()
    database.close()
    return path


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
