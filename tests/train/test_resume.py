"""`kill -9` at random steps, then again: the same bits as a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.core.errors import CancelledError
from millrace.train.stage import train

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import msgspec
from train_context import FakeContext, as_spec
from millrace.train.stage import train

folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])

class Context(FakeContext):
    groups = 0

    @property
    def cancelled(self):  # asked once after every optimiser step
        self.groups += 1
        if self.groups == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

spec = as_spec(json.loads((folder / "spec.json").read_text()))
context = Context(folder / "work", folder, "train", seed=7)
facts = train(spec, context)
(folder / "facts.json").write_bytes(msgspec.json.encode(facts))
"""
MODEL = """
from torch import nn

def build(ctx):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(ctx.features, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(24, ctx.outputs),
    )
"""
SPEC = """{"train": {"model": "model.py:build", "epochs": 3, "batch_size": 64, "accumulate": 2, "clip_norm": 0.5,
 "schedule": "one_cycle", "class_weights": "balanced", "early_stopping": {"patience": 2},
 "optimizer": {"name": "adamw", "lr": 0.01}, "checkpoint_every_steps": 1, "precision": "PRECISION"}}"""
STEPS = 3 * 9  # 1047 rows: 17 batches, 9 groups an epoch


def run(folder: Path, kill_at: int = 0) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(kill_at)], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()[-3000:]
    return done.returncode


def prepared(project, precision: str):  # type: ignore[no-untyped-def]
    (project.folder / "model.py").write_text(MODEL)
    (project.folder / "spec.json").write_text(SPEC.replace("PRECISION", precision))
    return project.folder


@pytest.mark.rotating(1)
@pytest.mark.parametrize(("precision", "kills"), [("fp32", 2), ("bf16", 1), ("fp16", 1)])
def test_killed_and_resumed_weights_are_bit_equal(precision: str, kills: int, digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = prepared(digits, precision)
    undisturbed = shutil.copytree(folder, tmp_path / "undisturbed")
    spec = digits.spec(**json.loads((folder / "spec.json").read_text()))
    context = type(digits.context("x"))(undisturbed / "work", undisturbed, "train", seed=7)
    train(spec, context)
    places = sorted(random.Random().sample(range(2, STEPS), kills))
    left = 0
    for place in places:  # a resumed process counts from the checkpoint of the step before its kill
        assert run(folder, place - left) == -signal.SIGKILL, places
        left = place - 1  # the step of the kill was done, its checkpoint was not
    assert run(folder) == 0
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["resumed_from_step"] == left, places
    ours, theirs = (place / "work/outputs/train.model" for place in (folder, undisturbed))
    for path in theirs.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), (path.name, places)


def test_a_cancelled_training_leaves_a_checkpoint_and_continues(digits) -> None:  # type: ignore[no-untyped-def]
    folder = prepared(digits, "fp32")
    sections = json.loads((folder / "spec.json").read_text())
    sections["train"]["checkpoint_every_steps"] = None
    spec = digits.spec(**sections)
    with pytest.raises(CancelledError, match="its checkpoint is kept"):
        train(spec, digits.context("train", cancel_after=10))
    facts = train(spec, digits.context("train"))
    assert facts["resumed_from_step"] == 11
    assert [epoch["epoch"] for epoch in facts["epochs"]] == [1, 2, 3]
