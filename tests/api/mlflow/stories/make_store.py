"""A store with one of everything that an import must bring over, made by an unmodified MLflow.

python make_store.py TRACKING_URI
"""

from __future__ import annotations

import json
import math
import os
import sys

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Metric, Param, RunTag


class Echo(mlflow.pyfunc.PythonModel):
    """Gives back what it gets."""

    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        """The input."""
        return model_input


def make(client: MlflowClient) -> dict[str, object]:
    """Fill the store; the ids that the test asks for."""
    vision = mlflow.set_experiment("vision")
    mlflow.set_experiment_tag("team", "eyes")
    with mlflow.start_run(run_name="first", tags={"kind": "demo"}) as run:
        mlflow.log_params({"lr": 0.1, "note": "two\nlines"})
        for step in range(30):
            mlflow.log_metric("train/loss", 1 / (step + 1), step=step)
        mlflow.log_metrics({"nan": math.nan, "inf": -math.inf})
        mlflow.log_text("hello", "notes/a b.txt")
        mlflow.log_text("", "empty.txt")
        source = mlflow.data.http_dataset_source.HTTPDatasetSource("http://example.org/data.csv")
        dataset = mlflow.data.meta_dataset.MetaDataset(source, name="iris")
        mlflow.log_input(dataset, context="training")
        logged = mlflow.pyfunc.log_model(name="echo", python_model=Echo(), params={"depth": 3}, step=7)
        mlflow.log_metric("acc", 0.9, step=1, model_id=logged.model_id)
        client.log_batch(run.info.run_id, [Metric("many", i / 7, 1700000000000 + i, i) for i in range(900)],
                         [Param("p", "q")], [RunTag("t", "u")])  # fmt: skip
    reader = client.create_run(vision.experiment_id, start_time=1_600_000_000_000, run_name="reader")
    client.log_inputs(reader.info.run_id, models=[LoggedModelInput(logged.model_id)])
    client.set_terminated(reader.info.run_id, "FAILED", 1_600_000_001_500)
    killed = client.create_run("0", run_name="killed")
    client.set_terminated(killed.info.run_id, "KILLED")
    client.delete_run(killed.info.run_id)
    open_run = client.create_run("0", run_name="open")
    gone = client.create_experiment("gone")
    lost = client.create_run(gone, run_name="lost")
    client.set_terminated(lost.info.run_id)
    client.delete_experiment(gone)

    client.create_registered_model("plain", tags={"a": "b"}, description="a model")
    for number in range(3):
        client.create_model_version("plain", f"{run.info.artifact_uri}/notes", run.info.run_id,
                                    tags={"n": str(number)}, description=f"v{number}")  # fmt: skip
    client.delete_model_version("plain", "2")
    client.set_registered_model_alias("plain", "champion", "3")
    client.transition_model_version_stage("plain", "1", "Production")
    mlflow.register_model(f"models:/{logged.model_id}", "echo")
    client.copy_model_version("models:/echo/1", "copied")
    client.create_registered_model("empty")
    return {
        "run": run.info.run_id, "open": open_run.info.run_id, "model": logged.model_id,
        "killed": killed.info.run_id, "lost": lost.info.run_id, "reader": reader.info.run_id,
    }  # fmt: skip


if __name__ == "__main__":
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    mlflow.set_tracking_uri(sys.argv[1])
    mlflow.set_registry_uri(sys.argv[1])
    print(json.dumps(make(MlflowClient())))
