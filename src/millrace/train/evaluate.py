"""The evaluate step: the exported graph on the test rows, with intervals, slices and mistakes."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.core.errors import DataError, InputError
from millrace.core.facts import EvaluateFacts, MetricValue, Mistake, SliceFacts, Task
from millrace.core.ports import Context
from millrace.core.spec import Evaluate, Spec
from millrace.formats.dataset import DatasetReader, open_dataset
from millrace.formats.session import open_session
from millrace.stats.metrics import METRICS, chosen_metrics, confusion_matrix, interval, score

_CHUNK = 1024
_MISTAKES = 12
_SCATTER = 500
_VALUES = 20  # a column with more distinct numbers is cut into quarters
_SLICES = 40  # of one column at most, the largest


class Predictions(msgspec.Struct, frozen=True, kw_only=True):
    """The test rows: int64 class indices and float32 [rows, classes] probabilities, or float32 values."""

    expected: np.ndarray
    answers: np.ndarray
    probabilities: np.ndarray | None

    def part(self, rows: np.ndarray) -> Predictions:
        """Some rows."""
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        return Predictions(expected=self.expected[rows], answers=self.answers[rows], probabilities=probabilities)


def evaluate(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Run the evaluate step: output `predictions` holds `test.npz`.

    Args:
        spec: The whole spec; `evaluate` is used.
        ctx: Inputs `data.dataset` and `export.onnx`.

    Returns:
        `EvaluateFacts` as plain data.

    Raises:
        DataError: The test split has no rows.
        InputError: A metric or a slice's column does not exist.
        StageError: The graph fails.
    """
    reader = open_dataset(ctx.input("data.dataset"))
    manifest = reader.manifest
    names = chosen_metrics(spec.evaluate.metrics, manifest.task)
    if not manifest.rows.get("test"):
        raise DataError("the test split has no rows: nothing to evaluate on", hint="raise data.split.test")
    found = predict(reader, ctx.input("export.onnx") / "model.onnx")
    folder = ctx.scratch / "predictions"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stored = {"expected": found.expected, "answers": found.answers}
    if found.probabilities is not None:
        stored["probabilities"] = found.probabilities
    np.savez(folder / "test.npz", **stored)  # pyright: ignore[reportArgumentType]
    ctx.output("predictions", folder)
    facts = make_facts(reader, found, names, spec.evaluate)
    for value in facts.metrics:
        ctx.log_metric(f"test_{value.name}", value.value, 0)
    ctx.progress(1, 1, f"{names[0]} {facts.metrics[0].value:.4g} on {facts.rows} rows")
    return msgspec.to_builtins(facts)


def predict(reader: DatasetReader, model: Path) -> Predictions:
    """The graph's answers on every test row."""
    session = open_session(model)
    name = session.outputs[0].name
    tensors, expected = reader.arrays("test"), reader.labels("test")
    parts = [
        session.run({key: value[start : start + _CHUNK] for key, value in tensors.items()})[name]
        for start in range(0, len(expected), _CHUNK)
    ]
    output = np.concatenate(parts)
    if reader.manifest.task == "regression":
        return Predictions(expected=expected, answers=output[:, 0], probabilities=None)
    return Predictions(expected=expected, answers=output.argmax(axis=1).astype(np.int64), probabilities=output)


def make_facts(reader: DatasetReader, found: Predictions, names: list[str], wanted: Evaluate) -> EvaluateFacts:
    """Everything that is said of the predictions.

    Args:
        reader: The dataset.
        found: Answers on the test rows.
        names: Metrics; the first decides.
        wanted: The spec's section: confidence and slices.
    """
    manifest = reader.manifest
    is_classification = manifest.task == "classification"
    classes = len(manifest.classes)
    confusion = confusion_matrix(found.expected, found.answers, classes).tolist() if is_classification else []
    return EvaluateFacts(
        rows=len(found.expected),
        task=manifest.task,
        metrics=[_metric(name, found, wanted.confidence) for name in names],
        confidence=wanted.confidence,
        slices=[part for column in wanted.slices for part in _slices(reader, column, found, names[0], wanted)],
        confusion=confusion,
        classes=manifest.classes,
        mistakes=_mistakes(reader, found),
        image=manifest.image,
        baseline=_baseline(reader, found, names[0], manifest.task),
        scatter=[] if is_classification else _scatter(found),
    )


def _metric(name: str, found: Predictions, confidence: float) -> MetricValue:
    low, high = interval(name, found.expected, found.answers, found.probabilities, confidence)
    return MetricValue(
        name=name,
        value=score(name, found.expected, found.answers, found.probabilities),
        low=low,
        high=high,
        higher_is_better=METRICS[name].higher_is_better,
    )


def _slices(reader: DatasetReader, column: str, found: Predictions, metric: str, wanted: Evaluate) -> list[SliceFacts]:
    names = [schema.name for schema in reader.manifest.columns]
    if column not in names:
        raise InputError(f"evaluate.slices: there is no column {column!r}", hint=f"want one of {', '.join(names[:30])}")
    if column in reader.manifest.image_columns:
        raise InputError(f"evaluate.slices: column {column!r} is part of an image", hint="name another column")
    facts = []
    for value, rows in _groups(reader.table("test", [column]).column(column).to_pylist()):
        part = found.part(rows)
        low, high = interval(metric, part.expected, part.answers, part.probabilities, wanted.confidence)
        value_of = score(metric, part.expected, part.answers, part.probabilities)
        facts.append(SliceFacts(column=column, value=value, rows=len(rows), score=value_of, low=low, high=high))
    return facts


def _groups(values: list[Any]) -> list[tuple[str, np.ndarray]]:
    """Rows by value; many different numbers by quarters. Missing values are a group of their own.

    Example:
        >>> [(value, rows.tolist()) for value, rows in _groups(["b", "a", None, "b"])]
        [('a', [1]), ('b', [0, 3]), ('missing', [2])]
    """
    present = [value for value in values if value is not None]
    distinct = set(present)
    is_number = bool(present) and all(isinstance(value, int | float) for value in present)
    if is_number and len(distinct) > _VALUES:
        edges = np.quantile(np.array(present, float), [0.25, 0.5, 0.75])
        names = [f"< {edges[0]:.4g}", *(f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges))]
        names.append(f">= {edges[2]:.4g}")
        keys = [None if value is None else names[int(np.searchsorted(edges, value, "right"))] for value in values]
        order: list[Any] = [*names, None]
    else:
        keys = values
        order = [*sorted(distinct), None]
    places: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    kept = sorted(places, key=lambda key: -len(places[key]))[:_SLICES]
    return [
        ("missing" if key is None else str(key), np.array(places[key]))
        for key in dict.fromkeys(order)
        if key in places and key in kept
    ]


def _mistakes(reader: DatasetReader, found: Predictions) -> list[Mistake]:
    """The wrong answers the model was surest of, or the largest errors."""
    if found.probabilities is not None:
        wrong = np.flatnonzero(found.answers != found.expected)
        sure = found.probabilities.max(axis=1)
        chosen = wrong[np.argsort(-sure[wrong], kind="stable")][:_MISTAKES]
    else:
        sure = None
        chosen = np.argsort(-np.abs(found.answers.astype(np.float64) - found.expected), kind="stable")[:_MISTAKES]
    if len(chosen) == 0:
        return []
    manifest = reader.manifest
    pixels = reader.arrays("test")["pixels"] if manifest.image is not None else None
    records = reader.rows("test", chosen)

    def named(value: Any) -> Any:
        return float(value) if found.probabilities is None else manifest.classes[int(value)]

    return [
        Mistake(
            row=int(row),
            expected=named(found.expected[row]),
            predicted=named(found.answers[row]),
            confidence=None if sure is None else float(sure[row]),
            pixels=None if pixels is None else [float(value) for value in pixels[row]],
            record={} if pixels is not None else record,
        )
        for row, record in zip(chosen.tolist(), records, strict=True)
    ]


def _baseline(reader: DatasetReader, found: Predictions, metric: str, task: Task) -> float | None:
    """The deciding metric of always answering as the training rows do: the commonest class, or the mean."""
    labels = reader.labels("train")
    if len(labels) == 0:
        return None
    if task == "regression":
        answers = np.full(len(found.expected), labels.mean(dtype=np.float64))
        return score(metric, found.expected, answers)
    counts = np.bincount(labels, minlength=len(reader.manifest.classes))
    shares = np.tile((counts / counts.sum()).astype(np.float32), (len(found.expected), 1))
    return score(metric, found.expected, shares.argmax(axis=1), shares)


def _scatter(found: Predictions) -> list[list[float]]:
    rows = np.linspace(0, len(found.expected) - 1, min(_SCATTER, len(found.expected))).astype(int)
    return [[float(found.expected[row]), float(found.answers[row])] for row in rows]
