"""Start-up: `import millrace`, `--help`, a cached run, the demo; each beside bare Python in the same run.

Run after `python -m compileall src`: byte-code is part of an installation.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 7


def timed(command: list[str], folder: Path) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    duration = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return duration


def main() -> None:
    """Print one table."""
    python = sys.executable
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        demo = timed([python, "-m", "millrace", "demo"], folder)
        commands = {
            "bare python": [python, "-c", "pass"],
            "import millrace": [python, "-c", "import millrace"],
            "millrace --help": [python, "-m", "millrace", "--help"],
            "cached run": [python, "-m", "millrace", "run"],
        }
        samples: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for label, command in commands.items():
                samples[label].append(timed(command, folder / "digits" if label == "cached run" else folder))
        base = statistics.median(samples["bare python"])
        aims = {"import millrace": 0.15, "millrace --help": 0.4, "cached run": 1.5}
        for label, values in samples.items():
            median = statistics.median(values)
            rows.append((label, median, median / base, aims.get(label)))
        rows.append(("demo", demo, demo / base, 30.0))
        print(f"{'what':<18}{'seconds':>9}{'x bare python':>15}{'aim s':>8}")
        for label, seconds, ratio, aim in rows:
            print(f"{label:<18}{seconds:>9.3f}{ratio:>15.1f}{aim if aim else '-':>8}")


if __name__ == "__main__":
    main()
