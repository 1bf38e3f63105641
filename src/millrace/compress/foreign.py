"""Compression of any ONNX file with labelled rows: `millrace compress model.onnx --data rows.parquet --label y`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from millrace.compress.search import Job, search
from millrace.compress.stage import MAX_CALIBRATION_ROWS, write_measurements, write_variants
from millrace.core.errors import InputError
from millrace.core.facts import CompressFacts, Task
from millrace.core.spec import Compress
from millrace.formats.session import Session, open_session

Tensors = Mapping[str, np.ndarray]
_CALIBRATION_SHARE = 5  # one row in five is for calibration, the others judge
_MIN_ROWS = 10


def compress_model(
    model: Path,
    rows: Tensors,
    labels: np.ndarray,
    options: Compress | None = None,
    threads: int = 1,
    folder: Path | None = None,
) -> tuple[CompressFacts, Path]:
    """Compress a model that Millrace did not train.

    A fifth of the rows (at most 512, spread evenly) calibrates and orders, the others judge. They must be rows that
    the model was not trained on, or the guarantee says nothing about new ones.

    Args:
        model: A self-contained ONNX file whose inputs have rows as their first dimension.
        rows: Every input by name, equal numbers of rows.
        labels: Per row the class (its index, or any values whose sorted order is the order of the scores),
            or the value, when the model has no output with several columns.
        options: Like the spec's `compress` section.
        threads: Threads that are timed.
        folder: Where variants go; a new temporary folder when absent.

    Returns:
        The facts, and a folder with `<name>.onnx` for each certified variant, `guarantees.json` and
        `measurements.json`.

    Raises:
        InputError: Too few rows, unequal numbers of rows, labels that do not fit the model's scores.
        CorruptError: The file is no model that can be loaded.
        StageError: The model fails on the rows.
    """
    session = open_session(model)
    total = _check_rows(session, rows, labels)
    task, output, columns = detect_task(session, rows)
    expected = class_indices(labels, columns) if task == "classification" else _values(labels)
    is_calibration = np.zeros(total, bool)
    count = max(1, min(MAX_CALIBRATION_ROWS, total // _CALIBRATION_SHARE))
    is_calibration[np.arange(count) * total // count] = True
    calibration = {name: np.ascontiguousarray(array[is_calibration]) for name, array in rows.items()}
    outcome = search(
        Job(
            model=model.read_bytes(),
            task=task,
            output=output,
            calibration=calibration,
            ordering=calibration,
            test={name: array[~is_calibration] for name, array in rows.items()},
            expected=expected[~is_calibration],
            options=options or Compress(),
            threads=threads,
        )
    )
    target = Path(tempfile.mkdtemp(prefix="millrace-variants-")) if folder is None else folder
    write_variants(target, outcome)
    write_measurements(target, outcome)
    return outcome.facts, target


def detect_task(session: Session, rows: Tensors) -> tuple[Task, str, int]:
    """Task, output and number of columns: an output with several float columns means class scores.

    Raises:
        InputError: No output of numbers.
    """
    answers = session.run({name: array[:2] for name, array in rows.items()})
    floats = {name: value for name, value in answers.items() if value.dtype.kind == "f"}
    for name, value in floats.items():
        if value.ndim == 2 and value.shape[1] > 1:
            return "classification", name, int(value.shape[1])
    if not floats:
        raise InputError(
            f"the model has no output of decimal numbers: {', '.join(answers)}",
            hint="export class scores (probabilities or logits) or a value",
        )
    return "regression", next(iter(floats)), 1


def class_indices(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels as column numbers of the scores.

    Whole numbers from 0 on are taken as they are; other labels by their sorted order.

    Raises:
        InputError: There are not as many different labels as columns.

    Example:
        >>> class_indices(np.array(["dog", "cat", "dog"]), 2).tolist()
        [1, 0, 1]
    """
    if labels.dtype.kind in "iuf" and labels.size and np.all(labels == np.floor(labels)):
        numbers = labels.astype(np.int64)
        if numbers.min() >= 0 and numbers.max() < classes:
            return numbers
    known, indices = np.unique(labels.astype(str) if labels.dtype.kind == "O" else labels, return_inverse=True)
    if len(known) != classes:
        raise InputError(
            f"the model scores {classes} classes, the labels have {len(known)} different values: "
            f"{', '.join(map(str, known[:12]))}",
            hint="give the class as its column number, from 0 on",
        )
    return indices.astype(np.int64)


def _check_rows(session: Session, rows: Tensors, labels: np.ndarray) -> int:
    wanted, given = {spec.name for spec in session.inputs}, set(rows)
    if wanted != given:
        raise InputError(
            f"the model reads {', '.join(sorted(wanted))}; the rows have {', '.join(sorted(given))}",
            hint="name the rows' tensors like the model's inputs",
        )
    counts = {name: len(array) for name, array in rows.items()} | {"the label": len(labels)}
    if len(set(counts.values())) != 1:
        raise InputError(f"unequal numbers of rows: {counts}", hint="every row needs all inputs and its label")
    total = len(labels)
    if total < _MIN_ROWS:
        raise InputError(f"want at least {_MIN_ROWS} labelled rows, got {total}", hint="several hundred judge well")
    return total


def _values(labels: np.ndarray) -> np.ndarray:
    try:
        values = labels.astype(np.float64)
    except ValueError as error:
        raise InputError(f"the model gives a value, the label is no number: {error}", hint="check the label") from error
    if not np.isfinite(values).all():
        raise InputError("a label is missing or infinite", hint="leave out rows without a label")
    return values
