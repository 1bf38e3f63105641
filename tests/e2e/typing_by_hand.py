"""The command line as a stranger types it, in folders of its own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sklearn.datasets import load_breast_cancer, load_diabetes


def environment() -> dict[str, str]:
    """No settings of the person who runs the tests; one thread per process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MILLRACE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "millrace", *arguments]


def run_millrace(folder: Path, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code must be `code` unless that is None. Never a traceback."""
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    shown = f"{done.stdout}\n{done.stderr}"
    is_shown = arguments[0] != "logs" and "--json" not in arguments
    assert not (is_shown and "Traceback (most recent call last)" in shown), shown
    if code is not None:
        assert done.returncode == code, shown
    return done


def write_table(path: Path, kind: str = "classification") -> None:
    """Real tables: breast cancer (569 rows) and diabetes (442 rows), as CSV with an id column."""
    table = load_breast_cancer() if kind == "classification" else load_diabetes()
    names = [str(name).replace(" ", "_") for name in table.feature_names]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", *names, "target"])
        for index, (row, target) in enumerate(zip(table.data, table.target, strict=True)):
            answer = ("malignant", "benign")[target] if kind == "classification" else target
            writer.writerow([f"P{index:05d}", *row, answer])


SMALL_SPEC = """project: cancer
data:
  source: cancer.csv
  label: target
  ignore: [patient]
train: {model: linear}
compress: {batch_sizes: [1]}
"""


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Facts by step of the last run."""
    view = json.loads(run_millrace(folder, "runs", "show", "last", "--json").stdout)
    return {step["name"]: step["facts"] for step in view["steps"]}


def states_of(folder: Path) -> dict[str, str]:
    """States by step of the last run."""
    view = json.loads(run_millrace(folder, "runs", "show", "last", "--json").stdout)
    return {step["name"]: step["state"] for step in view["steps"]}


def bundle_digest(folder: Path) -> str:
    """The digest of the newest model version."""
    return json.loads(run_millrace(folder, "models", "--json").stdout)[0]["digest"]
