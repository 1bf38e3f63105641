"""A step that does not end: Ctrl-C twice ends it at once; a second `run` on the spec joins the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = "project: own\nsteps: [{name: wait, uses: 'steps.py:wait'}]\n"
DEAF = """import signal, time
def wait(ctx):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (ctx.project_dir / "started").touch()
    while not (ctx.project_dir / "go").exists():
        time.sleep(0.05)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "millrace.yaml").write_text(SPEC)
    (tmp_path / "steps.py").write_text(DEAF)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MILLRACE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "millrace", *arguments], cwd=folder, env=kept | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], words: str) -> str:
    """Read what it prints until the words stand there."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if words in text:
            break
    assert words in text
    return text


def running(folder: Path) -> subprocess.Popen[str]:
    """A run whose step has begun."""
    process = start(folder, "run", "--json")
    until(process, '"running"')
    while not (folder / "started").exists():
        assert process.poll() is None
    return process


def test_ctrl_c_twice_ends_a_step_that_does_not_listen(folder: Path) -> None:
    process = running(folder)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=4.0)  # the grace of one Ctrl-C is longer
    assert process.returncode == 130
    listed, _ = start(folder, "runs", "--json").communicate()
    assert json.loads(listed)[0]["state"] == "cancelled"


def test_a_second_run_follows_the_first_to_its_end(folder: Path) -> None:
    first = running(folder)
    second = start(folder, "run")
    until(second, "following it")
    (folder / "go").touch()
    said, _ = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), said
    listed, _ = start(folder, "runs", "--json").communicate()
    assert len(json.loads(listed)) == 1
    assert (folder / ".millrace/records.db").is_file()
