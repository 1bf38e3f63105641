"""Memory of a server over a million requests whose shapes are ever new.

Run: `python benchmarks/serving_memory.py [--requests 1000000]`. Needs `wrk`; about 3 minutes. The model reads tokens
[rows, length], both free: rows of 1 to 8 and lengths of 1 to 512 come in random order, which makes 4,096 shapes before
batching. What onnxruntime keeps for a shape and never gives back shows as growth between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plain_bundles import plain_bundle, saved
from serving import CORES, on_first_core
from storming import binary_body, memory_mb, storm, write_bodies

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.tuning import processor

ROWS, LENGTHS, VOCABULARY, WIDTH = 8, 512, 500, 16
AIM_MB = 10.0


def token_bundle(folder: Path) -> Path:
    """The mean of the tokens' vectors, classified."""
    rng = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(rng.normal(0, 1, (VOCABULARY, WIDTH)).astype(np.float32), "vectors"),
        numpy_helper.from_array(rng.normal(0, 1, (WIDTH, 10)).astype(np.float32), "classes"),
    ]
    nodes = [
        helper.make_node("Gather", ["vectors", "tokens"], ["found"]),
        helper.make_node("ReduceMean", ["found"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "classes"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["rows", "length"])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 10])]
    graph = helper.make_graph(nodes, "tokens", inputs, outputs, weights)
    path = saved(graph, folder / "tokens.onnx")
    signature = Signature(
        task="classification", inputs=[TensorSpec(name="tokens", dtype="int64", shape=[-1, -1])], label="y",
        outputs=[TensorSpec(name="probabilities", dtype="float32", shape=[-1, 10], semantic="probabilities")],
        classes=[str(number) for number in range(10)],
    )  # fmt: skip
    tensors = {"tokens": rng.integers(0, VOCABULARY, (2, 7))}
    return plain_bundle(folder / "bundle", path, signature, tensors)


def main() -> None:
    """Measure and print a line for each tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    rng = np.random.default_rng(4)
    shapes = [(rows, length) for rows in range(1, ROWS + 1) for length in range(1, LENGTHS + 1)]
    rng.shuffle(shapes)
    print(f"{processor()}; load before: {os.getloadavg()[0]:.1f}; {len(shapes):,} shapes of int64 tokens")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = token_bundle(folder)
        bodies = [binary_body("tokens", "INT64", rng.integers(0, VOCABULARY, shape)) for shape in shapes]
        environment = write_bodies(folder, bodies)
        with on_first_core():
            config = ServerConfig(name="tokens", version="1", port=0)
            process = ServerProcess(ChildConfig(bundle_dir=str(bundle), server=config))
        try:
            run(process, environment, arguments.requests)
        finally:
            process.stop()


def run(process: ServerProcess, environment: dict[str, str], requests: int) -> None:
    """Ask until so many have been answered."""
    port, others, path = process.wait_ready(), ",".join(map(str, CORES[1:] or CORES)), "/v2/models/tokens/infer"
    begin_mb = now_mb = memory_mb(process.pid)
    done, bad, first_mb, tenth = 0, 0, 0.0, 1
    print(f"{'at the start':>22}: {begin_mb:6.1f} MB")
    while done < requests:
        found = storm(port, path, environment, 64, 10, others)
        done += found["good"]
        bad += found["wrong"] + found["refused"] + found["lost"] + found["timeout"]
        now_mb = memory_mb(process.pid)
        if done >= requests / 10 and not first_mb:
            first_mb = now_mb
        if done >= tenth * requests / 10:
            print(f"{done:>13,} requests: {now_mb:6.1f} MB; {found['good'] / found['seconds']:,.0f}/s")
            tenth = done * 10 // requests + 1
    print(f"grown since the first tenth: {now_mb - first_mb:+.1f} MB (aim at most {AIM_MB:g}); since the start: "
          f"{now_mb - begin_mb:+.1f} MB; answers other than 200, or lost: {bad}")  # fmt: skip


if __name__ == "__main__":
    main()
