"""A folder with `model.py` and `model.safetensors`, served by its own process: PyTorch's own answers, no pickle."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import CorruptError, InputError, MillraceError, NotFoundError, StageError
from millrace.serve.child import ChildConfig, ServedModel
from millrace.serve.runtimes.worker import Order, open_model
from millrace.serve.server import ServerConfig

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

CODE = """
import torch
from torch import nn

HIDDEN = 8


class Net(nn.Module):
    def __init__(self, features, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, outputs))

    def forward(self, pixels):
        assert torch.is_inference_mode_enabled() and torch.get_num_threads() == 1
        return self.body(pixels)


def build(ctx):
    return Net(ctx.features, ctx.outputs)
"""
DOCUMENT = {"inputs": {"pixels": ["float32", [-1, 6]]}, "classes": ["a", "b", "c"]}


def make_folder(folder: Path, document: dict[str, Any] | None = None) -> dict[str, Any]:
    """A folder with weights; they are returned."""
    folder.mkdir()
    torch.manual_seed(3)
    weights = {
        "body.0.weight": torch.randn(8, 6), "body.0.bias": torch.randn(8),
        "body.3.weight": torch.randn(3, 8), "body.3.bias": torch.randn(3),
    }  # fmt: skip
    (folder / "model.py").write_text(CODE)
    (folder / "model.json").write_text(json.dumps(DOCUMENT if document is None else document))
    safetensors.save_file(weights, folder / "model.safetensors")
    return weights


def expected(weights: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    """The same network by hand."""
    hidden = torch.relu(torch.from_numpy(pixels) @ weights["body.0.weight"].T + weights["body.0.bias"])
    return torch.softmax(hidden @ weights["body.3.weight"].T + weights["body.3.bias"], dim=1).numpy()


@pytest.fixture(scope="module")
def live(kit: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("torch") / "net"
    weights = make_folder(folder)
    models = [ServedModel(name="net", source="code", path=str(folder), threads=1)]
    server = kit.Live(
        ChildConfig(models=models, preload=["net"], server=ServerConfig(name="", version="", port=0, tune_s=0))
    )
    yield server, weights
    assert server.process.stop() == 0


def test_answers_are_pytorch_s(live: tuple[Any, dict[str, Any]]) -> None:
    server, weights = live
    pixels = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [5, 6], "data": pixels.tolist()}
    status, answer = server.call("POST", "/v2/models/net/infer", {"inputs": [tensor]})
    assert status == 200, answer
    got = np.array(answer["outputs"][0]["data"], np.float32).reshape(5, 3)
    assert np.abs(got - expected(weights, pixels)).max() < 1e-6
    status, answer = server.call("POST", "/v1/models/net:predict", {"instances": pixels.tolist()})
    labels = ["abc"[index] for index in expected(weights, pixels).argmax(axis=1)]
    assert [row["label"] for row in answer["predictions"]] == labels
    assert server.call("POST", "/v1/models/net:predict", {"instances": [[1, 2]]})[0] == 400
    assert server.call("GET", "/v2/models/net")[1]["platform"] == "pytorch_safetensors"


class Bomb:
    """Would make a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "absent":
        weights.unlink()
    elif how == "pickle":
        weights.write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    elif how == "other":
        safetensors.save_file({"body.0.weight": torch.zeros(1, 6)}, weights)
    elif how == "code":
        (folder / "model.py").write_text("def build():\n    return 3\n")
    elif how == "document":
        (folder / "model.json").write_text('{"input": {}}')


def test_what_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what its own is for is shown elsewhere, and importing torch takes seconds."""
    cases: list[tuple[str, type[MillraceError], str]] = [
        ("absent", NotFoundError, "has no model.safetensors"),
        ("pickle", CorruptError, "model.safetensors cannot be read"),
        ("other", StageError, "weights of another module"),
        ("code", InputError, "build must return a torch.nn.Module, got int"),
        ("document", InputError, "there is no 'input'"),
    ]
    for how, kind, text in cases:
        folder = tmp_path / how
        make_folder(folder)
        spoil(folder, how)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.delitem(sys.modules, "model", raising=False)
        with pytest.raises(kind, match=text):
            open_model(Order(path=str(folder)))
        assert not (folder / "exploded").exists(), "the weights were unpickled"
