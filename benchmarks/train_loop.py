"""Our training loop against bare loops: `python benchmarks/train_loop.py`.

CPU seconds of training the same small network on the same rows: our `Trainer` (clipping, logging, loss
checks, checkpoints due every 5 s), a bare loop of sliced tensors with equal clipping and logging, and a
bare loop with a DataLoader that collates rows. Interleaved in one process; medians of ratios by round.
Aims: at most 1.15 of the slices, at most 0.7 of the DataLoader.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from millrace.core.spec import Optimizer, Train
from millrace.train.checkpoint import CheckpointStore
from millrace.train.loop import Hooks, Trainer

FEATURES, CLASSES, BATCH, LOG_EVERY = 32, 4, 256, 10


class Run:
    """What the loop needs of a Context."""

    seed = 0
    cancelled = False

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Nobody looks."""


class Slices:
    """Rows in memory."""

    def __init__(self, features: torch.Tensor, answers: torch.Tensor) -> None:
        self.rows, self._features, self._answers = len(features), features, answers

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows."""
        return self._features.index_select(0, indices), self._answers.index_select(0, indices)


def network() -> nn.Module:
    """A small MLP with dropout."""
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
    return nn.Sequential(*layers)


def ours(features: torch.Tensor, answers: torch.Tensor, epochs: int, log: list[tuple[str, float, int]]) -> None:
    """Our loop, as a run uses it."""
    train = Train(epochs=epochs, batch_size=BATCH, clip_norm=1.0, optimizer=Optimizer(name="adamw", lr=1e-3))
    hooks = Hooks(
        loss=nn.CrossEntropyLoss(),
        validate=lambda module: None,
        log=lambda name, value, step: log.append((name, value, step)),
        metric="accuracy",
        higher_is_better=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), "benchmark")
        Trainer(network(), Slices(features, answers), train, Run(), hooks, store).run()  # type: ignore[arg-type]


def bare(batches: Callable[[], Any], epochs: int, log: list[tuple[str, float, int]], fused: bool | None) -> None:
    """The loop of a tutorial, with clipping and a log line every ten steps."""
    module, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=fused)
    step = 0
    for _ in range(epochs):
        for x, y in batches():
            loss = criterion(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                log.append(("loss", loss.item(), step))


def main() -> None:
    """Print the ratios, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, answers = torch.randn(given.rows, FEATURES), torch.randint(CLASSES, (given.rows,))

    def slices() -> Any:
        order = torch.randperm(given.rows)
        return ((features[part], answers[part]) for part in order.split(BATCH))

    def loader() -> Any:
        return DataLoader(TensorDataset(features, answers), batch_size=BATCH, shuffle=True)

    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: ours(features, answers, given.epochs, []),
        "slices": lambda: bare(slices, given.epochs, [], None),
        "slices, fused optimiser": lambda: bare(slices, given.epochs, [], True),
        "DataLoader": lambda: bare(loader, given.epochs, [], None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(given.rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if round_number:  # the first warms up
                seconds[name].append(time.process_time() - started)
    steps = -(-given.rows // BATCH) * given.epochs
    result: dict[str, Any] = {"steps": steps, "rounds": given.rounds, "us_per_step": {}, "ours_over": {}}
    for name, found in seconds.items():
        result["us_per_step"][name] = round(statistics.median(found) / steps * 1e6)
        if name != "ours":
            ratios = [mine / other for mine, other in zip(seconds["ours"], found, strict=True)]
            result["ours_over"][name] = round(statistics.median(ratios), 3)
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result["us_per_step"].items():
        ratio = result["ours_over"].get(name)
        print(f"{name:26}{value:6} us CPU a step" + ("" if ratio is None else f"   ours / this = {ratio:.2f}"))


if __name__ == "__main__":
    main()
