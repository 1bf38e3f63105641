"""Rebuilding a trained module from its weights, for the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from millrace.core.errors import CorruptError, InputError, StageError
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.dataset import DatasetReader
from millrace.train.export import compare
from millrace.train.graphs import assemble
from millrace.train.model_file import WEIGHTS, read_model_file
from millrace.train.torch_export import core_graph
from millrace.train.torch_training import Target, TensorRows, open_context, predict
from millrace.train.usercode import load_function


def export_weights(
    spec: Spec, ctx: Context, reader: DatasetReader, folder: Path, tensors: dict[str, np.ndarray]
) -> tuple[bytes, np.ndarray, str]:
    """Build the user's module again, load its weights and make the graph.

    Args:
        spec: The whole spec.
        ctx: The step's context.
        reader: The dataset.
        folder: The tree of `train`.
        tensors: Real rows, raw.

    Returns:
        The graph; PyTorch's own answers on those rows; the exporter's name.

    Raises:
        StageError: The weights do not fit the module, or it cannot be exported.
        CorruptError: The weights cannot be read.
    """
    torch.set_num_threads(ctx.threads)
    model = read_model_file(folder)
    context = open_context(spec, ctx, reader)
    torch.default_generator.manual_seed(ctx.seed)
    module = load_function(model.reference, ctx.project_dir)(context)
    if not isinstance(module, nn.Module):
        raise InputError(f"{model.reference} must return a torch.nn.Module, got {type(module).__name__}")
    module = module.to("cpu")
    _load_weights(module, folder / WEIGHTS, model.reference)
    target = None if reader.manifest.task == "classification" else Target()
    rows = TensorRows(context.feed(model.verified_on), model.preprocess, target, "cpu")
    expected = model.answer.finish(predict(module, rows)) if rows.rows else np.zeros((0, context.outputs), np.float32)
    inputs = reader.signature_inputs()

    def whole(core: onnx.ModelProto) -> bytes:
        return assemble(core, inputs, model.preprocess, model.answer)

    def is_good(core: onnx.ModelProto) -> bool:
        try:
            return compare(whole(core), tensors, expected).is_good
        except (StageError, CorruptError):
            return False

    core, exporter = core_graph(module, model.preprocess.shape, is_good)
    return whole(core), expected, exporter


def _load_weights(module: nn.Module, path: Path, reference: str) -> None:
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"the model's {path.name} cannot be read") from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise StageError(f"{reference} builds another module than the one that was trained: {text}") from error
