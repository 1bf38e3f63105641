"""What a step costs that does nothing: from submit to its result, beside the bare ways to start a process.

    python benchmarks/step_overhead.py [--rounds 200]

In one run, in turns, each measured from before the start until its end is known: `os.fork` and wait in a process
like the fork server (it has imported numpy); a subprocess of Python that does nothing; a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from millrace.compute.local import LocalCompute
from millrace.core.ports import Work
from millrace.testing.compute import ENTRY

AIM_S = 0.025  # of 0.060 from submit to recorded


def bare_fork() -> None:
    """A child that ends at once."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def bare_subprocess() -> None:
    """A Python that does nothing."""
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def step_of(compute: LocalCompute, home: Path) -> Callable[[], None]:
    """A function that runs one no-op step."""

    def run() -> None:
        work = Work(
            step_id="0" * 32, run_id="r", name="nothing", implementation="", spec=b"{}", params={"do": "hello"},
            project_dir=str(home), scratch_dir=str(home), log_path=str(home / "step.log"), home_dir=str(home),
        )  # fmt: skip
        result = compute.submit(work, lambda frame: None).wait(60)
        if result is None or result.state != "succeeded":
            raise SystemExit(f"the step did not succeed: {result}")

    return run


def main() -> None:
    """Print one table per kind of fork server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    for preload in ((), ("polars", "pyarrow", "torch")):
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), preload, rounds)


def report(home: Path, preload: tuple[str, ...], rounds: int) -> None:
    """Measure in turns and print."""
    compute = LocalCompute(home, entry=ENTRY, preload=preload)
    step = step_of(compute, home)
    first = timed(step)
    timed(step)  # waits for the import in progress
    time.sleep(5 if preload else 0.5)  # let the rest of the imports end
    actions = {"os.fork + wait": bare_fork, "python -c pass": bare_subprocess, "no-op step": step}
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        for name, action in actions.items():
            if name != "python -c pass" or number % 4 == 0:
                samples[name].append(timed(action))
    compute.close()
    base = statistics.median(samples["os.fork + wait"])
    print(f"\nfork server with {', '.join(preload) or 'numpy'}; the first step (starts it): {first * 1e3:.0f} ms")
    print(f"{'what':<16}{'p50 ms':>9}{'p95 ms':>9}{'x fork':>9}{'x python':>10}{'aim ms':>8}")
    python = statistics.median(samples["python -c pass"])
    for name, values in samples.items():
        median, high = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        aim = f"{AIM_S * 1e3:.0f}" if name == "no-op step" else "-"
        print(f"{name:<16}{median * 1e3:>9.2f}{high * 1e3:>9.2f}{median / base:>9.1f}{median / python:>10.2f}{aim:>8}")


if __name__ == "__main__":
    main()
