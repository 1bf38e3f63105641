"""Logged models, registered models, versions, aliases and stages through MLflow's routes."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.control import models as _models  # noqa: F401  (its handlers)
from millrace.core.errors import MillraceError
from millrace.core.types import Alias, LoggedModel, Model, ModelVersion, TreeEntry

FILES = "/api/2.0/mlflow-artifacts/artifacts"
INVALID = (400, "INVALID_PARAMETER_VALUE")
GONE = (404, "RESOURCE_DOES_NOT_EXIST")
TAKEN = (400, "RESOURCE_ALREADY_EXISTS")
R, V = "/registered-models", "/model-versions"


@pytest.fixture
def logged(api: Any) -> tuple[Any, str, str, str]:
    """An experiment, a run with a file, and a logged model with two files."""
    experiment = api.experiment()
    run = api.run(experiment)
    api.http.put(f"{FILES}/{experiment}/{run}/artifacts/model/MLmodel", content=b"flavors: {}")
    made = api.post("/logged-models", experiment_id=experiment, name="net", source_run_id=run, model_type="agent")
    model = made["model"]["info"]["model_id"]
    for name, data in (("MLmodel", b"flavors: {}"), ("model.pkl", b"\x80\x04never loaded")):
        api.http.put(f"{FILES}/{experiment}/models/{model}/artifacts/{name}", content=data)
    return api, experiment, run, model


# --------------------------------------------------------------------------- logged models


def test_a_logged_model_from_beginning_to_end(logged: tuple[Any, str, str, str]) -> None:
    api, experiment, run, model = logged
    info = api.get(f"/logged-models/{model}")["model"]["info"]
    assert model.startswith("m-")
    assert len(model) == 34
    assert info["artifact_uri"] == f"mlflow-artifacts:/{experiment}/models/{model}/artifacts"
    assert (info["status"], info["source_run_id"]) == ("LOGGED_MODEL_PENDING", run)
    ended = api.call("PATCH", f"/logged-models/{model}", {"model_id": model, "status": "LOGGED_MODEL_READY"})
    assert ended["model"]["info"]["status"] == "LOGGED_MODEL_READY"
    api.call("PATCH", f"/logged-models/{model}/tags", {"tags": [{"key": "a", "value": "1"}]})
    api.call("DELETE", f"/logged-models/{model}/tags/a", {})
    assert api.refused("DELETE", f"/logged-models/{model}/tags/a") == GONE
    found = api.get(f"/logged-models/{model}/artifacts/directories")["files"]
    assert [one["path"] for one in found] == ["MLmodel", "model.pkl"]
    api.call("DELETE", f"/logged-models/{model}", {})
    assert api.refused("GET", f"/logged-models/{model}") == GONE
    assert api.get(f"/logged-models/{model}", allow_deleted="true")["model"]["info"]["model_id"] == model
    assert api.services.records.get(LoggedModel, model).deleted_at is not None


def test_metrics_of_a_run_are_also_the_models(logged: tuple[Any, str, str, str]) -> None:
    api, experiment, run, model = logged
    point = {"key": "acc", "value": 0.9, "timestamp": 5, "model_id": model}
    on_rows = {**point, "value": "NaN", "step": 1, "dataset_name": "iris", "dataset_digest": "abc"}
    api.post("/runs/log-batch", run_id=run, metrics=[point, on_rows])
    api.post("/runs/outputs", run_id=run, models=[{"model_id": model, "step": 3}])
    api.post("/runs/log-inputs", run_id=run, models=[{"model_id": model}])
    metrics = api.get(f"/logged-models/{model}")["model"]["data"]["metrics"]
    assert [(one["value"], one["run_id"]) for one in metrics] == [(0.9, run), ("NaN", run)]
    found = api.get("/runs/get", run_id=run)["run"]
    assert found["outputs"] == {"model_outputs": [{"model_id": model, "step": 3}]}
    assert found["inputs"] == {"model_inputs": [{"model_id": model}]}

    def search(**more: Any) -> list[str]:
        answer = api.post("/logged-models/search", experiment_ids=[experiment], **more)
        return [one["info"]["model_id"] for one in answer["models"]]

    assert search(filter="metrics.acc > 0.5 AND name LIKE 'n%'") == [model]
    assert search(filter="metrics.acc > 0.95") == []
    assert search(datasets=[{"dataset_name": "iris"}]) == [model]
    assert search(datasets=[{"dataset_name": "other"}]) == []
    assert search(filter=f"source_run_id = '{run}' AND status = 'PENDING'") == [model]
    assert api.refused("POST", "/logged-models/search", experiment_ids=[experiment], filter="foo = 'x'") == INVALID
    unknown = {**point, "model_id": "m-" + "0" * 32}
    assert api.refused("POST", "/runs/log-batch", run_id=run, metrics=[{**unknown, "key": "lost"}]) == GONE
    assert "lost" not in {one["key"] for one in api.get("/runs/get", run_id=run)["run"]["data"]["metrics"]}


def test_logged_models_are_ordered_and_paged(api: Any) -> None:
    experiment, run = api.experiment(), None
    run = api.run(experiment)
    models = []
    for index in range(3):
        made = api.post("/logged-models", experiment_id=experiment, name=f"n{index}")
        models.append(made["model"]["info"]["model_id"])
        metric = {"key": "acc", "value": index, "timestamp": 1, "model_id": models[-1]}
        api.post("/runs/log-batch", run_id=run, metrics=[metric])
    body = {"experiment_ids": [experiment], "order_by": [{"field_name": "metrics.acc", "ascending": False}]}
    page = api.post("/logged-models/search", max_results=2, **body)
    rest = api.post("/logged-models/search", max_results=2, page_token=page["next_page_token"], **body)
    shown = [one["info"]["model_id"] for one in [*page["models"], *rest["models"]]]
    assert shown == models[::-1]
    other = {**body, "order_by": [{"field_name": "name"}], "page_token": page["next_page_token"]}
    assert api.refused("POST", "/logged-models/search", **other) == INVALID


# --------------------------------------------------------------------------- registry


def test_names_of_models(api: Any) -> None:
    api.post(f"{R}/create", name="über net", tags=[{"key": "a", "value": "1"}], description="d")
    assert api.refused("POST", f"{R}/create", name="über net") == TAKEN
    for name in ("", "a/b", "a:b", "..", "   ", None):
        assert api.refused("POST", f"{R}/create", name=name) == INVALID
    api.call("PATCH", f"{R}/update", {"name": "über net", "description": "new"})
    api.post(f"{R}/set-tag", name="über net", key="b", value="2")
    api.call("DELETE", f"{R}/delete-tag", {"name": "über net", "key": "a"})
    found = api.get(f"{R}/get", name="über net")["registered_model"]
    assert (found["description"], found["tags"]) == ("new", [{"key": "b", "value": "2"}])
    assert api.refused("GET", f"{R}/get", name="nope") == GONE


def test_a_version_keeps_the_files_as_opaque_bytes(logged: tuple[Any, str, str, str]) -> None:
    api, experiment, run, model = logged
    api.post(f"{R}/create", name="net")
    made = api.post(f"{V}/create", name="net", source=f"models:/{model}", model_id=model)["model_version"]
    assert (made["version"], made["status"], made["run_id"]) == ("1", "READY", run)
    (version,) = api.services.records.find(ModelVersion)
    assert (version.format, version.source, version.number) == ("opaque", "mlflow", 1)
    entries: list[TreeEntry] = api.services.blobs.tree(version.bundle.digest)
    assert [entry.path for entry in entries] == ["MLmodel", "model.pkl"]
    uri = api.get(f"{V}/get-download-uri", name="net", version="1")["artifact_uri"]
    assert uri == f"mlflow-artifacts:/{experiment}/models/{model}/artifacts"
    assert '"version":1' in api.get(f"/logged-models/{model}")["model"]["info"]["tags"][0]["value"].replace(" ", "")
    (view,) = api.dispatcher.call("model.list", {})
    assert (view.name, view.version, view.source) == ("net", 1, "mlflow")
    with pytest.raises(MillraceError):
        api.dispatcher.call("model.open", {"model": "net@1"})


def test_versions_of_millrace_are_versions_of_mlflow(api: Any) -> None:
    folder = api.services.home / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"onnx")
    bundle = api.services.blobs.put_tree(folder)
    api.services.records.put(ModelVersion(id="e" * 32, name="digits", number=1, bundle=bundle))
    api.services.records.put(Alias(id="digits/champion", model="digits", name="champion", number=1))
    found = api.get(f"{R}/alias", name="digits", alias="champion")["model_version"]
    assert (found["version"], found["aliases"]) == ("1", ["champion"])
    assert [one["name"] for one in api.get(f"{R}/search")["registered_models"]] == ["digits"]
    uri = api.get(f"{V}/get-download-uri", name="digits", version="1")["artifact_uri"]
    path = uri.removeprefix("mlflow-artifacts:/")
    assert api.http.get(f"{FILES}/{path}/model.onnx").content == b"onnx"


def test_numbers_are_never_used_twice_and_aliases_go_with_versions(api: Any) -> None:
    api.post(f"{R}/create", name="net")
    for number in ("1", "2"):
        made = api.post(f"{V}/create", name="net", source="s3://bucket/model")["model_version"]
        assert made["version"] == number
    api.post(f"{R}/alias", name="net", alias="best", version="2")
    api.call("DELETE", f"{V}/delete", {"name": "net", "version": "2"})
    assert api.refused("GET", f"{R}/alias", name="net", alias="best") == INVALID
    assert api.refused("GET", f"{V}/get", name="net", version="2") == GONE
    assert api.refused("DELETE", f"{V}/delete", name="net", version="2") == GONE
    assert api.post(f"{V}/create", name="net", source="s3://bucket/model")["model_version"]["version"] == "3"
    assert api.services.records.get(Model, "net").last_number == 3


def test_aliases(api: Any) -> None:
    api.post(f"{R}/create", name="net")
    for _ in range(2):
        api.post(f"{V}/create", name="net", source="s3://bucket/model")
    for alias in ("v1", "V12", "latest", "LATEST", "a b", "a/b", "", "x" * 256):
        assert api.refused("POST", f"{R}/alias", name="net", alias=alias, version="1") == INVALID
    assert api.refused("POST", f"{R}/alias", name="net", alias="best", version="9") == GONE
    api.post(f"{R}/alias", name="net", alias="best", version="1")
    api.post(f"{R}/alias", name="net", alias="best", version="2")
    assert api.get(f"{R}/alias", name="net", alias="best")["model_version"]["version"] == "2"
    assert api.get(f"{R}/alias", name="net", alias="latest")["model_version"]["version"] == "2"
    assert api.refused("GET", f"{R}/alias", name="net", alias="nope") == INVALID
    assert api.refused("GET", f"{R}/alias", name="nope", alias="best") == GONE
    assert [move["to"] for move in api.services.records.get(Alias, "net/best").history] == [1, 2]
    for _ in range(2):
        api.call("DELETE", f"{R}/alias", {"name": "net", "alias": "best"})
    assert api.get(f"{R}/get", name="net")["registered_model"]["aliases"] == []


def test_stages(api: Any) -> None:
    api.post(f"{R}/create", name="net")
    for _ in range(2):
        api.post(f"{V}/create", name="net", source="s3://bucket/model")
    move = {"name": "net", "stage": "production", "archive_existing_versions": False}
    api.post(f"{V}/transition-stage", version="1", **move)
    api.post(f"{V}/transition-stage", version="2", **{**move, "archive_existing_versions": True})
    stages = {one["version"]: one["current_stage"] for one in api.get(f"{V}/search")["model_versions"]}
    assert stages == {"1": "Archived", "2": "Production"}
    newest = api.post(f"{R}/get-latest-versions", name="net", stages=["Production"])["model_versions"]
    assert [one["version"] for one in newest] == ["2"]
    assert api.refused("POST", f"{V}/transition-stage", version="1", **{**move, "stage": "Live"}) == INVALID


def test_a_model_is_renamed_and_deleted_with_all_that_is_its(api: Any) -> None:
    for name in ("net", "other"):
        api.post(f"{R}/create", name=name)
    api.post(f"{V}/create", name="net", source="s3://bucket/model")
    api.post(f"{R}/alias", name="net", alias="best", version="1")
    assert api.refused("POST", f"{R}/rename", name="net", new_name="other") == TAKEN
    api.post(f"{R}/rename", name="net", new_name="web")
    assert api.get(f"{R}/alias", name="web", alias="best")["model_version"]["name"] == "web"
    assert api.refused("GET", f"{R}/get", name="net") == GONE
    api.call("DELETE", f"{R}/delete", {"name": "web"})
    assert api.refused("GET", f"{V}/get", name="web", version="1") == GONE
    assert api.services.records.find(Alias) == []


def test_searches(api: Any) -> None:
    for name in ("a", "b", "Ab"):
        api.post(f"{R}/create", name=name, tags=[{"key": "k", "value": name}])
        api.post(f"{V}/create", name=name, source=f"s3://bucket/{name}", tags=[{"key": "v", "value": name}])
    api.post(f"{R}/create", name="poem", tags=[{"key": "mlflow.prompt.is_prompt", "value": "true"}])

    def models(**query: Any) -> list[str]:
        return [one["name"] for one in api.get(f"{R}/search", **query)["registered_models"]]

    def versions(**query: Any) -> list[str]:
        return [one["name"] for one in api.get(f"{V}/search", **query)["model_versions"]]

    assert models() == ["Ab", "a", "b"]
    assert models(filter="name ILIKE 'A%'", order_by="name DESC") == ["a", "Ab"]
    assert models(filter="tags.k = 'b'") == ["b"]
    assert models(filter="tags.`mlflow.prompt.is_prompt` = 'true'") == ["poem"]
    assert versions(order_by="name ASC") == ["Ab", "a", "b"]
    assert versions(filter="source_path LIKE '%/b'") == versions(filter="tags.v = 'b'") == ["b"]
    assert versions(filter="name = 'a' AND version_number = 1") == ["a"]
    page = api.get(f"{R}/search", max_results=2)
    rest = api.get(f"{R}/search", max_results=2, page_token=page["next_page_token"])
    assert [one["name"] for one in [*page["registered_models"], *rest["registered_models"]]] == ["Ab", "a", "b"]
    for query in ({"max_results": 1001}, {"filter": "foo = 'x'"}, {"filter": "name > 'a'"}, {"order_by": "foo"}):
        assert api.refused("GET", f"{R}/search", **query) == INVALID
    for query in ({"max_results": 200_001}, {"max_results": 0}, {"filter": "version_number > 1.5"}):
        assert api.refused("GET", f"{V}/search", **query) == INVALID


def test_sources_that_are_refused(logged: tuple[Any, str, str, str]) -> None:
    api, experiment, run, model = logged
    other = api.run(experiment)
    api.post(f"{R}/create", name="net")
    for source in (
        "/etc", "etc", "file:///etc", "file:/etc", "mlflow-artifacts:/../x", "mlflow-artifacts:/%2e%2e/x",
        "mlflow-artifacts:/%252e%252e/x", f"mlflow-artifacts:/{experiment}/{other}/artifacts/model", "s3://b/../x",
        f"runs:/{other}/model", "http://host/..%2f..%2fx", "models:/" + "m-" + "0" * 32, "ftp://host/x", "s3://b/a\\..\\x",
        f"mlflow-artifacts:/{experiment}/{run}/artifacts/../../x", "runs://host/" + run + "/model", "x" * 501,
    ):  # fmt: skip
        for named in ({}, {"run_id": run}):
            status, code = api.refused("POST", f"{V}/create", name="net", source=source, **named)
            assert (status, code) == INVALID, source
    assert api.refused("POST", f"{V}/create", name="net", source=f"models:/{model}") == INVALID
    assert api.services.records.find(ModelVersion) == []
    taken = api.post(f"{V}/create", name="net", source=f"runs:/{run}/model", run_id=run)["model_version"]
    assert taken["source"] == f"runs:/{run}/model"
    copied = api.post(f"{V}/create", name="net", source="models:/net/1")["model_version"]
    assert (copied["source"], copied["run_id"]) == ("models:/net/1", run)
    digests = {version.bundle.digest for version in api.services.records.find(ModelVersion)}
    assert len(digests) == 1
    assert api.refused("POST", f"{V}/create", name="net", source="models:/net/9") == GONE
    assert api.refused("POST", f"{V}/create", name="nope", source="s3://b/x") == GONE
