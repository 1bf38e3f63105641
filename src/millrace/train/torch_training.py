"""Training with PyTorch: the user's module in our loop, or the user's own loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from millrace.core import extras
from millrace.core.errors import DataError, InputError, StageError
from millrace.core.facts import TrainFacts
from millrace.core.ids import digest_json
from millrace.core.ports import Context
from millrace.core.spec import Spec, Train
from millrace.formats.dataset import DatasetReader, Manifest
from millrace.formats.feed import Feed, open_feed
from millrace.stats.metrics import METRICS, chance_margin, chosen_metrics, score
from millrace.train.checkpoint import CheckpointStore
from millrace.train.class_weights import class_weights
from millrace.train.graphs import Answer, assemble
from millrace.train.loop import Hooks, State, Trainer, Validation
from millrace.train.model_file import WEIGHTS, ModelFile, write_graph, write_model_file
from millrace.train.preprocess import Preprocess, plan_preprocess
from millrace.train.torch_export import core_graph
from millrace.train.usercode import ModelContext, is_full_control, load_function

_IN_MEMORY_BYTES = 1 << 29  # of features; larger splits are read from the memory-mapped cache batch by batch
_CHUNK = 1024


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """How a number to predict is scaled while training."""

    mean: float = 0.0
    sd: float = 1.0


class TensorRows:
    """A split as tensors; small ones are prepared once, large ones batch by batch, with the same bits.

    Args:
        feed: Raw tensors and answers.
        preprocess: Raw → features.
        target: For a number to predict; None: class indices.
        device: Where tensors go.
    """

    def __init__(self, feed: Feed, preprocess: Preprocess, target: Target | None, device: str) -> None:
        self.rows = feed.rows
        self._feed, self._preprocess, self._device = feed, preprocess, device
        labels = np.array(feed.labels)
        if target is not None:
            labels = ((labels.astype(np.float64) - target.mean) / target.sd).astype(np.float32).reshape(-1, 1)
        self._answers = torch.from_numpy(labels).to(device)
        self._features: torch.Tensor | None = None
        if feed.rows * int(np.prod(preprocess.shape)) * 4 <= _IN_MEMORY_BYTES:
            self._features = torch.from_numpy(preprocess.transform(feed.arrays)).to(device)

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and answers of some rows."""
        answers = self._answers.index_select(0, indices)
        if self._features is not None:
            return self._features.index_select(0, indices), answers
        chosen = indices.cpu().numpy()
        arrays = {name: values[chosen] for name, values in self._feed.arrays.items()}
        return torch.from_numpy(self._preprocess.transform(arrays)).to(self._device), answers

    def chunks(self) -> list[torch.Tensor]:
        """Row numbers in order, some at a time."""
        return list(torch.arange(self.rows, device=self._device).split(_CHUNK))


def predict(module: nn.Module, rows: TensorRows) -> np.ndarray:
    """The module's raw outputs on every row, in evaluation mode.

    Returns:
        float32 [rows, outputs].
    """
    module.eval()
    with torch.inference_mode():
        found = [module(rows.take(chunk)[0]).float().cpu().numpy() for chunk in rows.chunks()]
    return np.concatenate(found)


def train_torch(spec: Spec, ctx: Context, reader: DatasetReader, folder: Path) -> TrainFacts:
    """Train and write the model's tree into `folder`.

    Args:
        spec: The whole spec.
        ctx: The step's context.
        reader: The dataset.
        folder: Empty.

    Raises:
        InputError: The user's function is missing or gives something else.
        StageError: The training failed; see `Trainer.run`.
    """
    started = time.monotonic()
    torch.set_num_threads(ctx.threads)
    torch.backends.cudnn.deterministic = True
    device = _device(spec.train, ctx)
    function = load_function(spec.train.model, ctx.project_dir)
    context = open_context(spec, ctx, reader, device)
    torch.default_generator.manual_seed(ctx.seed)
    made = function(context)
    if not isinstance(made, nn.Module):
        raise InputError(f"{spec.train.model} must return a torch.nn.Module, got {type(made).__name__}")
    if is_full_control(spec.train.model):
        state = State()
        answer = _answer(reader.manifest, Target())
        _write_own(made.to("cpu").eval(), spec, context, answer, reader, folder)
        resumed_from = None
    else:
        target = _target(reader.manifest, context)
        answer = _answer(reader.manifest, target or Target())
        with _logging(spec.train, ctx) as log:
            trainer = _trainer(made.to(device), spec, ctx, context, target, log)
            state, resumed_from = trainer.run(), trainer.resumed_from
        (folder / WEIGHTS).write_bytes(save(_plain(made.state_dict())))
        write_model_file(folder, _model_file(spec, "weights", context, answer))
    return TrainFacts(
        framework="torch",
        model=spec.train.model,
        metric=chosen_metrics(spec.evaluate.metrics, reader.manifest.task)[0],
        epochs=state.epochs,
        best_epoch=state.best_epoch,
        best_score=state.best_score,
        parameters=sum(parameter.numel() for parameter in made.parameters()),
        duration_s=state.elapsed_s or time.monotonic() - started,
        device=device,
        precision=spec.train.precision,
        resumed_from_step=resumed_from,
    )


def open_context(spec: Spec, ctx: Context, reader: DatasetReader, device: str = "cpu") -> ModelContext:
    """What the user's function is given; the same in `train` and `export`."""
    feed = open_feed(reader.folder, "train", ctx.scratch / "feed")
    return ModelContext(spec, ctx, reader, plan_preprocess(reader.manifest, feed.arrays), device)


def _device(train: Train, ctx: Context) -> str:
    """Where to train; cuda and mps are not tested."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = "cpu" if ctx.device == "auto" else ctx.device
    if available.get(wanted.partition(":")[0], False):
        return wanted
    if train.device == "auto":
        return "cpu"
    raise StageError(f"train.device is {wanted}, which this PyTorch does not see here", hint="use device: auto")


def _target(manifest: Manifest, context: ModelContext) -> Target | None:
    if manifest.task == "classification":
        return None
    labels = np.asarray(context.feed("train").labels, np.float64)
    deviation = float(labels.std())
    return Target(mean=float(labels.mean()), sd=deviation if deviation > 0 else 1.0)


def _answer(manifest: Manifest, target: Target) -> Answer:
    if manifest.task == "classification":
        return Answer(kind="logits", classes=len(manifest.classes))
    return Answer(kind="value", mean=target.mean, sd=target.sd)


def _model_file(
    spec: Spec, holds: Literal["weights", "graph"], context: ModelContext, answer: Answer, exporter: str = ""
) -> ModelFile:
    return ModelFile(
        framework="torch",
        reference=spec.train.model,
        holds=holds,
        preprocess=context.preprocess,
        answer=answer,
        exporter=exporter,
    )


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _trainer(
    module: nn.Module,
    spec: Spec,
    ctx: Context,
    context: ModelContext,
    target: Target | None,
    log: Callable[[str, float, int], None],
) -> Trainer:
    rows = TensorRows(context.feed("train"), context.preprocess, target, context.device)
    if rows.rows == 0:
        raise DataError("the training split has no rows", hint="lower data.split.test or data.split.validation")
    loss = make_loss(spec.train, context, np.asarray(context.feed("train").labels))
    metric = chosen_metrics(spec.evaluate.metrics, context.task)[0]
    fingerprint = digest_json(
        [
            msgspec.to_builtins(spec.train),
            ctx.seed,
            rows.rows,
            msgspec.to_builtins(context.preprocess),
            [[name, list(tensor.shape)] for name, tensor in module.state_dict().items()],
        ]
    )
    hooks = Hooks(
        loss=loss,
        validate=_validator(context, target, loss, metric),
        log=log,
        metric=metric,
        higher_is_better=METRICS[metric].higher_is_better,
    )
    return Trainer(module, rows, spec.train, ctx, hooks, CheckpointStore(ctx.checkpoints, fingerprint))


@contextlib.contextmanager
def _logging(train: Train, ctx: Context) -> Iterator[Callable[[str, float, int], None]]:
    """Points go to the run and, when the spec wants it, to TensorBoard's event files beside the spec."""
    if not train.tensorboard:
        yield ctx.log_metric
        return
    board = extras.load("millrace.train.tensorboard:TensorBoard")(ctx.project_dir / "tensorboard")

    def log(name: str, value: float, step: int) -> None:
        ctx.log_metric(name, value, step)
        board.scalar(name, value, step)

    try:
        yield log
    finally:
        board.close()


def make_loss(
    train: Train, context: ModelContext, labels: np.ndarray
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Cross entropy with the spec's class weights, or the mean squared error; both check the shape first.

    Args:
        train: The spec's section.
        context: The task and its classes.
        labels: The training rows' answers, for `class_weights: balanced`.
    """
    outputs, reference = context.outputs, train.model
    if context.task == "classification":
        weights = class_weights(train.class_weights, context.class_names, labels)
        tensor = None if weights is None else torch.from_numpy(weights).to(context.device)
        criterion: nn.Module = nn.CrossEntropyLoss(weight=tensor)
    else:
        criterion = nn.MSELoss()

    def loss(output: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise StageError(f"{reference}: forward() must return a tensor, got {type(output).__name__}")
        if output.ndim == 1 and outputs == 1:
            output = output.unsqueeze(1)
        if output.ndim != 2 or output.shape[1] != outputs or output.shape[0] != answers.shape[0]:
            rows = answers.shape[0]
            raise StageError(
                f"{reference}: the output for {rows} rows has the wrong shape: want [N, {outputs}] "
                f"([{rows}, {outputs}]), got {list(output.shape)}",
                hint="let the last layer give ctx.outputs numbers per row",
            )
        return criterion(output, answers)

    return loss


def _validator(
    context: ModelContext,
    target: Target | None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    metric: str,
) -> Callable[[nn.Module], Validation | None]:
    feed = context.feed("validation")
    rows = TensorRows(feed, context.preprocess, target, context.device)
    labels = np.asarray(feed.labels)
    answer = Answer(kind="logits") if target is None else Answer(kind="value", mean=target.mean, sd=target.sd)

    def validate(module: nn.Module) -> Validation | None:
        if rows.rows == 0:
            return None
        outputs = torch.from_numpy(predict(module, rows)).to(context.device)
        answers = rows.take(torch.arange(rows.rows, device=context.device))[1]
        finished = answer.finish(outputs.cpu().numpy())
        probabilities = finished if target is None else None
        found = finished.argmax(axis=1) if target is None else finished[:, 0]
        return Validation(
            loss=float(loss(outputs, answers)),
            score=score(metric, labels, found, probabilities),
            margin=chance_margin(metric, labels, found, probabilities),
        )

    return validate


def _write_own(
    module: nn.Module, spec: Spec, context: ModelContext, answer: Answer, reader: DatasetReader, folder: Path
) -> None:
    """A module that the user trained cannot be rebuilt later: its graph is made now."""
    target = None if context.task == "classification" else Target()
    expected = answer.finish(predict(module, TensorRows(context.feed("test"), context.preprocess, target, "cpu")))
    core, exporter = core_graph(module, context.preprocess.shape)
    write_graph(folder, assemble(core, reader.signature_inputs(), context.preprocess, answer), expected)
    write_model_file(folder, _model_file(spec, "graph", context, answer, exporter))
