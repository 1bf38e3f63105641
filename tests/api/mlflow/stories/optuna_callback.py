"""Optuna's MLflowCallback: one run for each trial."""

import json
import sys
import warnings

import optuna
from mlflow import MlflowClient

warnings.simplefilter("ignore")
try:
    from optuna_integration.mlflow import MLflowCallback
except ImportError:
    from optuna.integration.mlflow import MLflowCallback

optuna.logging.set_verbosity(optuna.logging.ERROR)
callback = MLflowCallback(tracking_uri=sys.argv[1], metric_name="loss")
study = optuna.create_study(study_name="tuning", sampler=optuna.samplers.RandomSampler(seed=1))
study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=5, callbacks=[callback])
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("tuning")
runs = client.search_runs([experiment.experiment_id], order_by=["metrics.loss ASC"])
assert len(runs) == 5, len(runs)
assert runs[0].data.metrics["loss"] == study.best_value
assert float(runs[0].data.params["x"]) == study.best_params["x"]
print(json.dumps({"runs": [run.info.run_id for run in runs]}))
