"""What a server costs to start: CPU and memory of its whole process tree, with a new database.

Run: `python benchmarks/server_start.py [--workers 1]`. MLflow 3.17 with 4 workers: 27 s of CPU, 1,375 MB
(`mlflow server` with SQLite on the same kind of machine, given in the project's research).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from millrace.testing.server import RunningServer

MLFLOW_CPU_S, MLFLOW_MB = 27.0, 1375.0
AIM_CPU_S, AIM_MB = 1.5, 120.0


def measure(workers: int) -> tuple[float, float, float]:
    """CPU seconds (children that have ended included), proportional memory in MB, seconds until ready."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with RunningServer(Path(folder) / "home", workers=workers) as server:
            ready_s = time.perf_counter() - began
            time.sleep(1.0)
            tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
            cpu_s = sum(sum(process.cpu_times()[:4]) for process in tree)
            memory = sum(process.memory_full_info().pss for process in tree)
    return cpu_s, memory / 1e6, ready_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'server':<24} {'CPU s':>7} {'MB (PSS)':>9} {'ready s':>8}")
    for workers in (1, 4):
        runs = [measure(workers) for _ in range(arguments.rounds)]
        cpu_s, memory, ready_s = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{f'millrace up, workers {workers}':<24} {cpu_s:>7.2f} {memory:>9.0f} {ready_s:>8.2f}")
    print(f"{'MLflow 3.17, workers 4':<24} {MLFLOW_CPU_S:>7.1f} {MLFLOW_MB:>9.0f} {'-':>8}")
    print(f"{'aim':<24} {AIM_CPU_S:>7.1f} {AIM_MB:>9.0f}")


if __name__ == "__main__":
    main()
