"""Asynchronous logging, nested runs, tables, figures-free: mlflow-skinny is enough."""

import json
import sys
import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("async")
mlflow.config.enable_async_logging(True)
with mlflow.start_run(tags={"team": "rows"}) as run:
    for step in range(200):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    mlflow.log_metrics({"a": 1.0, "b": 2.0}, step=3)
    mlflow.log_params({f"p{index}": index for index in range(30)})
    mlflow.set_tags({"x": "1", "y": "2"})
    with mlflow.start_run(nested=True) as child:
        mlflow.log_metric("inner", 0.5)
mlflow.flush_async_logging()
mlflow.config.enable_async_logging(False)
client = MlflowClient()
history = client.get_metric_history(run.info.run_id, "loss")
assert len(history) == 200, len(history)
found = client.get_run(run.info.run_id)
assert found.data.metrics["loss"] == 1 / 200
assert len(found.data.params) == 30
assert found.data.tags["team"] == "rows"
children = client.search_runs([found.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
assert [one.info.run_id for one in children] == [child.info.run_id]
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "deep" / "er").mkdir(parents=True)
    (Path(folder) / "deep" / "er" / "ä b.txt").write_text("hello")
    (Path(folder) / "top.bin").write_bytes(b"\0" * 100_000)
    client.log_artifacts(run.info.run_id, folder, "files")
    target = client.download_artifacts(run.info.run_id, "files", folder)
    assert (Path(target) / "deep" / "er" / "ä b.txt").read_text() == "hello"
    assert (Path(target) / "top.bin").stat().st_size == 100_000
assert [one.path for one in client.list_artifacts(run.info.run_id, "files")] == ["files/deep", "files/top.bin"]
refused = ""
try:
    client.log_param(run.info.run_id, "p1", "other")
except MlflowException as error:
    refused = error.error_code
assert refused == "INVALID_PARAMETER_VALUE", "a parameter changed"
client.delete_run(run.info.run_id)
assert client.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
client.restore_run(run.info.run_id)
pages = client.search_runs([found.info.experiment_id], max_results=1)
rest = client.search_runs([found.info.experiment_id], max_results=5, page_token=pages.token)
assert len({one.info.run_id for one in [*pages, *rest]}) == 2
model = client.create_registered_model("net", tags={"a": "1"}, description="text")
version = client.create_model_version("net", f"runs:/{run.info.run_id}/files", run.info.run_id)
assert version.status == "READY"
client.set_registered_model_alias("net", "best", version.version)
assert client.get_model_version_by_alias("net", "best").version == "1"
assert client.get_registered_model("net").aliases == {"best": "1"}
assert [one.name for one in client.search_registered_models("name LIKE 'n%'")] == ["net"]
assert [one.version for one in client.search_model_versions("name = 'net'")] == ["1"]
client.transition_model_version_stage("net", "1", "Staging")
assert client.get_latest_versions("net", ["Staging"])[0].version == "1"
client.delete_model_version("net", "1")
client.rename_registered_model("net", "web")
client.delete_registered_model("web")
print(json.dumps({"run": run.info.run_id}))
