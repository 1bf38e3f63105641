"""kill -9 of the worker in every step, and of the command itself: the same digests, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from typing_by_hand import command, environment, run_millrace, states_of

STEPS = ("data", "train", "export", "evaluate", "compress", "register", "serve", "monitor")


def worker_pids(folder: Path) -> list[int]:
    """Workers write a file each while they live."""
    pids = []
    for path in (folder / ".millrace" / "scratch" / "workers").glob("*.json"):
        pids.append(int(json.loads(path.read_text())["pid"]))
    return pids


def run_and_kill(folder: Path, step: str, victim: str) -> int:
    """Start a run; when `step` has started, kill -9 its worker or the command. Its exit code."""
    process = subprocess.Popen(
        command("run", "--json"), cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("step") == step and event.get("state") == "running":
            targets = [process.pid] if victim == "command" else wait_for_worker(folder, process)
            for pid in targets:
                with suppress(ProcessLookupError):  # a quick step was over before it could be killed
                    os.kill(pid, signal.SIGKILL)
            break
    process.communicate()
    return process.returncode


def wait_for_worker(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    while process.poll() is None:
        pids = worker_pids(folder)
        if pids:
            return pids
    return []


def finished(folder: Path) -> list[str]:
    return [name for name, state in states_of(folder).items() if state in ("succeeded", "cached")]


@pytest.mark.slow
@pytest.mark.rotating(2, "kills")
@pytest.mark.parametrize("step", STEPS)
def test_a_run_whose_worker_is_killed_continues_to_the_same_digests(
    small: Path, undisturbed_digest: str, step: str
) -> None:
    run_and_kill(small, step, "worker")
    end_and_compare(small, undisturbed_digest, finished(small), 1)


@pytest.mark.slow
@pytest.mark.rotating(2, "kills")
def test_a_run_whose_command_is_killed_in_each_step_continues_to_the_same_digests(
    small: Path, undisturbed_digest: str
) -> None:
    """Killed eight times, a step later each time: what is done stays done."""
    for number, step in enumerate(STEPS):
        assert run_and_kill(small, step, "command") == -signal.SIGKILL, step
        assert set(finished(small)) == set(STEPS[:number]), step
    end_and_compare(small, undisturbed_digest, finished(small), 2)  # each was begun once more


def end_and_compare(small: Path, digest: str, done: list[str], most: int) -> None:
    run_millrace(small, "run")
    view = json.loads(run_millrace(small, "runs", "show", "last", "--json").stdout)
    after = {one["name"]: one["state"] for one in view["steps"]}
    assert set(after) == set(STEPS)
    assert all(state in ("succeeded", "cached") for state in after.values())
    attempts = {one["name"]: one["attempt"] for one in view["steps"] if one["state"] == "succeeded"}
    # What was done before the kill is not done again: in a new run it is cached, in the same run untouched.
    assert all(attempts.get(name, 0) <= most for name in done)
    (version,) = json.loads(run_millrace(small, "models", "--json").stdout)
    assert version["digest"] == digest
