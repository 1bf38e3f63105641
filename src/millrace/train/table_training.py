"""Training with scikit-learn and LightGBM: converted to ONNX at once, since pickle is never written."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from millrace.core.errors import DataError
from millrace.core.facts import TrainFacts
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.dataset import DatasetReader
from millrace.formats.feed import Feed
from millrace.stats.metrics import chosen_metrics
from millrace.train.automl import choose, evaluate_fit
from millrace.train.class_weights import class_weights
from millrace.train.frameworks import Fitted, Table, fit_own
from millrace.train.frameworks_table import framework_of
from millrace.train.graphs import Answer, assemble
from millrace.train.model_file import ModelFile, write_graph, write_model_file
from millrace.train.preprocess import Preprocess, plan_preprocess
from millrace.train.usercode import ModelContext, load_function

_CANDIDATES = {"auto": ["linear", "boosting"], "linear": ["linear"], "boosting": ["boosting"]}


def train_tables(spec: Spec, ctx: Context, reader: DatasetReader, folder: Path) -> TrainFacts:
    """Train, convert, and write the model's tree into `folder`.

    Args:
        spec: The whole spec.
        ctx: The step's context.
        reader: The dataset.
        folder: Empty.

    Raises:
        DataError: The training rows have one class, or there are none.
        InputError: The user's function is missing or gives no estimator.
        StageError: The model cannot be converted.
    """
    started = time.monotonic()
    manifest = reader.manifest
    context = ModelContext(spec, ctx, reader, Preprocess(pixels=1), "cpu")
    feed = context.feed("train")
    preprocess = plan_preprocess(manifest, feed.arrays, flat=True)
    table, answer = make_table(spec, ctx, reader, preprocess, feed, context.feed("validation"))
    metric = chosen_metrics(spec.evaluate.metrics, manifest.task)[0]
    if ":" in spec.train.model:
        np.random.seed(ctx.seed % 2**32)  # what estimators without random_state draw from
        context = ModelContext(spec, ctx, reader, preprocess, "cpu")
        estimator = load_function(spec.train.model, ctx.project_dir)(context)
        name, fitted = spec.train.model, fit_own(estimator, table, spec.train.model)
        candidates = [{"name": name, "score": _own_score(fitted, table, metric), "chosen": True, "how": "validation"}]
    else:
        names = ["boosting"] if framework_of(spec.train) == "lightgbm" else _CANDIDATES[spec.train.model]
        name, fitted, candidates = choose(table, metric, names, lambda done, text: ctx.progress(done, len(names), text))
    _write(spec, reader, preprocess, answer, fitted, context, folder)
    chosen = next(line for line in candidates if line["chosen"])
    ctx.log_metric(f"validation_{metric}", chosen["score"], 0)
    best = min(fitted.epochs, key=lambda facts: facts.validation_loss or facts.loss, default=None)
    return TrainFacts(
        framework="lightgbm" if name == "boosting" else framework_of(spec.train),
        model=name,
        metric=metric,
        epochs=fitted.epochs,
        best_epoch=best.epoch if best else None,
        best_score=chosen["score"],
        parameters=fitted.parameters,
        duration_s=time.monotonic() - started,
        candidates=candidates,
    )


def make_table(
    spec: Spec, ctx: Context, reader: DatasetReader, preprocess: Preprocess, train: Feed, validation: Feed
) -> tuple[Table, Answer]:
    """Features and answers, and what the graph's output will mean.

    Raises:
        DataError: Nothing can be learnt from the training rows.
    """
    manifest = reader.manifest
    labels = np.array(train.labels)
    if len(labels) == 0:
        raise DataError("the training split has no rows", hint="lower data.split.test or data.split.validation")
    features = preprocess.transform(train.arrays)
    held_out = preprocess.transform(validation.arrays) if validation.rows else None
    held_labels = np.array(validation.labels)
    weights = None
    if manifest.task == "classification":
        present = np.unique(labels)
        if len(present) < 2:
            raise DataError(
                f"every training row has the label {manifest.classes[int(present[0])]!r}: want two classes or more",
                hint="add rows of other classes, or name another label",
            )
        by_class = class_weights(spec.train.class_weights, manifest.classes, labels)
        weights = None if by_class is None else by_class[labels]
        answer = Answer(kind="probabilities", classes=len(manifest.classes), present=present.tolist())
        labels = np.searchsorted(present, labels)
        if held_out is not None:  # a class that no training row has cannot be learnt
            known = np.isin(held_labels, present)
            held_out, held_labels = held_out[known], np.searchsorted(present, held_labels[known])
    else:
        answer = _value_answer(spec, labels)
        labels = (labels.astype(np.float64) - answer.mean) / answer.sd
        held_labels = (held_labels.astype(np.float64) - answer.mean) / answer.sd
    table = Table(
        features=features,
        answers=labels,
        task=manifest.task,
        present=list(answer.present),
        unit=answer.sd,
        weights=weights,
        validation_features=held_out,
        validation_answers=held_labels if held_out is not None else None,
        seed=ctx.seed,
        threads=ctx.threads,
        params=spec.train.params,
    )
    return table, answer


def _value_answer(spec: Spec, labels: np.ndarray) -> Answer:
    """Numbers to predict are scaled, so that float32 in the graph suffices; not for a user's own estimator."""
    deviation = float(labels.std(dtype=np.float64))
    if ":" in spec.train.model:
        return Answer(kind="value")
    return Answer(kind="value", mean=float(labels.mean(dtype=np.float64)), sd=deviation if deviation > 0 else 1.0)


def _own_score(fitted: Fitted, table: Table, metric: str) -> float:
    features, answers = table.validation_features, table.validation_answers
    if features is None or answers is None or len(answers) == 0:
        features, answers = table.features, table.answers
    return evaluate_fit(fitted, table, features, answers, metric)


def _write(
    spec: Spec,
    reader: DatasetReader,
    preprocess: Preprocess,
    answer: Answer,
    fitted: Fitted,
    context: ModelContext,
    folder: Path,
) -> None:
    split = next(name for name in ("test", "validation", "train") if reader.manifest.rows.get(name))
    expected = answer.finish(fitted.predict(preprocess.transform(context.feed(split).arrays)))
    core, output = fitted.graph()
    write_graph(folder, assemble(core, reader.signature_inputs(), preprocess, answer, output), expected)
    model = ModelFile(
        framework=framework_of(spec.train),
        reference=spec.train.model,
        holds="graph",
        preprocess=preprocess,
        answer=answer,
        exporter=fitted.exporter,
        verified_on=split,
    )
    write_model_file(folder, model)
