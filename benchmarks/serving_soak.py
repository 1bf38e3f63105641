"""A server at 80 % of what it can do, for ten minutes: memory, errors, latency.

Run: `python benchmarks/serving_soak.py [--minutes 10]`. Needs `wrk`. The dense net, with telemetry, on one core;
wrk on the others. Clients pause between requests, so that they ask for 80 % of what 64 busy ones got.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from serving import CORES, dense_model, our_server, write_small_bundle
from storming import binary_body, memory_mb, storm, write_bodies

from millrace.serve.tuning import processor

LOAD, WAIT_MS, STEP_S = 0.8, 4, 30.0
PATH = "/v2/models/digits/infer"


def main() -> None:
    """Measure and print a line a minute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    print(f"{processor()}; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense_model(folder / "dense.onnx")
        rows = np.random.default_rng(2).integers(0, 17, (256, 1, 64)).astype(np.float32)
        environment = write_bodies(folder, [binary_body("pixels", "FP32", row) for row in rows])
        with our_server(write_small_bundle(folder, folder / "dense.onnx")) as (port, pid):
            soak(port, pid, environment, arguments.minutes)


def soak(port: int, pid: int, environment: dict[str, str], minutes: float) -> None:
    """Find the capacity, then ask for a part of it."""
    others = ",".join(map(str, CORES[1:] or CORES))

    def ask(connections: int, seconds: float, wait_ms: int = 0) -> dict[str, Any]:
        found = storm(port, PATH, {**environment, "WAIT_MS": str(wait_ms)}, connections, seconds, others)
        return {**found, "rps": found["good"] / found["seconds"]}

    capacity = ask(64, 10)["rps"]
    connections = round(LOAD * capacity * WAIT_MS / 1e3)
    for _ in range(3):  # towards the rate: a pause is a little longer than it should be
        connections = max(1, round(connections * LOAD * capacity / ask(connections, 3, WAIT_MS)["rps"]))
    print(f"capacity {capacity:,.0f}/s; {connections} clients that pause {WAIT_MS} ms on average")
    memory, good, bad, p99_s = [memory_mb(pid)], 0, 0, []
    steps = max(2, round(minutes * 60 / STEP_S))
    for step in range(1, steps + 1):
        found = ask(connections, STEP_S, WAIT_MS)
        good += found["good"]
        bad += found["wrong"] + found["refused"] + found["lost"] + found["timeout"]
        p99_s.append(found["p99_s"])
        memory.append(memory_mb(pid))
        if step % 2 == 0:
            share = found["rps"] / capacity
            print(f"  {step * STEP_S / 60:4.1f} min: {share:.0%} of the capacity, {memory[-1]:.1f} MB, "
                  f"p99 {found['p99_s'] * 1e3:.1f} ms")  # fmt: skip
    half = len(memory) // 2
    print(f"{good:,} answers; others, refused or lost: {bad}; memory {memory[0]:.1f} MB before, {memory[half]:.1f} MB "
          f"half way, {memory[-1]:.1f} MB at the end; median p99 {np.median(p99_s) * 1e3:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
