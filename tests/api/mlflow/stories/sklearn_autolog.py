"""scikit-learn: autolog, register, alias, load; what MLflow turns into warnings is looked up on the server."""

import json
import sys
import warnings

import mlflow
import numpy as np
from mlflow import MlflowClient
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("autolog")
warnings.simplefilter("ignore")
x, y = load_iris(return_X_y=True)
mlflow.sklearn.autolog(log_datasets=True)
with mlflow.start_run() as run:
    model = LogisticRegression(max_iter=300).fit(x, y)
    model.score(x, y)
client = MlflowClient()
found = client.get_run(run.info.run_id)
assert found.info.status == "FINISHED"
assert found.data.params["max_iter"] == "300", found.data.params
assert found.data.metrics["training_accuracy_score"] > 0.9, found.data.metrics
assert found.outputs.model_outputs, found.outputs
assert found.inputs.dataset_inputs, found.inputs
assert {file.path for file in client.list_artifacts(run.info.run_id)}
models = mlflow.search_logged_models(experiment_ids=[found.info.experiment_id], output_format="list")
assert [model.model_id for model in models] == [found.outputs.model_outputs[0].model_id]
assert models[0].status == "READY", models[0]
version = mlflow.register_model(f"runs:/{run.info.run_id}/model", "iris")
assert version.version == "1", version
assert version.status == "READY"
client.set_registered_model_alias("iris", "champion", "1")
loaded = mlflow.sklearn.load_model("models:/iris@champion")
np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
again = mlflow.pyfunc.load_model("models:/iris/1")
np.testing.assert_array_equal(again.predict(x), model.predict(x))
by_run = mlflow.sklearn.load_model(f"runs:/{run.info.run_id}/model")
np.testing.assert_array_equal(by_run.predict(x), model.predict(x))
with mlflow.start_run():
    info = mlflow.sklearn.log_model(model, name="second", registered_model_name="iris", input_example=x[:2])
assert str(info.registered_model_version) == "2", info
copied = client.copy_model_version("models:/iris/2", "iris-production")
assert copied.version == "1"
np.testing.assert_array_equal(mlflow.sklearn.load_model("models:/iris-production/1").predict(x), model.predict(x))
print(json.dumps({"run": run.info.run_id, "model": models[0].model_id}))
