"""The layers of ARCHITECTURE.md hold: import-linter finds no broken contract."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_contract_is_broken() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_folder_is_placed() -> None:
    """A new room is named in the layers, so that the contract covers it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(one for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    placed = {name.strip().split(".")[-1] for layer in layers["layers"] for name in layer.split("|")}
    package = ROOT / "src/millrace"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    data_only = {"templates", "static"}
    assert rooms - placed - data_only == set()
