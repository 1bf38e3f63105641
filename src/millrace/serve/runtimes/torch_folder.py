"""Weights of a folder (`model.safetensors`) in the module that its `model.py` builds; runs in a model's own process."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from millrace.core.errors import CorruptError, InputError, NotFoundError, StageError
from millrace.core.source_code import load_source
from millrace.serve.runtimes.declared import NAMES, Declared, declared, unknown_name

CODE, WEIGHTS, DOCUMENT = "model.py", "model.safetensors", "model.json"
_DOCUMENT_NAMES = (*NAMES, "params", "gives")


class BuildContext:
    """What `build(ctx)` is given, as in training: `outputs`, `classes`, `features`, `params` and so on."""

    def __init__(self, found: Declared, params: Mapping[str, Any], threads: int) -> None:
        signature = found.signature
        shape = signature.inputs[0].shape[1:]
        self.seed = 0
        self.task = signature.task
        self.class_names = list(signature.classes)
        self.classes = len(signature.classes)
        self.outputs = self.classes or 1
        self.features = int(np.prod(shape)) if -1 not in shape else 0
        self.image_shape = tuple(shape) if len(shape) == 3 else None
        self.params = dict(params)
        self.device = "cpu"
        self.threads = threads


class TorchFolder:
    """A PyTorch module with its weights. What says its inputs: `model.json`, else names in `model.py`.

    Args:
        folder: With `model.py`, `model.safetensors` and maybe `model.json`.
        threads: Inside one call.

    Raises:
        NotFoundError: A file is missing.
        CorruptError: The weights cannot be read.
        InputError: `build` gives no module, or the declaration is wrong.
        StageError: The weights are of another module.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        for name in (CODE, WEIGHTS):
            if not (folder / name).is_file():
                raise NotFoundError(f"{folder} has no {name}", hint=f"want {CODE} with build(), and {WEIGHTS}")
        torch.set_num_threads(threads)
        sys.path.insert(0, str(folder))
        module = load_source(folder / CODE)
        said = _document(folder / DOCUMENT) or {name: getattr(module, name) for name in _DOCUMENT_NAMES
                                                if hasattr(module, name)}  # fmt: skip
        self.declared = declared(said, DOCUMENT if (folder / DOCUMENT).is_file() else CODE)
        self._wants_softmax = bool(self.declared.signature.classes) and said.get("gives", "logits") == "logits"
        context = BuildContext(self.declared, said.get("params") or {}, threads)
        self._module = _loaded(_built(module, context), folder / WEIGHTS).eval()

    def predict(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """Outputs by name: the module is called with the inputs in their order."""
        specs = self.declared.signature.inputs
        with torch.inference_mode():
            given = self._module(*[torch.from_numpy(np.ascontiguousarray(batch[spec.name])) for spec in specs])
            outputs = self._named(given)
            if self._wants_softmax:
                outputs["probabilities"] = torch.softmax(outputs["probabilities"], dim=1)
        return {name: value.numpy() for name, value in outputs.items()}

    def _named(self, given: Any) -> dict[str, torch.Tensor]:
        if isinstance(given, Mapping):
            return dict(given)
        specs = self.declared.signature.outputs
        parts = list(given) if isinstance(given, tuple | list) else [given]
        if len(parts) != len(specs):
            raise StageError(f"the module gave {len(parts)} tensors: want {', '.join(spec.name for spec in specs)}")
        named = {spec.name: part for spec, part in zip(specs, parts, strict=True)}
        for spec in specs:  # a value for each row may come without its second dimension
            if spec.shape == [-1, 1] and named[spec.name].ndim == 1:
                named[spec.name] = named[spec.name].unsqueeze(1)
        return named


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise InputError(f"{path.name}: want an object with inputs, got {type(said).__name__}")
    unknown_name(said, _DOCUMENT_NAMES, path.name)
    if said.get("gives", "logits") not in ("logits", "probabilities"):
        raise InputError(f"{path.name}: gives: want logits or probabilities, got {said['gives']!r}")
    return said


def _built(module: ModuleType, context: BuildContext) -> nn.Module:
    build = getattr(module, "build", None)
    if not callable(build):
        raise InputError(f"{CODE} has no function build: want one that returns a torch.nn.Module")
    made = build(context) if inspect.signature(build).parameters else build()
    if not isinstance(made, nn.Module):
        raise InputError(f"{CODE}: build must return a torch.nn.Module, got {type(made).__name__}")
    return made.to("cpu")


def _loaded(module: nn.Module, path: Path) -> nn.Module:
    try:
        weights = load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path.name} cannot be read: {error}") from error
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise StageError(f"{path.name} holds the weights of another module than build() makes: {text}") from error
    return module
