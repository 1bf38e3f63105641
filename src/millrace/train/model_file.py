"""The tree that `train` gives to `export`: weights to rebuild a module from, or a graph already made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from millrace.core.errors import CorruptError
from millrace.train.graphs import Answer
from millrace.train.preprocess import Preprocess

MODEL_JSON = "model.json"
WEIGHTS = "weights.safetensors"
GRAPH = "model.onnx"
EXPECTED = "expected.npz"


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """`model.json`.

    `holds` weights: `weights.safetensors`, for the module that `reference` builds. graph: `model.onnx`
    and `expected.npz`, the framework's own answers on the test rows, since pickle is never written.
    """

    format: int = 1
    framework: str
    reference: str
    holds: Literal["weights", "graph"]
    preprocess: Preprocess
    answer: Answer
    exporter: str = ""
    verified_on: str = "test"  # the split of `expected.npz`


def write_model_file(folder: Path, model: ModelFile) -> None:
    """Write `model.json`."""
    (folder / MODEL_JSON).write_bytes(msgspec.json.format(msgspec.json.encode(model, order="deterministic")))


def read_model_file(folder: Path) -> ModelFile:
    """Read `model.json`.

    Raises:
        CorruptError: It is missing or not one.

    Example:
        >>> read_model_file(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        millrace.core.errors.CorruptError: model /nowhere has no readable model.json
    """
    try:
        return msgspec.json.decode((folder / MODEL_JSON).read_bytes(), type=ModelFile)
    except (OSError, msgspec.MsgspecError) as error:
        raise CorruptError(f"model {folder} has no readable {MODEL_JSON}") from error


def write_graph(folder: Path, graph: bytes, expected: np.ndarray) -> None:
    """Write a finished graph and what it must answer on the test rows."""
    (folder / GRAPH).write_bytes(graph)
    np.savez(folder / EXPECTED, expected=expected)
