"""The export step: one ONNX graph, proven on real rows to answer as the framework does."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.core import extras
from millrace.core.errors import CorruptError, StageError
from millrace.core.facts import ExportFacts
from millrace.core.ids import canonical_json
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.dataset import DatasetReader, open_dataset
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.train.graphs import Answer, parse
from millrace.train.model_file import EXPECTED, GRAPH, read_model_file

TOLERANCE = 1e-4  # of a probability, or of the expected values' standard deviation
CHUNK = 4096
_ROWS_AT = {1: 400, 3: 600, 8: 1600, CHUNK: 100_000}  # batch size → at most so many rows


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A graph against the framework's own answers."""

    rows: int
    max_difference: float
    tolerance: float
    answers_equal: int

    @property
    def is_good(self) -> bool:
        """Within the tolerance."""
        return self.max_difference <= self.tolerance


def export(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Run the export step: output `onnx` holds `model.onnx` and `signature.json`.

    The same model and data give the same bytes, in any folder.

    Args:
        spec: The whole spec; `train` is used.
        ctx: Inputs `data.dataset` and `train.model`.

    Returns:
        `ExportFacts` as plain data.

    Raises:
        StageError: The graph cannot be made, or answers differently from the framework.
        CorruptError: An input is not what it should be.
    """
    reader = open_dataset(ctx.input("data.dataset"))
    folder = ctx.input("train.model")
    model = read_model_file(folder)
    split = model.verified_on
    tensors = reader.arrays(split)
    if model.holds == "weights":
        exported = extras.load("millrace.train.torch_rebuild:export_weights")(spec, ctx, reader, folder, tensors)
        graph, expected, exporter = exported
    else:
        graph, expected, exporter = _read(folder, GRAPH), _read_expected(folder), model.exporter
    found = compare(graph, tensors, expected)
    if not found.is_good:
        raise StageError(
            f"the ONNX graph differs from {model.framework} on {split} rows: by {found.max_difference:.3g}, "
            f"where {found.tolerance:.3g} is allowed ({found.answers_equal} of {found.rows} answers are equal)",
            hint="a branch that depends on the data, or an operation that ONNX computes otherwise, is the usual cause",
        )
    target = ctx.scratch / "onnx"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "model.onnx").write_bytes(graph)
    (target / "signature.json").write_bytes(canonical_json(make_signature(reader, model.answer)))
    ctx.output("onnx", target)
    facts = ExportFacts(
        rows=found.rows,
        max_difference=found.max_difference,
        tolerance=found.tolerance,
        answers_equal=found.answers_equal,
        exporter=exporter,
        opset=next(entry.version for entry in parse(graph, GRAPH).opset_import if entry.domain == ""),
        size_bytes=len(graph),
    )
    ctx.progress(1, 1, f"ONNX equals {model.framework} on {found.rows} rows (max diff {found.max_difference:.1g})")
    return msgspec.to_builtins(facts)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise CorruptError(f"the model has no readable {name}") from error


def _read_expected(folder: Path) -> np.ndarray:
    try:
        with np.load(folder / EXPECTED, allow_pickle=False) as stored:
            return stored["expected"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"the model has no readable {EXPECTED}") from error


def compare(graph: bytes, tensors: dict[str, np.ndarray], expected: np.ndarray) -> Comparison:
    """Run a graph at batches of 1, 3, 8 and all rows, and compare with the framework's answers.

    Args:
        graph: The ONNX bytes.
        tensors: Raw inputs by name, [rows, …].
        expected: float32 [rows, classes] of probabilities, or [rows, 1] of values.

    Raises:
        StageError: The graph fails on these rows.
    """
    session = open_session(graph)
    name = session.outputs[0].name
    is_value = name == "value"
    allowed = TOLERANCE
    if is_value and len(expected):
        rounding = 4 * float(np.finfo(np.float32).eps) * float(np.abs(expected).max())
        allowed = max(TOLERANCE * float(expected.std()), rounding, 1e-12)
    worst, rows = 0.0, len(expected)
    answers = np.empty_like(expected)
    for size, limit in _ROWS_AT.items():
        for start in range(0, min(rows, limit), size):
            part = slice(start, min(start + size, rows))
            got = session.run({key: value[part] for key, value in tensors.items()})[name]
            if got.shape != expected[part].shape:
                raise StageError(
                    f"the graph answers {list(got.shape)}, where {list(expected[part].shape)} is wanted; "
                    f"a batch of {size} rows does not work"
                )
            answers[part] = got
            difference = float(np.max(np.abs(got.astype(np.float64) - expected[part])))
            worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    checked = min(rows, max(_ROWS_AT.values()))
    if is_value:
        equal = int(np.sum(np.abs(answers[:checked] - expected[:checked]) <= allowed))
    else:
        equal = int(np.sum(answers[:checked].argmax(1) == expected[:checked].argmax(1)))
    return Comparison(rows=checked, max_difference=worst, tolerance=allowed, answers_equal=equal)


def make_signature(reader: DatasetReader, answer: Answer) -> Signature:
    """What the graph reads and answers."""
    manifest = reader.manifest
    if answer.kind == "value":
        output = TensorSpec(name="value", dtype="float32", shape=[-1, 1], semantic="value")
    else:
        output = TensorSpec(
            name="probabilities", dtype="float32", shape=[-1, len(manifest.classes)], semantic="probabilities"
        )
    return Signature(
        task=manifest.task,
        inputs=reader.signature_inputs(),
        outputs=[output],
        label=manifest.label,
        classes=manifest.classes,
        label_type=manifest.label_type,
    )
