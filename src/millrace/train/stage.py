"""The train step: hands over to the framework; imports none itself."""

from __future__ import annotations

import shutil
from typing import Any

import msgspec

from millrace.core import extras
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.dataset import open_dataset
from millrace.train.frameworks_table import framework_of

_TRAININGS = {
    "torch": "millrace.train.torch_training:train_torch",
    "sklearn": "millrace.train.table_training:train_tables",
    "lightgbm": "millrace.train.table_training:train_tables",
}


def train(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Run the train step: output `model`.

    Args:
        spec: The whole spec; `train` and the first of `evaluate.metrics` are used.
        ctx: Input `data.dataset`.

    Returns:
        `TrainFacts` as plain data.

    Raises:
        InputError: The spec's model is not one.
        StageError: The training failed.
    """
    reader = open_dataset(ctx.input("data.dataset"))
    folder = ctx.scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts = extras.load(_TRAININGS[framework_of(spec.train)])(spec, ctx, reader, folder)
    ctx.output("model", folder)
    return msgspec.to_builtins(facts)
