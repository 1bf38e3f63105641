"""Make every recipe's variant, drop what is unusable, certify in a label-free order, time, choose."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import onnx

from millrace.compress.choose import choose, describe
from millrace.compress.graph import parse_model, shape_of_work
from millrace.compress.guard import DEFAULT_DROP, Candidate, Limits, certify, signal_to_noise
from millrace.compress.recipes import DYNAMIC, RECIPES, Material, Recipe
from millrace.compress.trees import TrainingRows
from millrace.core.errors import InputError, MillraceError
from millrace.core.facts import CompressFacts, GuaranteeFacts, LatencyFacts, Task, VariantFacts
from millrace.core.spec import Compress
from millrace.formats.cpu import cpu_flags
from millrace.formats.meter import Budget, choose_clock, measure_interleaved
from millrace.formats.session import ORT_ERRORS, Session, open_session

Tensors = Mapping[str, np.ndarray]
BASE = "fp32"
_MIN_SNR_DB = 8.0
_LATENCY_BUDGET_S = 2.0
# what onnx and onnxruntime's quantiser raise on graphs they cannot handle
_TOOL_ERRORS = (
    MillraceError, *ORT_ERRORS, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError,
    AssertionError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError,
)  # fmt: skip


def _silent(done: float, total: float, text: str = "") -> None:
    """Progress that nobody wants to see."""


@dataclass
class Job:
    """A model and real rows. `calibration` and `ordering` carry no labels and no test rows."""

    model: bytes
    task: Task
    output: str
    calibration: Tensors
    ordering: Tensors
    test: Tensors
    expected: np.ndarray
    training: TrainingRows | None = None
    options: Compress = field(default_factory=Compress)
    threads: int = 1
    metric: str = ""
    progress: Callable[[float, float, str], None] = _silent
    latency_budget_s: float = _LATENCY_BUDGET_S


@dataclass(frozen=True)
class Variant:
    """A candidate that loads and answers; `answers` are those on the test rows."""

    recipe: Recipe
    data: bytes
    session: Session
    snr_db: float
    answers: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Facts for people, and the bytes of what is certified."""

    facts: CompressFacts
    files: dict[str, bytes]
    guarantees: dict[str, GuaranteeFacts]
    order: list[Variant]


def search(job: Job) -> Outcome:
    """Compress a model under the guard.

    Args:
        job: The model, the rows, what the spec wants.

    Returns:
        What was made, certified, timed and chosen. Only certified variants have files: latency selects
        among them, it never decides which there are.

    Raises:
        InputError: `compress.variants` names a recipe that does not exist.
        CorruptError: The base itself does not load.
        StageError: The base fails on the rows.
    """
    options = job.options
    base = open_session(job.model, threads=job.threads)
    batch = max(options.batch_sizes)
    material = Material(job.model, job.calibration, job.training)
    skipped: list[dict[str, str]] = []
    recipes = _applicable(material, options, skipped)
    order_scores = answer_rows(base, job.ordering, job.output, batch)
    variants: list[Variant] = []
    for index, recipe in enumerate(recipes):
        job.progress(index, len(recipes) + 2, f"making {recipe.name}")
        made = _make(recipe, material, base, job, order_scores)
        if isinstance(made, str):
            skipped.append({"name": recipe.name, "reason": made})
        else:
            variants.append(made)
    variants.sort(key=_risk)
    job.progress(len(recipes), len(recipes) + 2, "certifying")
    guarantees = _certify(job, base, variants, batch)
    job.progress(len(recipes) + 1, len(recipes) + 2, "timing")
    latency = _time(job, base, variants)
    facts = _report(job, variants, guarantees, latency, skipped)
    files = {v.recipe.name: v.data for v in variants if guarantees[v.recipe.name].status == "certified"}
    return Outcome(facts, files, guarantees, variants)


def _risk(variant: Variant) -> tuple[bool, bool, float, str]:
    """Safest first, without any label: replacements last, before them what depends on a batch's other rows."""
    recipe = variant.recipe
    return recipe.is_replacement, recipe.acts == DYNAMIC, -variant.snr_db, recipe.name


def answer_rows(session: Session, tensors: Tensors, output: str, batch: int) -> np.ndarray:
    """A model's scores on rows, in batches as they are served.

    Dynamic int8 takes its ranges from the whole batch, so the size is part of the answer.

    Args:
        session: The open model.
        tensors: Inputs by name, equal numbers of rows.
        output: The output to keep.
        batch: Rows per call.

    Returns:
        [rows, columns] of float; a one-dimensional output becomes one column.
    """
    rows = len(next(iter(tensors.values())))
    parts = [
        session.run({name: array[start : start + batch] for name, array in tensors.items()})[output]
        for start in range(0, rows, batch)
    ]
    scores = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    return scores.reshape(len(scores), -1)


def _answers(scores: np.ndarray, task: Task) -> np.ndarray:
    return scores.argmax(axis=1).astype(np.int64) if task == "classification" else scores[:, 0].astype(np.float64)


def _applicable(material: Material, options: Compress, skipped: list[dict[str, str]]) -> list[Recipe]:
    if options.variants == "none":
        return []
    is_auto = options.variants == "auto"
    if not is_auto:
        _check_names(options.variants)
    kept = []
    for recipe in RECIPES.values():
        if recipe.name not in options.variants if not is_auto else not recipe.is_automatic:
            continue
        reason = recipe.refuses(material.profile)
        if reason is None and recipe.is_replacement and not options.allow_replacement:
            reason = "a replacement answers differently: allow it with compress.allow_replacement: true"
        if reason is None:
            kept.append(recipe)
        elif not (is_auto and recipe.is_replacement and not material.profile.has_trees):
            skipped.append({"name": recipe.name, "reason": reason})
    return kept


def _check_names(names: object) -> None:
    unknown = [name for name in names if name not in RECIPES] if isinstance(names, list) else [str(names)]
    if unknown:
        close = difflib.get_close_matches(unknown[0], RECIPES, n=1)
        raise InputError(
            f"compress.variants names {unknown[0]!r}; there are {', '.join(RECIPES)}",
            hint=f"did you mean {close[0]!r}?" if close else "use one of these names, or auto",
        )


def _make(recipe: Recipe, material: Material, base: Session, job: Job, order_scores: np.ndarray) -> Variant | str:
    """The variant, or the reason why it is dropped."""
    try:
        data = recipe.build(material)
    except _TOOL_ERRORS as error:
        return f"could not be made: {_first_line(error)}"
    try:
        session = open_session(data, threads=job.threads)
        scores = answer_rows(session, job.ordering, job.output, max(job.options.batch_sizes))
        test_scores = answer_rows(session, job.test, job.output, max(job.options.batch_sizes))
    except (MillraceError, KeyError) as error:
        return f"did not load or run: {_first_line(error)}"
    if _interface(session) != _interface(base):
        return "inputs or outputs differ from the base's"
    if not (np.isfinite(scores).all() and np.isfinite(test_scores).all()):
        return "answers that are not finite"
    if shape_of_work(parse_model(data)) == shape_of_work(material.model):
        return "the graph is unchanged"
    snr_db = signal_to_noise(order_scores, scores, job.task)
    if snr_db < _MIN_SNR_DB and not recipe.is_replacement:
        return f"too noisy: {snr_db:.1f} dB against the base, {_MIN_SNR_DB:g} are needed"
    if recipe.is_replacement and len(data) >= len(job.model):
        return "not smaller than the base"
    return Variant(recipe, data, session, snr_db, _answers(test_scores, job.task))


def _interface(session: Session) -> list[tuple[str, str]]:
    return [(spec.name, spec.dtype) for spec in (*session.inputs, *session.outputs)]


def _certify(job: Job, base: Session, variants: list[Variant], batch: int) -> dict[str, GuaranteeFacts]:
    limits = Limits(
        task=job.task,
        max_drop=DEFAULT_DROP[job.task] if job.options.max_drop is None else float(job.options.max_drop),
        max_changed=float(job.options.max_changed),
        confidence=job.options.confidence,
        metric=job.metric,
    )
    base_answers = _answers(answer_rows(base, job.test, job.output, batch), job.task)
    candidates = [Candidate(v.recipe.name, v.answers, v.recipe.is_replacement) for v in variants]
    return certify(base_answers, candidates, job.expected, limits)


def _time(job: Job, base: Session, variants: list[Variant]) -> dict[str, list[LatencyFacts]]:
    sessions = {BASE: base} | {variant.recipe.name: variant.session for variant in variants}
    latency: dict[str, list[LatencyFacts]] = {name: [] for name in sessions}
    budget = Budget(time_s=job.latency_budget_s / len(job.options.batch_sizes), confidence=job.options.confidence)
    for size in job.options.batch_sizes:
        rows = {name: _take(array, size) for name, array in job.ordering.items()}
        calls = {name: functools.partial(session.raw.run, None, rows) for name, session in sessions.items()}
        timings = measure_interleaved(calls, BASE, budget, choose_clock(job.threads))
        for name, timing in timings.items():
            latency[name].append(
                LatencyFacts(
                    batch_size=size, p50_s=timing.p50_s, speedup=timing.speedup, low=timing.low, high=timing.high
                )
            )
    return latency


def _take(array: np.ndarray, rows: int) -> np.ndarray:
    return np.ascontiguousarray(np.resize(array, (rows, *array.shape[1:])) if len(array) < rows else array[:rows])


def _report(
    job: Job,
    variants: list[Variant],
    guarantees: dict[str, GuaranteeFacts],
    latency: dict[str, list[LatencyFacts]],
    skipped: list[dict[str, str]],
) -> CompressFacts:
    size = len(job.model)
    base = VariantFacts(name=BASE, size_bytes=size, size_ratio=1.0, snr_db=None, guarantee=None, latency=latency[BASE])
    rows = [base]
    for variant in variants:
        name = variant.recipe.name
        entry = VariantFacts(
            name=name,
            size_bytes=len(variant.data),
            size_ratio=size / len(variant.data),
            snr_db=variant.snr_db if math.isfinite(variant.snr_db) else None,
            guarantee=guarantees[name],
            latency=latency[name],
            is_replacement=variant.recipe.is_replacement,
            needs_vnni=variant.recipe.needs_vnni,
        )
        rows.append(msgspec.structs.replace(entry, note=describe(entry, variant.recipe.acts == DYNAMIC)))
    chosen, why = choose(rows, job.options)
    if not variants and skipped:
        reasons = dict.fromkeys(entry["reason"] for entry in skipped)
        why = f"no variant was made: {'; '.join(reasons)}"
    max_drop = DEFAULT_DROP[job.task] if job.options.max_drop is None else float(job.options.max_drop)
    return CompressFacts(
        variants=rows,
        chosen=chosen,
        why=why,
        rows=len(job.expected),
        max_drop=max_drop,
        max_changed=float(job.options.max_changed),
        confidence=job.options.confidence,
        threads=job.threads,
        cpu_flags=cpu_flags(),
        skipped=skipped,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
