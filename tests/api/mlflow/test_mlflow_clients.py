"""Unmodified clients against a served home; each story is a script of its own, as users have them.

`asynchronous` needs `mlflow-skinny` (in the extra `dev`). The others need MLflow and the integrations: name an interpreter
that has them in `MILLRACE_MLFLOW_PYTHON`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

STORIES = Path(__file__).with_name("stories")
NEEDS = {
    "asynchronous": "mlflow",
    "sklearn_autolog": "mlflow.sklearn, sklearn, pandas",
    "optuna_callback": "mlflow, optuna_integration",
    "lightning_logger": "mlflow, lightning",
    "transformers_callback": "mlflow, transformers, accelerate",
}


def interpreter(needs: str) -> str | None:
    """One that can import what a story needs."""
    mine = [part.partition(".")[0] for part in needs.split(", ")]
    if all(importlib.util.find_spec(name) for name in mine):
        return sys.executable
    named = os.environ.get("MILLRACE_MLFLOW_PYTHON")
    if named and subprocess.run([named, "-c", f"import {needs}"], capture_output=True).returncode == 0:
        return named
    return None


def tell(story: str, url: str) -> dict[str, Any]:
    """Run a story; what it printed last."""
    python = interpreter(NEEDS[story])
    if python is None:
        pytest.skip(f"no interpreter with {NEEDS[story]}; set MILLRACE_MLFLOW_PYTHON")
    environment = {**os.environ, "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                   "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [python, str(STORIES / f"{story}.py"), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_of(url: str, run: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/api/2.0/mlflow/runs/get?run_id={run}", timeout=30) as answer:
        return json.load(answer)["run"]


def test_mlflow_skinny_and_asynchronous_logging(server_url: str) -> None:
    told = tell("asynchronous", server_url)
    assert run_of(server_url, told["run"])["info"]["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("story", ["sklearn_autolog", "optuna_callback", "lightning_logger", "transformers_callback"])
def test_integrations(story: str, server_url: str) -> None:
    told = tell(story, server_url)
    for run in told.get("runs", [told.get("run")]):
        assert run_of(server_url, run)["info"]["lifecycle_stage"] == "active"
