"""Real small models: trained on scikit-learn's digits once per session, exported to ONNX."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from skl2onnx import to_onnx
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

from millrace.core.ids import digest_bytes
from millrace.core.types import Artifact


@dataclass
class Digits:
    """Rows 0-896 train, 897-1196 validate, 1197-1796 (600) test."""

    pixels: np.ndarray
    labels: np.ndarray

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"pixels": self.pixels[start:stop]}

    @property
    def train(self) -> dict[str, np.ndarray]:
        return self.part(0, 897)

    @property
    def train_labels(self) -> np.ndarray:
        return self.labels[:897]

    @property
    def validation(self) -> dict[str, np.ndarray]:
        return self.part(897, 1197)

    @property
    def test(self) -> dict[str, np.ndarray]:
        return self.part(1197, 1797)

    @property
    def test_labels(self) -> np.ndarray:
        return self.labels[1197:]


class Mlp(torch.nn.Module):
    def __init__(self, hidden: int, outputs: int = 10) -> None:
        super().__init__()
        # a learned-looking projection inside the prefix: quantisers would love to touch it and must not
        self.preprocess = torch.nn.Linear(64, 64)
        with torch.no_grad():
            self.preprocess.weight.copy_(torch.eye(64) / 16.0)
            self.preprocess.bias.fill_(-0.25)
        self.preprocess.requires_grad_(False)
        self.hidden = torch.nn.Linear(64, hidden)
        self.middle = torch.nn.Linear(hidden, hidden)
        self.last = torch.nn.Linear(hidden, outputs)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.hidden(self.preprocess(pixels))))))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = self.logits(pixels)
        return torch.softmax(logits, dim=1) if self.last.out_features > 1 else logits


class Cnn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.second = torch.nn.Conv2d(16, 32, 3, padding=1)
        self.last = torch.nn.Linear(512, 10)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        image = (pixels / 16.0).reshape(-1, 1, 8, 8)
        image = torch.relu(self.norm(self.first(image)))
        image = torch.nn.functional.max_pool2d(torch.relu(self.second(image)), 2)
        return self.last(image.flatten(1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.logits(pixels), dim=1)


def fit(model: Any, digits: Digits, epochs: int) -> Any:
    pixels = torch.from_numpy(digits.train["pixels"])
    labels = torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(32):
            logits = model.logits(pixels[rows])
            if logits.shape[1] == 1:
                loss = torch.nn.functional.mse_loss(logits[:, 0], labels[rows].float())
            else:
                loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def export(model: torch.nn.Module, output: str) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the classic exporter is deprecated, and wanted
        torch.onnx.export(
            model,
            (torch.zeros(2, 64),),
            file,
            dynamo=False,
            input_names=["pixels"],
            output_names=[output],
            dynamic_axes={"pixels": {0: "rows"}, output: {0: "rows"}},
            opset_version=17,
        )
    return file.getvalue()


@pytest.fixture(scope="session")
def digits() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return Digits(pixels[order].astype(np.float32), labels[order].astype(np.int64))


@pytest.fixture(scope="session", autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mlp(digits: Digits) -> bytes:
    return export(fit(Mlp(hidden=256), digits, epochs=10), "probabilities")


@pytest.fixture(scope="session")
def cnn(digits: Digits) -> bytes:
    return export(fit(Cnn(), digits, epochs=6), "probabilities")


@pytest.fixture(scope="session")
def regressor(digits: Digits) -> bytes:
    """Predicts the digit as a number."""
    return export(fit(Mlp(hidden=128, outputs=1), digits, epochs=10), "value")


@pytest.fixture(scope="session")
def forest(digits: Digits) -> bytes:
    """A random forest with normalised probabilities as its only output."""
    model = RandomForestClassifier(60, random_state=0, n_jobs=1)
    model.fit(digits.train["pixels"], digits.train_labels)
    converted = to_onnx(model, digits.pixels[:1], options={"zipmap": False}, target_opset={"": 15, "ai.onnx.ml": 3})
    graph = converted.graph
    del graph.output[0]  # the label
    renames = {graph.input[0].name: "pixels", graph.output[0].name: "probabilities"}
    graph.input[0].name, graph.output[0].name = "pixels", "probabilities"
    for node in graph.node:
        node.input[:] = [renames.get(name, name) for name in node.input]
        node.output[:] = [renames.get(name, name) for name in node.output]
    onnx.checker.check_model(converted)
    return converted.SerializeToString()


@dataclass
class FolderContext:
    """A Context over plain folders."""

    inputs: dict[str, Path]
    scratch: Path
    outputs: dict[str, Path] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    cancelled: bool = False
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def project_dir(self) -> Path:
        return self.scratch

    @property
    def checkpoints(self) -> Path:
        return self.scratch

    def input(self, name: str) -> Path:
        return self.inputs[name]

    def has_input(self, name: str) -> bool:
        return name in self.inputs

    def output(self, name: str, path: Path) -> Artifact:
        self.outputs[name] = path
        return Artifact(digest=digest_bytes(name.encode()), size_bytes=0)

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        raise AssertionError("compress logs no metrics")

    def progress(self, done: float, total: float, text: str = "") -> None:
        assert 0 <= done <= total
        self.said.append(text)


@pytest.fixture(scope="session")
def context_type() -> type[FolderContext]:
    return FolderContext
