"""A text encoder and an image network: what the server reaches of what onnxruntime can do here, with no tuning.

Run: `python benchmarks/serving_heavy.py [--seconds 6] [--model text|cnn]`. Needs `wrk`. Random weights; about
3 minutes. For each model, in the same run and on the same cores: the best of onnxruntime alone over layouts
(threads x callers, spinning) and batches, then the server with 64 clients and with one, binary and JSON. The
server is started twice: without a calibration (it measures itself while nobody asks) and with the stored one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plain_bundles import plain_bundle
from serving import wrk

from millrace.formats.session import Session, open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import ChildConfig
from millrace.serve.layouts import Layout, cores, layouts_of
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.tuning import processor

WIDTH, TOKENS, LAYERS, HEADS, VOCABULARY = 384, 64, 6, 6, 2000
TUNING_S = 40.0


class Graph:
    """Nodes and weights of an ONNX graph, as it grows."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def weight(self, *shape: int, scale: float | None = None) -> str:
        scale = np.prod(shape[1:]) ** -0.5 if scale is None else scale
        return self.constant(self._rng.normal(0, scale, shape).astype(np.float32))

    def constant(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def bytes(self, value: onnx.ValueInfoProto, last: str) -> bytes:
        self.nodes.append(helper.make_node("Softmax", [last], ["probabilities"], axis=1))
        answer = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 10])
        graph = helper.make_graph(self.nodes, "heavy", [value], [answer], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def text_encoder() -> bytes:
    """Six transformer layers over 64 tokens."""
    graph = Graph(0)
    ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    hidden = graph.node("Gather", graph.weight(VOCABULARY, WIDTH, scale=1.0), "tokens")
    split = graph.constant(np.array([0, TOKENS, HEADS, WIDTH // HEADS], np.int64))
    joined = graph.constant(np.array([0, TOKENS, WIDTH], np.int64))
    scale = graph.constant(np.array((WIDTH // HEADS) ** -0.5, np.float32))
    for _ in range(LAYERS):
        parts = []
        for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            part = graph.node("MatMul", hidden, graph.weight(WIDTH, WIDTH))
            parts.append(graph.node("Transpose", graph.node("Reshape", part, split), perm=order))
        query, key, value = parts
        scores = graph.node("Softmax", graph.node("Mul", graph.node("MatMul", query, key), scale), axis=-1)
        mixed = graph.node("Transpose", graph.node("MatMul", scores, value), perm=[0, 2, 1, 3])
        mixed = graph.node("MatMul", graph.node("Reshape", mixed, joined), graph.weight(WIDTH, WIDTH))
        hidden = graph.node("Add", hidden, mixed)
        hidden = graph.node(
            "LayerNormalization", hidden, graph.constant(ones), graph.constant(zeros), axis=-1
        )  # fmt: skip
        wide = graph.node("Relu", graph.node("MatMul", hidden, graph.weight(WIDTH, 4 * WIDTH)))
        hidden = graph.node("Add", hidden, graph.node("MatMul", wide, graph.weight(4 * WIDTH, WIDTH)))
        hidden = graph.node("LayerNormalization", hidden, graph.constant(ones), graph.constant(zeros), axis=-1)
    pooled = graph.node("ReduceMean", hidden, axes=[1], keepdims=0)
    value = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["rows", TOKENS])
    return graph.bytes(value, graph.node("MatMul", pooled, graph.weight(WIDTH, 10)))


def image_network() -> bytes:
    """Convolutions over 3 x 224 x 224."""
    graph = Graph(1)
    hidden, channels = "pixels", 3
    for wide, stride in ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)):
        kernel = graph.weight(wide, channels, 3, 3)
        hidden = graph.node(
            "Conv", hidden, kernel, graph.constant(np.zeros(wide, np.float32)), kernel_shape=[3, 3],
            strides=[stride, stride], pads=[1, 1, 1, 1],
        )  # fmt: skip
        hidden, channels = graph.node("Relu", hidden), wide
    pooled = graph.node("Flatten", graph.node("GlobalAveragePool", hidden), axis=1)
    value = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 3, 224, 224])
    return graph.bytes(value, graph.node("MatMul", pooled, graph.weight(channels, 10)))


class Case(NamedTuple):
    """A model and a row for it."""

    name: str
    model: bytes
    spec: TensorSpec
    row: np.ndarray
    datatype: str
    ready_aim_s: float = 0.7
    over_raw_aim_ms: float = 0.5


def cases() -> list[Case]:
    """Both of them."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCABULARY, (1, TOKENS))
    pixels = rng.normal(0, 1, (1, 3, 224, 224)).astype(np.float32)
    tokens_spec = TensorSpec(name="tokens", dtype="int64", shape=[-1, TOKENS])
    pixels_spec = TensorSpec(name="pixels", dtype="float32", shape=[-1, 3, 224, 224], semantic="image")
    return [
        Case("text", text_encoder(), tokens_spec, tokens, "INT64"),
        Case("cnn", image_network(), pixels_spec, pixels, "FP32", over_raw_aim_ms=1.3),
    ]


def bundle_of(case: Case, folder: Path) -> Path:
    """A bundle with a golden row."""
    path = folder / f"{case.name}.onnx"
    path.write_bytes(case.model)
    signature = Signature(
        task="classification", inputs=[case.spec], label="y", classes=[str(number) for number in range(10)],
        outputs=[TensorSpec(name="probabilities", dtype="float32", shape=[-1, 10], semantic="probabilities")],
    )  # fmt: skip
    return plain_bundle(folder / case.name, path, signature, {case.spec.name: case.row})


def bodies(case: Case, folder: Path) -> dict[str, dict[str, str]]:
    """Environment for post.lua by format."""
    tensor = {"name": case.spec.name, "shape": list(case.row.shape), "datatype": case.datatype}
    as_json = json.dumps({"inputs": [{**tensor, "data": case.row.reshape(-1).tolist()}]}).encode()
    asked = {"parameters": {"binary_data_output": True}}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": case.row.nbytes}}], **asked}).encode()
    found = {}
    for name, body in {"json": as_json, "binary": head + case.row.tobytes()}.items():
        path = folder / f"{case.name}.{name}"
        path.write_bytes(body)
        found[name] = {"BODY": str(path)}
    found["binary"]["JSON_BYTES"] = str(len(head))
    return found


class Raw(NamedTuple):
    """onnxruntime alone: the best rows per second and p50 of a lone row, and how."""

    rows_per_s: float
    many: str
    p50_s: float
    alone: str


def rate(session: Session, callers: int, tensors: dict[str, np.ndarray], seconds: float) -> tuple[float, float]:
    """Rows per second of callers at once, and the median of a call."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    def call() -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            session.raw.run(None, tensors)
            took.append(time.perf_counter() - start)

    begin = time.perf_counter()
    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = len(next(iter(tensors.values())))
    return len(took) * rows / (time.perf_counter() - begin), statistics.median(took)


def raw_best(case: Case, seconds: float) -> Raw:
    """Every layout with 1 and 8 rows; the two best again for as long as the server is measured."""
    sessions: dict[tuple[int, bool], Session] = {}
    many: list[tuple[float, Layout, int]] = []
    alone: list[tuple[float, Layout]] = []
    row = {case.spec.name: case.row}

    def session_of(layout: Layout) -> Session:
        key = (layout.threads, layout.is_spinning)
        if key not in sessions:
            sessions[key] = open_session(case.model, threads=layout.threads, spinning=layout.is_spinning)
        return sessions[key]

    for layout in layouts_of(cores()):
        for rows in (1, 8):
            tensors = {case.spec.name: np.repeat(case.row, rows, axis=0)}
            session_of(layout).run(tensors)
            found, median_s = rate(session_of(layout), layout.callers, tensors, seconds / 4)
            many.append((found, layout, rows))
            if rows == 1 and layout.callers == 1:
                alone.append((median_s, layout))
    many.sort(key=lambda one: -one[0])
    rates = []
    for _, layout, rows in many[:2]:
        tensors = {case.spec.name: np.repeat(case.row, rows, axis=0)}
        rates.append((rate(session_of(layout), layout.callers, tensors, seconds)[0], f"{layout}, {rows} rows"))
    best_s, quickest = min(alone, key=lambda one: one[0])
    again_s = rate(session_of(quickest), 1, row, seconds / 2)[1]
    rows_per_s, how = max(rates)
    return Raw(rows_per_s, how, min(best_s, again_s), str(quickest))


@contextmanager
def server(bundle: Path, name: str, calibrations: Path) -> Iterator[tuple[int, float]]:
    """Started as `millrace serve` starts it; its port and the seconds until it was ready."""
    config = ServerConfig(name=name, version="1", port=0, calibrations=str(calibrations), queue_s=30.0)
    begin = time.perf_counter()
    process = ServerProcess(ChildConfig(bundle_dir=str(bundle), server=config))
    try:
        port = process.wait_ready()
        yield port, time.perf_counter() - begin
    finally:
        process.stop()


def settle(port: int, name: str) -> None:
    """Until what wrk left behind is answered: it closes with requests on their way, and a half-closed client counts."""
    before = -1
    while (count := stats_of(port, name)["execution_count"]) != before:
        before = count
        time.sleep(1.0)


def stats_of(port: int, name: str) -> dict[str, Any]:
    """The model's statistics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{name}/stats", timeout=30) as answer:
        return json.load(answer)["model_stats"][0]


def calibration_of(port: int, name: str) -> dict[str, Any]:
    """What the server says of how it calls the model."""
    return stats_of(port, name)["millrace"]["calibration"]


def wait_for(port: int, name: str, sources: set[str]) -> dict[str, Any]:
    """The calibration, once it is of one of these sources; as it is where the machine is too busy for one."""
    deadline = time.monotonic() + TUNING_S
    while (found := calibration_of(port, name))["source"] not in sources and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def measure(case: Case, folder: Path, seconds: float) -> None:
    """One model: a line for each figure."""
    bundle, environments = bundle_of(case, folder), bodies(case, folder)
    calibrations, path = folder / "calibrations", f"/v2/models/{case.name}/infer"
    with server(bundle, case.name, calibrations) as (port, ready_s):
        begin = time.perf_counter()
        found = wait_for(port, case.name, {"idle"})
        tuned_s = time.perf_counter() - begin
    shallow, deep = (str(Layout(**found[name])) for name in ("shallow", "deep"))
    print(f"{case.name}: {len(case.model) >> 20} MiB; ready {ready_s:.2f} s without a calibration; measured itself "
          f"{found['spent_s']:.1f} s, {found['source']} {tuned_s:.1f} s after: alone {shallow}, many {deep}, "
          f"{found['deep_cost']['best_rows']} rows")  # fmt: skip
    raws, lines = [raw_best(case, seconds)], {}
    with server(bundle, case.name, calibrations) as (port, again_s):
        if found["source"] == "idle":
            wait_for(port, case.name, {"stored"})
        for form, environment in environments.items():
            wrk(port, path, environment, 2, 3)  # warm-up
            alone = wrk(port, path, environment, 1, seconds)
            many = wrk(port, path, environment, 64, seconds)
            lines[form] = (alone, many)
            settle(port, case.name)
    raws.append(raw_best(case, seconds))
    raw = max(raws, key=lambda one: one.rows_per_s)
    p50_s = min(one.p50_s for one in raws)
    both = " and ".join(f"{one.rows_per_s:.1f}" for one in raws)
    print(f"  ready with the stored calibration: {again_s:.2f} s (aim {case.ready_aim_s:g})")
    print(f"  raw best: {both} rows/s before and after ({raw.many}); p50 {p50_s * 1e3:.2f} ms ({raw.alone})")
    for form, (alone, many) in lines.items():
        share, over_ms = many["rps"] / raw.rows_per_s, (alone["p50"] - p50_s) * 1e3
        lone = f"p50 c=1 {alone['p50'] * 1e3:6.2f} ms, {over_ms:+.2f} ms over raw (aim {case.over_raw_aim_ms:+g})"
        size = f"{body_kb(environments[form])} KB"
        print(f"  {form:<6} {size:>7}: c=64 {many['rps']:6.1f}/s = {share:.3f} of raw best; {lone}; "
              f"p99 c=64 {many['p99'] * 1e3:.0f} ms")  # fmt: skip
    print(f"  JSON to binary at c=64: {lines['json'][1]['rps'] / lines['binary'][1]['rps']:.3f}")


def body_kb(environment: dict[str, str]) -> int:
    """Of a request."""
    return Path(environment["BODY"]).stat().st_size >> 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--model", choices=["text", "cnn"])
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    print(f"{cores()} cores of {processor()}; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        for case in cases():
            if arguments.model in (None, case.name):
                measure(case, Path(name), arguments.seconds)


if __name__ == "__main__":
    main()
