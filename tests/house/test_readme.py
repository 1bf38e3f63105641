"""What the README shows is what happens: its spec and its Python are executed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.core.spec_errors import parse_spec

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str, text: str = README) -> str:
    """The fenced block behind `<!-- test: name -->`."""
    match = re.search(rf"<!-- test: {name} -->\n```\w*\n(.*?)```", text, flags=re.DOTALL)
    assert match, f"the README has no block marked 'test: {name}'"
    return match[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits project whose spec is the README's."""
    folder = tmp_path_factory.mktemp("readme") / "digits"
    run([sys.executable, "-m", "millrace", "init", "digits", str(folder)], folder.parent)
    (folder / "millrace.yaml").write_text(block("spec"), encoding="utf-8")
    return folder


def run(command: list[str], folder: Path) -> str:
    """Run a command to its end; a failure shows what it printed."""
    environment = os.environ | {"BROWSER": "true", "MILLRACE_COLOR": "never"}
    environment.pop("MILLRACE_HOME", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_is_as_short_as_promised() -> None:
    assert len(block("spec").splitlines()) == 12
    assert len(block("python").splitlines()) == 8
    assert "```\nmake demo\nmake test\n```" in README
    introduction = README.split("![")[0].strip().splitlines()
    assert len([line for line in introduction if line and not line.startswith("#")]) == 3


def test_the_spec_is_valid() -> None:
    spec = parse_spec(block("spec"))
    assert spec.data is not None
    assert spec.data.label == "digit"


@pytest.mark.slow
def test_the_python_runs(project: Path) -> None:
    (project / "readme.py").write_text(block("python"), encoding="utf-8")
    printed = run([sys.executable, "readme.py"], project)
    label, _, probabilities = printed.strip().splitlines()[-1].partition(" ")
    assert label in {str(digit) for digit in range(10)}
    assert probabilities.count(":") == 10
    assert (project / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_promises_its_report(project: Path) -> None:
    """`millrace run` on the README's spec gives a champion and the report beside the spec."""
    run([sys.executable, "-m", "millrace", "run"], project)
    listed = run([sys.executable, "-m", "millrace", "models", "--json"], project)
    assert '"digits"' in listed
    assert '"champion"' in listed
    assert (project / "report.html").exists()
