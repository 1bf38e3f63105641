"""Test accuracy through the stages that a run uses: `python benchmarks/accuracy.py [--folder DATA]`.

Digits: the template's model, data section and settings, damaged rows and all; mean of three seeds (of the
weights and the order; the 600 test rows stay). Fashion-MNIST: a small CNN, 5 epochs, its own 10,000 test
images; skipped where `MILLRACE_TEST_DATA` (default ../shared/data) does not hold it. Aims: 99 % and 90 %.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from millrace.core.spec import Spec
from millrace.core.spec_errors import load_spec, parse_spec
from millrace.core.types import Artifact
from millrace.data.digits import write_digits_csv
from millrace.data.prepare import prepare
from millrace.train.evaluate import evaluate
from millrace.train.export import export
from millrace.train.stage import train

ROOT = Path(__file__).parents[1]
FASHION_MODEL = """
from torch import nn


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
    )


def build(ctx):
    return nn.Sequential(
        block(1, 32), block(32, 64), nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 7 * 7, 128), nn.ReLU(),
        nn.Linear(128, ctx.outputs),
    )
"""
FASHION_SPEC = """
data: {{source: "{folder}/*images*", label: label, clean: []}}
train:
  model: "model.py:build"
  epochs: 5
  batch_size: 128
  optimizer: {{name: adamw, lr: 4e-3}}
  schedule: one_cycle
"""


class Folders:
    """A Context on plain folders: outputs of one step are inputs of the next."""

    threads, device, cancelled = 1, "cpu", False

    def __init__(self, project: Path, step: str, seed: int = 0) -> None:
        self.project_dir, self.seed, self.params = project, seed, {}
        self._step = step
        self.scratch = project / "work" / f"{step}-{seed}"
        self.checkpoints = self.scratch / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def input(self, name: str) -> Path:
        """An earlier step's output."""
        return self.project_dir / "work" / "outputs" / name

    def has_input(self, name: str) -> bool:
        """Whether it is there."""
        return self.input(name).exists()

    def output(self, name: str, path: Path) -> Artifact:
        """Keep it."""
        place = self.input(f"{self._step}.{name}")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(path, place)
        return Artifact(digest="", size_bytes=0)

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """Nobody looks."""

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Nobody looks."""


def measure(spec: Spec, project: Path, seed: int) -> dict[str, Any]:
    """Train with a seed, export and evaluate: accuracy with its interval, and the training's seconds."""
    trained = train(spec, Folders(project, "train", seed))
    export(spec, Folders(project, "export", seed))
    found = evaluate(spec, Folders(project, "evaluate", seed))["metrics"][0]
    assert found["name"] == "accuracy"
    return {**found, "train_s": trained["duration_s"]}


def digits(folder: Path, seeds: int) -> None:
    """The template, as `millrace init digits` writes it."""
    template = ROOT / "src/millrace/templates/digits"
    project = folder / "digits"
    shutil.copytree(template, project)
    write_digits_csv(project / "digits.csv")
    spec, _ = load_spec(project / "millrace.yaml")
    prepare(spec, Folders(project, "data"))
    found = [measure(spec, project, seed) for seed in range(seeds)]
    mean = sum(one["value"] for one in found) / len(found)
    each = ", ".join(f"{100 * one['value']:.2f}" for one in found)
    seconds = sum(one["train_s"] for one in found) / len(found)
    print(f"digits          {100 * mean:.2f} % (seeds: {each}; 600 rows; {seconds:.1f} s of training each; aim 99)")


def fashion(folder: Path, data: Path) -> None:
    """60,000 images of clothes."""
    if not data.is_dir():
        print(f"Fashion-MNIST   skipped: there is no {data}")
        return
    project = folder / "fashion"
    project.mkdir()
    (project / "model.py").write_text(FASHION_MODEL)
    spec = parse_spec(FASHION_SPEC.format(folder=data))
    prepare(spec, Folders(project, "data"))
    started = time.process_time()
    found = measure(spec, project, 0)
    bounds = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}"
    print(
        f"Fashion-MNIST   {100 * found['value']:.2f} % (95 %: {bounds}; 10,000 rows; 5 epochs; "
        f"{time.process_time() - started:.0f} CPU s; aim 90)"
    )


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("MILLRACE_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--folder", type=Path, default=Path(default))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        digits(Path(folder), given.seeds)
        fashion(Path(folder), given.folder.resolve() / "fashion-mnist")


if __name__ == "__main__":
    main()
