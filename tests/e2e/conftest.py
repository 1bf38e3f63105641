"""The command line as a stranger types it, in folders of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes

Millrace = Callable[..., subprocess.CompletedProcess[str]]


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
    assert "Traceback (most recent call last)" not in shown, shown
    if code is not None:
        assert done.returncode == code, shown
    return done


@pytest.fixture
def millrace(tmp_path: Path) -> Millrace:
    def run(*arguments: str, code: int | None = 0, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return run_millrace(folder, *arguments, code=code)

    return run


def write_table(path: Path, kind: str = "classification") -> None:
    """Real tables: breast cancer (569 rows) and diabetes (442 rows), as CSV with an id column."""
    load = load_breast_cancer if kind == "classification" else load_diabetes
    frame = load(as_frame=True).frame
    frame.columns = [name.replace(" ", "_") for name in frame.columns]
    if kind == "classification":
        frame["target"] = frame["target"].map({0: "malignant", 1: "benign"})
    frame.insert(0, "patient", [f"P{index:05d}" for index in range(len(frame))])
    frame.to_csv(path, index=False)


SMALL_SPEC = """project: cancer
data:
  source: cancer.csv
  label: target
  ignore: [patient]
train: {model: linear}
compress: {batch_sizes: [1]}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a small table and its spec: a whole run takes seconds."""
    write_table(tmp_path / "cancer.csv")
    (tmp_path / "millrace.yaml").write_text(SMALL_SPEC)
    return tmp_path


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
