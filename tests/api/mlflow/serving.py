"""A server of MLflow's routes alone, for tests and for the comparison with MLflow's own server.

python tests/api/mlflow/serving.py HOME PORT
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette

from millrace.api.mlflow.routes import mlflow_routes
from millrace.control.dispatch import Dispatcher
from millrace.wiring import open_services


def build(home: str) -> Starlette:
    """The routes over a home."""
    return Starlette(routes=mlflow_routes(Dispatcher(open_services(home))))


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
