"""The `compress` step: variants of the exported model, each with its guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.compress.search import Job, Outcome, search
from millrace.compress.trees import TrainingRows
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.cpu import cpu_flags
from millrace.formats.dataset import open_dataset
from millrace.formats.signature import Signature

MAX_CALIBRATION_ROWS = 512
_MIN_ORDERING_ROWS = 50
Tensors = Mapping[str, np.ndarray]


def compress(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Make, certify, time and choose variants.

    Calibration uses training rows, the label-free order validation rows, the guard test rows.

    Args:
        spec: `compress`, the first of `evaluate.metrics`, `serve.threads`.
        ctx: Inputs `data.dataset` and `export.onnx`; outputs `variants` (certified files and
            `guarantees.json`, deterministic) and `measurements` (`measurements.json`).

    Returns:
        CompressFacts as plain data.
    """
    reader = open_dataset(ctx.input("data.dataset"))
    exported = ctx.input("export.onnx")
    signature = msgspec.json.decode((exported / "signature.json").read_bytes(), type=Signature)
    training = dict(reader.arrays("train"))
    calibration = spread_rows(training, MAX_CALIBRATION_ROWS)
    ordering = calibration
    if reader.manifest.rows.get("validation", 0) >= _MIN_ORDERING_ROWS:
        ordering = spread_rows(reader.arrays("validation"), MAX_CALIBRATION_ROWS)
    outcome = search(
        Job(
            model=(exported / "model.onnx").read_bytes(),
            task=signature.task,
            output=signature.outputs[0].name,
            calibration=calibration,
            ordering=ordering,
            test=reader.arrays("test"),
            expected=reader.labels("test"),
            training=TrainingRows(training, reader.labels("train"), len(signature.classes)),
            options=spec.compress,
            threads=spec.serve.threads or 1,
            metric=spec.evaluate.metrics[0] if spec.evaluate.metrics else "",
            progress=ctx.progress,
        )
    )
    ctx.output("variants", write_variants(ctx.scratch / "variants", outcome))
    ctx.output("measurements", write_measurements(ctx.scratch / "measurements", outcome))
    return msgspec.to_builtins(outcome.facts)


def spread_rows(tensors: Tensors, limit: int) -> dict[str, np.ndarray]:
    """At most `limit` rows, evenly spread over all of them.

    Example:
        >>> spread_rows({"x": np.arange(10)}, 3)["x"].tolist()
        [0, 3, 6]
    """
    rows = len(next(iter(tensors.values())))
    if rows <= limit:
        return dict(tensors)
    picked = np.arange(limit) * rows // limit
    return {name: array[picked] for name, array in tensors.items()}


def write_variants(folder: Path, outcome: Outcome) -> Path:
    """The certified files and `guarantees.json`: the same bytes for the same model, rows and flags."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in outcome.files.items():
        (folder / f"{name}.onnx").write_bytes(data)
    guarantees = {
        variant.recipe.name: {
            **msgspec.to_builtins(outcome.guarantees[variant.recipe.name]),
            "weights": variant.recipe.weights,
            "acts": variant.recipe.acts,
            "reduce_range": variant.recipe.reduce_range,
            "needs_vnni": variant.recipe.needs_vnni,
            "is_replacement": variant.recipe.is_replacement,
            "size_bytes": len(variant.data),
            "snr_db": round(variant.snr_db, 2) if np.isfinite(variant.snr_db) else None,
            "file": f"{variant.recipe.name}.onnx" if variant.recipe.name in outcome.files else None,
            "cpu_flags": cpu_flags(),
        }
        for variant in outcome.order
    }
    (folder / "guarantees.json").write_bytes(msgspec.json.format(msgspec.json.encode(guarantees)))
    return folder


def write_measurements(folder: Path, outcome: Outcome) -> Path:
    """`measurements.json`: CompressFacts with sizes, latencies, the choice and its reason."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measurements.json").write_bytes(msgspec.json.format(msgspec.json.encode(outcome.facts)))
    return folder
