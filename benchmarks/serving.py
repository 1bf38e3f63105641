"""Requests per second and latency of the data plane against FastAPI, same model, same run, interleaved.

Run: `python benchmarks/serving.py [--model FILE] [--seconds 4] [--rounds 3]`. Needs `wrk`.
Without --model a dense net (64-128-64-10) stands for a small model; `millrace models export digits --to DIR`
gives the digits model. Both servers have one process and one inference thread, on the first core; so has the raw
loop. wrk has the other cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from millrace.formats.bundle import BundleContents, write_bundle
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.stats.drift import build_reference

HERE = Path(__file__).resolve().parent
CORES = sorted(os.sched_getaffinity(0))
PATH = "/v2/models/digits/infer"
SIGNATURE = Signature(
    task="classification",
    inputs=[TensorSpec(name="pixels", dtype="float32", shape=[-1, 64], semantic="image", image=[8, 8, 1])],
    outputs=[TensorSpec(name="probabilities", dtype="float32", shape=[-1, 10], semantic="probabilities")],
    label="digit",
    classes=[str(digit) for digit in range(10)],
)


def dense_model(path: Path) -> None:
    """A small multilayer perceptron with random weights."""
    rng = np.random.default_rng(0)
    sizes = (64, 128, 64, 10)
    nodes, weights, name = [], [], "pixels"
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        matrix = rng.normal(0, rows**-0.5 / 4, (rows, columns)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        weights.append(numpy_helper.from_array(np.zeros(columns, np.float32), f"b{layer}"))
        nodes.append(helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [f"g{layer}"]))
        name = f"g{layer}"
        if layer < len(sizes) - 2:
            nodes.append(helper.make_node("Relu", [name], [f"r{layer}"]))
            name = f"r{layer}"
    nodes.append(helper.make_node("Softmax", [name], ["probabilities"], axis=1))
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 64])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 10])]
    graph = helper.make_graph(nodes, "dense", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write_small_bundle(folder: Path, model: Path) -> Path:
    """A bundle around the model, with a reference, so that the telemetry costs what it costs."""
    pixels = np.random.default_rng(1).integers(0, 17, (600, 64)).astype(np.float32)
    tensors = {"pixels": pixels}
    outputs = open_session(model).run(tensors)
    contents = BundleContents(
        model=model, variants={}, signature=SIGNATURE, metrics=[], lineage={}, guarantees={},
        reference=build_reference(tensors, outputs, SIGNATURE),
        golden={"inputs": {"pixels": pixels[:16]}, "outputs": {name: value[:16] for name, value in outputs.items()}},
    )  # fmt: skip
    write_bundle(folder / "bundle", contents)
    return folder / "bundle"


def bodies(folder: Path) -> dict[str, dict[str, str]]:
    """Environment for post.lua by format: the same row as JSON and binary."""
    row = np.random.default_rng(2).integers(0, 17, (1, 64)).astype(np.float32)
    tensor = {"name": "pixels", "shape": [1, 64], "datatype": "FP32"}
    as_json = json.dumps({"inputs": [{**tensor, "data": row.reshape(-1).tolist()}]}).encode()
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": row.nbytes}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    rows = json.dumps({"instances": [{"pixels": row.reshape(-1).tolist()}]}).encode()
    found = {}
    for name, body in {"json": as_json, "binary": head + row.tobytes(), "rows": rows}.items():
        (folder / name).write_bytes(body)
        found[name] = {"BODY": str(folder / name)}
    found["binary"]["JSON_BYTES"] = str(len(head))
    return found


def wrk(
    port: int, path: str, environment: dict[str, str], connections: int, seconds: float, pinned: bool = False
) -> dict[str, float]:
    """One run of wrk: requests per second, p50 and p99 in seconds. Every answer must be a 200."""
    command = [
        "wrk", "-t1", "--timeout", "20s",
        f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(HERE / "post.lua"),
        f"http://127.0.0.1:{port}{path}",
    ]  # fmt: skip
    if pinned:
        command = ["taskset", "-c", ",".join(map(str, CORES[1:] or CORES)), *command]
    text = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    fields = next(line for line in text.splitlines() if line.startswith("RESULT")).split()
    requests, duration_us, bad, p50_us, p99_us = map(int, fields[1:])
    if bad or not requests:
        raise SystemExit(f"{bad} of {requests} answers were not 200:\n{text}")
    return {"requests": requests, "rps": requests / duration_us * 1e6, "p50": p50_us / 1e6, "p99": p99_us / 1e6}


@contextmanager
def on_first_core() -> Iterator[None]:
    """What runs or is started in here runs on the first core."""
    os.sched_setaffinity(0, CORES[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


@contextmanager
def our_server(bundle: Path) -> Iterator[tuple[int, int]]:
    """Millrace, started the way `millrace serve` starts it."""
    server = ServerConfig(name="digits", version="1", port=0)
    with on_first_core():
        process = ServerProcess(ChildConfig(bundle_dir=str(bundle), server=server))
    try:
        yield process.wait_ready(), process.pid
    finally:
        process.stop()


@contextmanager
def fastapi_server(model: Path) -> Iterator[tuple[int, int]]:
    """The baseline in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with on_first_core():
        process = subprocess.Popen([sys.executable, str(HERE / "baseline_fastapi.py"), str(model), str(port)])
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def raw_call_s(model: Path) -> float:
    """Median of a bare onnxruntime call of one row."""
    session = open_session(model)
    row = {"pixels": np.zeros((1, 64), np.float32)}
    took = []
    with on_first_core():
        for _ in range(2000):
            start = time.perf_counter()
            session.raw.run(None, row)
            took.append(time.perf_counter() - start)
    return statistics.median(took)


def ready_s(bundle: Path) -> float:
    """Seconds from the start of a server until it is ready."""
    server = ServerConfig(name="digits", version="1", port=0)
    begin = time.perf_counter()
    process = ServerProcess(ChildConfig(bundle_dir=str(bundle), server=server))
    try:
        process.wait_ready()
        return time.perf_counter() - begin
    finally:
        process.stop()


def measure(model: Path, seconds: float, rounds: int, folder: Path) -> dict[str, float]:
    """Medians over interleaved rounds, by case."""
    found: dict[str, list[float]] = {}
    environments = bodies(folder)
    bundle = write_small_bundle(folder, model)
    found["ready"] = [ready_s(bundle) for _ in range(3)]
    with our_server(bundle) as ours, fastapi_server(model) as theirs:
        cases = {
            "ours binary": (ours, PATH, "binary"),
            "FastAPI": (theirs, "/quickest", "json"),
            "FastAPI+checks": (theirs, "/validated", "json"),
            "ours json": (ours, PATH, "json"),
            "ours rows": (ours, "/v1/models/digits:predict", "rows"),
        }
        for (port, _), path, form in cases.values():
            wrk(port, path, environments[form], 8, 1, pinned=True)  # warm-up
        for _ in range(rounds):
            found.setdefault("raw", []).append(raw_call_s(model))
            for name, ((port, pid), path, form) in cases.items():
                one = wrk(port, path, environments[form], 1, seconds / 2, pinned=True)
                before_s = cpu_s(pid)
                many = wrk(port, path, environments[form], 64, seconds, pinned=True)
                found.setdefault(f"{name} cpu", []).append((cpu_s(pid) - before_s) / many["requests"])
                found.setdefault(f"{name} p50 c=1", []).append(one["p50"])
                found.setdefault(f"{name} rps c=64", []).append(many["rps"])
                found.setdefault(f"{name} p99 c=64", []).append(many["p99"])
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure and print one line per figure, each with its baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an ONNX file: pixels [N, 64] to probabilities [N, 10]")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or folder / "dense.onnx"
        if arguments.model is None:
            dense_model(model)
        result = measure(model, arguments.seconds, arguments.rounds, folder)
    raw = result["raw"]
    name = arguments.model.name if arguments.model else "dense 64-128-64-10"
    print(f"model: {name}; a raw onnxruntime call of one row takes {raw * 1e6:.0f} us")
    print(f"start to ready: {result['ready']:.2f} s (aim 0.5)")
    for case in ("ours binary", "ours json"):
        share = result[f"{case} rps c=64"] * raw
        print(f"{case}: {share:.2f} of a raw loop of one row on the same core")
    print("FastAPI validates nothing, FastAPI+checks declares pydantic models; CPU is the server's own, per request")
    heads = ("p50 c=1 ", "over raw ", "requests/s c=64", "to FastAPI", "to +checks", "p99 c=64", "CPU     ")
    print(" | ".join(("case          ", *heads, "to FastAPI", "to +checks")))
    for case in ("ours binary", "ours json", "ours rows", "FastAPI", "FastAPI+checks"):
        p50, rps, p99, cpu = (result[f"{case} {what}"] for what in ("p50 c=1", "rps c=64", "p99 c=64", "cpu"))
        speed = [rps / result[f"{other} rps c=64"] for other in ("FastAPI", "FastAPI+checks")]
        thrift = [result[f"{other} cpu"] / cpu for other in ("FastAPI", "FastAPI+checks")]
        latency = f"{p50 * 1e3:5.3f} ms | {(p50 - raw) * 1e3:+6.3f} ms"
        load = f"{rps:15,.0f} | {speed[0]:9.1f}x | {speed[1]:9.1f}x | {p99 * 1e3:5.1f} ms"
        print(f"{case:<14} | {latency} | {load} | {cpu * 1e6:5.1f} us | {thrift[0]:9.1f}x | {thrift[1]:9.1f}x")


if __name__ == "__main__":
    main()
