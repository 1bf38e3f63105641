"""Does a slow shadow slow the model that answers? The same load with and without one, by turns.

Run: `python benchmarks/serving_shadow.py [--seconds 5] [--rounds 4]`. Needs `wrk`. The dense net answers on one core;
the shadow takes about 12 ms of a core for each call. 16 clients pause between requests, so that
they ask for about half of what could be answered; a second table is at full load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plain_bundles import plain_bundle, saved
from serving import CORES, SIGNATURE, dense_model, on_first_core, write_small_bundle
from storming import binary_body, storm, write_bodies

from millrace.formats.bundle import open_bundle
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.tuning import processor

PATH = "/v2/models/digits/infer"


def slow_bundle(folder: Path) -> Path:
    """The shape of the dense net's answers, after some 12 ms of matrices."""
    rng = np.random.default_rng(5)
    wide = 2048
    weights = [numpy_helper.from_array(rng.normal(0, 0.01, (64, wide)).astype(np.float32), "first")]
    nodes = [helper.make_node("MatMul", ["pixels", "first"], ["h0"])]
    weights.append(numpy_helper.from_array(rng.normal(0, 0.01, (wide, wide)).astype(np.float32), "wide"))
    for layer in range(8):
        nodes.append(helper.make_node("MatMul", [f"h{layer}", "wide"], [f"h{layer + 1}"]))
    weights.append(numpy_helper.from_array(rng.normal(0, 0.01, (wide, 10)).astype(np.float32), "last"))
    nodes.append(helper.make_node("MatMul", ["h8", "last"], ["scores"]))
    nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1))
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 64])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 10])]
    graph = helper.make_graph(nodes, "slow", inputs, outputs, weights)
    path = saved(graph, folder / "slow.onnx")
    tensors = {"pixels": rng.normal(size=(4, 64)).astype(np.float32)}
    return plain_bundle(folder / "slow", path, SIGNATURE, tensors)


def hosted(bundle: Path, version: str, *, is_shadow: bool = False) -> HostedModel:
    """One revision of the endpoint."""
    digest = open_bundle(bundle, signature=None, verifier=None, expected_digest=None).digest
    return HostedModel(
        endpoint="digits", bundle_dir=str(bundle), digest=digest, version=version, variant="fp32",
        weight=0.0 if is_shadow else 1.0, is_shadow=is_shadow,
    )  # fmt: skip


@contextmanager
def host() -> Iterator[tuple[HostProcess, int, threading.Event]]:
    """A serving process; the event is set whenever it has loaded something."""
    loaded = threading.Event()

    def told(state: ModelState) -> None:
        if state.error is not None:
            raise SystemExit(f"version {state.version}: {state.error['message']}")
        loaded.set()

    with on_first_core():
        process = HostProcess(HostConfig(), lambda name, frame: None, told)
    try:
        yield process, process.wait_ready(), loaded
    finally:
        process.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    print(f"{processor()}; load before: {os.getloadavg()[0]:.1f}")
    others = ",".join(map(str, CORES[1:] or CORES))
    with tempfile.TemporaryDirectory() as name, host() as (process, port, loaded):
        folder = Path(name)
        dense_model(folder / "dense.onnx")
        primary = hosted(write_small_bundle(folder, folder / "dense.onnx"), "1")
        shadow = hosted(slow_bundle(folder), "2", is_shadow=True)
        row = np.random.default_rng(2).integers(0, 17, (1, 64)).astype(np.float32)
        environment = write_bodies(folder, [binary_body("pixels", "FP32", row)])
        for title, wait_ms in (("half load", 1), ("full load", 0)):
            found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for number in range(2 * arguments.rounds):
                with_shadow = bool(number % 2)
                loaded.clear()
                process.apply([primary, shadow] if with_shadow else [primary])
                loaded.wait(30)
                time.sleep(1.0)
                settings = {**environment, "WAIT_MS": str(wait_ms)}
                one = storm(port, PATH, settings, 16, arguments.seconds, others)
                if one["wrong"] or one["lost"] or one["timeout"]:
                    raise SystemExit(f"answers were lost: {one}")
                found[with_shadow].append((one["good"] / one["seconds"], one["p99_s"]))
            for with_shadow, runs in found.items():
                rps, p99_s = (statistics.median(values) for values in zip(*runs, strict=True))
                what = "with a shadow" if with_shadow else "alone"
                print(f"{title}, {what:<14} {rps:>8,.0f}/s, p99 {p99_s * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
