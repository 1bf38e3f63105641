"""Compression of the digits example: ours beside onnxruntime's own defaults, and how often a guard ships a bad variant.

    python benchmarks/compress.py

Everything is measured interleaved in one process, one thread; sizes and speeds are ratios to the fp32 base
of the same run. The second table is a simulation with a known truth.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import logging
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from sklearn.datasets import load_digits

from millrace.compress.guard import Candidate, Limits, certify
from millrace.compress.search import Job, Outcome, search
from millrace.core.errors import CorruptError
from millrace.formats.cpu import cpu_flags
from millrace.formats.meter import Budget, choose_clock, measure_interleaved
from millrace.formats.session import open_session

ROOT = Path(__file__).resolve().parents[1]
TRAIN, VALIDATION, TEST = slice(0, 1047), slice(1047, 1197), slice(1197, 1797)
Rows = dict[str, np.ndarray]


class Mlp(torch.nn.Sequential):
    """64-512-512-10, the dense counterpart."""

    def __init__(self) -> None:
        dense = torch.nn.Linear
        super().__init__(dense(64, 512), torch.nn.ReLU(), dense(512, 512), torch.nn.ReLU(), dense(512, 10))


class Served(torch.nn.Module):
    """Raw pixels in, probabilities out."""

    def __init__(self, body: torch.nn.Module, is_image: bool) -> None:
        super().__init__()
        self.body, self.is_image = body, is_image

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        scaled = (pixels - 4.88) * (1 / 6.02)
        return self.body(scaled.reshape(-1, 1, 8, 8) if self.is_image else scaled)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.logits(pixels), dim=1)


def template_network() -> torch.nn.Module:
    """The network of the digits template."""
    path = ROOT / "src" / "millrace" / "templates" / "digits" / "model.py"
    spec = importlib.util.spec_from_file_location("digits_model", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(types.SimpleNamespace(image_shape=(1, 8, 8), classes=10))


def train(model: Served, pixels: np.ndarray, labels: np.ndarray, epochs: int) -> bytes:
    """Train and export; the bytes of the ONNX file."""
    rows, answers = torch.from_numpy(pixels[TRAIN]), torch.from_numpy(labels[TRAIN])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(32):
            loss = torch.nn.functional.cross_entropy(model.logits(rows[batch]), answers[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    file = io.BytesIO()
    axes = {"pixels": {0: "rows"}, "probabilities": {0: "rows"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (torch.zeros(2, 64),), file, dynamo=False, input_names=["pixels"],
            output_names=["probabilities"], dynamic_axes=axes, opset_version=17,
        )  # fmt: skip
    return file.getvalue()


class Reader(CalibrationDataReader):
    """Calibration rows as onnxruntime wants them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = iter([rows])

    def get_next(self) -> Rows | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._rows, None)


def tool_defaults(model: bytes, calibration: Rows) -> dict[str, bytes]:
    """What onnxruntime's quantisers make when they are told nothing."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        source, static, dynamic = (Path(name) / f"{part}.onnx" for part in ("source", "static", "dynamic"))
        source.write_bytes(model)
        quantize_static(source, static, Reader(calibration))
        quantize_dynamic(source, dynamic)
        made = {"ORT static default": static.read_bytes(), "ORT dynamic default": dynamic.read_bytes()}
    logging.disable(logging.NOTSET)
    return made


def compare(name: str, model: bytes, pixels: np.ndarray, labels: np.ndarray) -> None:
    """One table: ours and the tools' defaults, interleaved."""
    calibration = {"pixels": pixels[TRAIN][::2][:512]}
    job = Job(
        model, "classification", "probabilities", calibration, {"pixels": pixels[VALIDATION]},
        {"pixels": pixels[TEST]}, labels[TEST],
    )  # fmt: skip
    started = time.perf_counter()
    outcome = search(job)
    duration = time.perf_counter() - started
    files = {variant.recipe.name: variant.data for variant in outcome.order} | tool_defaults(model, calibration)
    sessions = {"fp32": open_session(model)}
    for key, data in files.items():
        try:
            sessions[key] = open_session(data)
        except CorruptError as error:
            print(f"{key}: {error.message}")
    speeds = {}
    for size in (1, 32):
        rows = {"pixels": np.ascontiguousarray(pixels[VALIDATION][:size])}
        calls = {key: functools.partial(session.raw.run, None, rows) for key, session in sessions.items()}
        speeds[size] = measure_interleaved(calls, "fp32", Budget(time_s=3.0, precision=0.01), choose_clock(1))
    print(f"\n{name}: {len(model):,} bytes; whole search {duration:.2f} s; chosen {outcome.facts.chosen}")
    print(f"{'variant':<20}{'size x':>8}{'b1 us':>8}{'b1 x':>20}{'b32 x':>20}{'right':>7}{'changed':>8}  guarantee")
    base = sessions["fp32"].run({"pixels": pixels[TEST]})["probabilities"].argmax(axis=1)
    for key, session in sessions.items():
        answers = session.run({"pixels": pixels[TEST]})["probabilities"].argmax(axis=1)
        one, many = speeds[1][key], speeds[32][key]
        print(
            f"{key:<20}{len(model) / len(files.get(key, model)):>8.2f}{one.p50_s * 1e6:>8.0f}"
            f"{f'{one.speedup:.2f} ({one.low:.2f}-{one.high:.2f})':>20}"
            f"{f'{many.speedup:.2f} ({many.low:.2f}-{many.high:.2f})':>20}"
            f"{np.mean(answers == labels[TEST]):>7.3f}{int(np.sum(answers != base)):>8}  {describe(outcome, key)}"
        )


def describe(outcome: Outcome, name: str) -> str:
    """Status and bound in a few characters."""
    facts = outcome.guarantees.get(name)
    if facts is None:
        return "-"
    return facts.status if facts.bound is None else f"{facts.status}, <= {facts.bound * 100:.2f} points"


def simulate(runs: int, rows: int) -> None:
    """Twenty variants that each truly lose 1.05 points, limit 1.0: any shipped one is a mistake."""
    rng = np.random.default_rng(0)
    truth, limits = np.zeros(rows, int), Limits("classification", 0.01, 0.05)
    guarded = estimated = 0
    for _ in range(runs):
        base = (rng.random(rows) < 0.05).astype(int)
        candidates = []
        for number in range(20):
            answers = base.copy()
            answers[(base == 0) & (rng.random(rows) < 0.0150 / 0.95)] = 1
            answers[(base == 1) & (rng.random(rows) < 0.0045 / 0.05)] = 0
            candidates.append(Candidate(str(number), answers))
        facts = certify(base, candidates, truth, limits).values()
        guarded += any(entry.status == "certified" for entry in facts)
        estimated += any(entry.drop <= 0.01 for entry in facts)
    print(f"\nships a variant over budget, worst case ({runs} runs, 20 variants, {rows} rows)")
    print(f"guard {guarded / runs:.1%}   point estimate {estimated / runs:.1%}   (aim: at most 5 %)")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    values, answers = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(answers))
    pixels, labels = values[order].astype(np.float32), answers[order].astype(np.int64)
    print("instruction sets:", " ".join(cpu_flags()))
    network = Served(template_network(), is_image=True)
    compare("digits template (CNN)", train(network, pixels, labels, arguments.epochs), pixels, labels)
    compare("MLP 64-512-512-10", train(Served(Mlp(), False), pixels, labels, arguments.epochs), pixels, labels)
    simulate(arguments.runs, rows=3000)


if __name__ == "__main__":
    main()
