"""Verbs that bring other programs' stores over."""

from __future__ import annotations

from typing import Literal

from millrace.core.operations import Operation, Request
from millrace.core.types import Struct


class ImportRequest(Request, frozen=True, kw_only=True):
    """An MLflow store: its server's URL, or on this machine `sqlite:///FILE` or the folder of a file store.

    `experiments`: only these, by name. `artifacts`: the folder with the files of runs, where it is not beside
    the store (`--artifacts-destination` of a server). `dry_run`: only say what would come.
    """

    source: str
    experiments: list[str] = []
    artifacts: str | None = None
    dry_run: bool = False


class ImportEvent(Struct, frozen=True, kw_only=True):
    """An experiment or a model was brought over, something could not be, or all is done.

    `counts` is of the whole import so far, by name.
    """

    kind: Literal["experiment", "model", "problem", "done"]
    text: str
    counts: dict[str, int] = {}


IMPORT_MLFLOW = Operation(
    name="system.import_mlflow", summary="Bring an MLflow store over.", request=ImportRequest, response=ImportEvent,
    method="POST", path="/system/import/mlflow", is_write=True, is_stream=True, example={"source": "mlruns"},
)  # fmt: skip
OPERATIONS = (IMPORT_MLFLOW,)
