"""The named commands exist, announce what they download, and CI runs the same ones."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CI = (ROOT / ".ci/run").read_text(encoding="utf-8")


def dry_run(target: str, *arguments: str) -> list[str]:
    """The commands that a target would run."""
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", target, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},  # also under make test
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", ["install", "demo", "test", "quick", "check", "bench", "docs", "help"])
def test_every_chore_has_a_command(target: str) -> None:
    assert dry_run(target)
    assert re.search(rf"^{target}:.*## ", MAKEFILE, re.MULTILINE), f"{target} is not in `make help`"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readme_commands_install_first_and_say_so(target: str) -> None:
    commands = dry_run(target)
    announcement = next(index for index, line in enumerate(commands) if "to download" in line)
    first_download = next(index for index, line in enumerate(commands) if "pip" in line and " install " in line)
    assert announcement < first_download
    assert re.search(r"\d+ MB", commands[announcement])
    assert "minutes" in commands[announcement]


def test_torch_comes_first_and_from_the_lock() -> None:
    installs = [line for line in dry_run("install", "TORCH_INDEX=there") if " -m pip " in line]
    assert "^torch==" in installs[0]
    assert "--extra-index-url there" in installs[0]
    assert "requirements-dev.lock" in installs[1]
    assert "--no-deps" in installs[2]


def test_demo_ends_with_the_demo() -> None:
    assert dry_run("demo")[-1].strip().endswith("millrace demo")


def test_check_is_the_whole_list() -> None:
    commands = "\n".join(dry_run("check"))
    for tool in ("ruff check", "ruff format --check", "pyright", "lint-imports", "codespell", "gendocs.py --check"):
        assert tool in commands


def test_ci_calls_the_same_commands() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "set -euo pipefail" in CI
    lines = [line.strip() for line in CI.splitlines()]
    assert lines.index("make check") < lines.index("make test")
    assert "make demo" in lines
    checked = subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
