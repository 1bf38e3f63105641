"""The same 470 requests to MLflow's own server: only known differences. Needs `MILLRACE_MLFLOW_PYTHON`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# Where this server is meant to be, or may be, another: a refusal instead of a guess, a 4xx instead of a 5xx, an alias
# where MLflow leaves it out, `latest_versions` by stage, and statuses in an order of another alphabet.
MEANT = (
    '"status": "NOPE"', "search-datasets", "attributes.status ASC",
    "attributes.run_id", '["metrics.acc", "metrics.acc"]', '"run_view_type": "NOPE"', "PUT /api/2.0/mlflow-artifacts",
    "status = 'READY'", "foo = 'x'", '"datasets": [{"dataset_name": "iris"}]', "models:/", '"version": "3"',
    "registered-models/get ", "registered-models/search", "model-versions/search", "runs/create null", "/nope",
)  # fmt: skip


@pytest.mark.slow
def test_answers_are_those_of_mlflow(tmp_path: Path, server_url: str, wait_for: Callable[..., None]) -> None:
    python = os.environ.get("MILLRACE_MLFLOW_PYTHON")
    if not python:
        pytest.skip("set MILLRACE_MLFLOW_PYTHON to an interpreter with MLflow's server")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [python, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/m.db",
               "--artifacts-destination", str(tmp_path / "files"), "--port", str(port), "--workers", "1"]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        theirs = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
        try:
            wait_for(f"http://127.0.0.1:{port}", theirs, tmp_path / "log")
            command = [sys.executable, "differences.py", f"http://127.0.0.1:{port}", server_url]
            done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=600)
        finally:
            os.killpg(theirs.pid, signal.SIGTERM)
            theirs.wait(60)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("--- ")]
    unknown = [step for step in steps if not any(part in step for part in MEANT)]
    assert unknown == []
