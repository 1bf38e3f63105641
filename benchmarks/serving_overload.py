"""Far more clients than a model can answer: what is still answered, how late, and whether any is lost.

Run: `python benchmarks/serving_overload.py [--seconds 8] [--model dense|text|cnn]`. Needs `wrk`; about 4 minutes.
Clients of wrk ask again at once when they are refused: a retry storm. Goodput is that of answers with 200, beside
that of 64 clients in the same run; the latency is that of accepted requests, as the server counted it, in bins of 9 %.
The dense net is served on one core, with wrk on the others; of heavy models the server has all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from serving import CORES, dense_model, on_first_core, write_small_bundle
from serving_heavy import Case, bundle_of, calibration_of, cases, wait_for
from storming import binary_body, storm, write_bodies

from millrace.serve.child import ChildConfig
from millrace.serve.layouts import cores
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.telemetry import TelemetryFrame
from millrace.serve.tuning import processor
from millrace.stats.latency import BINS_PER_OCTAVE

SETTLE_S = 2.5  # what wrk left behind is answered, and telemetry has come


def quantile_s(bins: Counter[int], share: float) -> float:
    """The upper bound of the bin in which a share of the latencies is reached."""
    total, seen = sum(bins.values()), 0
    for place in sorted(bins):
        seen += bins[place]
        if seen >= share * total:
            return 1e-6 * 2 ** ((place + 1) / BINS_PER_OCTAVE)
    return 0.0


class Watched:
    """A server, and the latencies that it tells."""

    def __init__(self, bundle: Path, config: ServerConfig) -> None:
        self.bins: Counter[int] = Counter()
        self.process = ServerProcess(ChildConfig(bundle_dir=str(bundle), server=config), self._take)
        self.port = self.process.wait_ready()

    def _take(self, frame: TelemetryFrame) -> None:
        self.bins.update(frame.latencies)

    def storm(self, path: str, environment: dict[str, str], connections: int, seconds: float, on: str) -> Any:
        """One run of wrk, with the latencies of accepted requests."""
        time.sleep(SETTLE_S)
        self.bins.clear()
        found = storm(self.port, path, environment, connections, seconds, on)
        time.sleep(SETTLE_S)
        found["rps"] = found["good"] / found["seconds"]
        found["accepted_p99_s"] = quantile_s(Counter(self.bins), 0.99)
        return found


def report(
    watched: Watched, name: str, environment: dict[str, str], crowds: list[int], seconds: float, on: str
) -> None:
    """A line for 64 clients and for each crowd."""
    path = f"/v2/models/{name}/infer"
    watched.storm(path, environment, 8, 2, on)
    base = watched.storm(path, environment, 64, seconds, on)
    cost = calibration_of(watched.port, name)["deep_cost"]
    batch_s = cost["base_s"] + cost["per_row_s"] * (cost["best_rows"] or 1)
    print(f"{name}: 64 clients {base['rps']:,.0f} good answers/s; bound of the queue 1 s + one batch {batch_s:.3f} s")
    for crowd in crowds:
        found = watched.storm(path, environment, crowd, seconds, on)
        share, late_s = found["rps"] / base["rps"], found["accepted_p99_s"]
        print(
            f"  {crowd:>5} clients: {found['rps']:>8,.0f} good/s = {share:.2f} of that (aim 0.9); "
            f"{found['refused'] / found['seconds']:>5,.0f} refused/s; accepted p99 {late_s:.3f} s "
            f"(aim at most {1 + batch_s:.2f}); lost {found['lost']}, timed out {found['timeout']}, "
            f"other answers {found['wrong']}"
        )


def dense(folder: Path, seconds: float) -> None:
    """The small model: more clients than its queue takes only with 2,048."""
    dense_model(folder / "dense.onnx")
    bundle = write_small_bundle(folder, folder / "dense.onnx")
    row = np.random.default_rng(2).integers(0, 17, (1, 64)).astype(np.float32)
    environment = write_bodies(folder, [binary_body("pixels", "FP32", row)])
    with on_first_core():
        watched = Watched(bundle, ServerConfig(name="dense", version="1", port=0))
    try:
        report(watched, "dense", environment, [512, 2048], seconds, ",".join(map(str, CORES[1:] or CORES)))
    finally:
        watched.process.stop()


def heavy(case: Case, folder: Path, seconds: float) -> None:
    """A model whose queue of one second is full with 64 to 100 clients."""
    bundle = bundle_of(case, folder)
    environment = write_bodies(folder, [binary_body(case.spec.name, case.datatype, case.row)])
    watched = Watched(bundle, ServerConfig(name=case.name, version="1", port=0))
    try:
        wait_for(watched.port, case.name, {"idle"})
        report(watched, case.name, environment, [512], 2 * seconds, "")
    finally:
        watched.process.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--model", choices=["dense", "text", "cnn"])
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    print(f"{cores()} cores of {processor()}; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        if arguments.model in (None, "dense"):
            dense(Path(name), arguments.seconds)
        for case in cases():
            if arguments.model in (None, case.name):
                heavy(case, Path(name), arguments.seconds)


if __name__ == "__main__":
    main()
