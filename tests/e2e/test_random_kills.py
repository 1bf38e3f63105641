"""kill -9 of the command at random moments, again and again: it continues, to the same digests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typing_by_hand import bundle_digest, command, environment, run_millrace

STEPS = {"data", "train", "export", "evaluate", "compress", "register", "serve", "monitor"}
KILLS = 4
SEED = "MILLRACE_TEST_SEED"


def run_for(folder: Path, seconds: float) -> bool:
    """Start a run and kill -9 the command after so long; False when it had ended before."""
    process = subprocess.Popen(
        command("run"), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return process.returncode == -signal.SIGKILL
    assert process.returncode == 0, said
    return False


def executed(folder: Path, run: str = "last") -> dict[str, tuple[Any, ...]]:
    """The steps of a run that were really executed to their end, with what would differ if they were done again."""
    done = run_millrace(folder, "runs", "show", run, "--json", code=None)
    steps = json.loads(done.stdout)["steps"] if done.returncode == 0 else []  # none: killed before there was a run
    return {
        step["name"]: (step["attempt"], step["id"], step["started_at"], step["ended_at"], str(step["outputs"]))
        for step in steps
        if step["state"] == "succeeded"
    }


@pytest.mark.slow
@pytest.mark.rotating(2, "kills")
def test_kills_at_random_moments_lose_at_most_the_step_in_flight(
    small: Path, undisturbed: Path, undisturbed_digest: str
) -> None:
    (took,) = json.loads(run_millrace(undisturbed, "runs", "--json").stdout)
    whole, folder = took["ended_at"] - took["started_at"], small
    seed = int(os.environ.get(SEED) or random.randrange(10**9))
    chance = random.Random(seed)
    # About a whole run in all, so that the kills are spread over every step.
    moments = [chance.uniform(0.0, 0.5) * whole for _ in range(KILLS)]
    shown = f"{SEED}={seed}: killed after {', '.join(f'{moment:.3f} s' for moment in moments)} of {whole:.3f} s"
    landed = 0
    before: dict[str, tuple[Any, ...]] = {}
    for moment in moments:
        landed += run_for(folder, moment)
        after = executed(folder)
        assert before.items() <= after.items(), shown
        before = after
        if set(before) == STEPS:
            break
    run_millrace(folder, "run")

    assert landed, shown
    runs = json.loads(run_millrace(folder, "runs", "--json").stdout)
    found = [step for run in runs for step in executed(folder, run["id"]).items()]
    assert sorted(name for name, _ in found) == sorted(STEPS), shown
    assert before.items() <= dict(found).items(), shown
    assert sum(attempt for _, (attempt, *_) in found) <= len(STEPS) + landed, shown
    assert bundle_digest(folder) == undisturbed_digest, shown
    assert len(json.loads(run_millrace(folder, "models", "--json").stdout)) == 1, shown
    assert run_millrace(folder, "run").stdout.count("(cached)") == len(STEPS), shown
