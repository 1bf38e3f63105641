"""Faults that really happen: broken models, Ctrl-C, a full disk, a busy port, two runs at once, kill -9 of a script."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typing_by_hand import SMALL_SPEC, command, environment, run_millrace, states_of, write_table

TORCH_SPEC = """project: cancer
data: {source: cancer.csv, label: target, ignore: [patient]}
train: {model: "model.py:build", epochs: 3, optimizer: {lr: 1e-3}, checkpoint_every_steps: 1}
limits: {memory: 3GB, wall_time: 60s}
"""
NET = """import time
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.layer = nn.Linear(features, classes)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 4:
            BREAK
        return self.layer(x)
def build(ctx):
    return Net(ctx.features, ctx.classes)
"""


@pytest.mark.slow
@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("broken", "overrides", "text"),
    [
        ("raise KeyError('my own mistake')", (), "model.py:12 in forward: KeyError"),
        ("return self.layer(x) * float('nan')", (), "NaN"),
        ("keep = [bytearray(200_000_000) for _ in range(40)]", ("limits.memory=1GB",), "its limit is 1GB"),
        ("time.sleep(600)", ("limits.wall_time=8s",), "longer than its limit of 8"),
        ("return self.layer(x)[:, :1]", (), "got [32, 1]"),
        ("import os; os.kill(os.getpid(), 11)", (), "SIGSEGV"),
    ],
)
def test_a_broken_model_fails_with_its_cause_and_keeps_its_checkpoint(
    tmp_path: Path, broken: str, overrides: tuple[str, ...], text: str
) -> None:
    write_table(tmp_path / "cancer.csv")
    (tmp_path / "millrace.yaml").write_text(TORCH_SPEC.replace("epochs: 3", "epochs: 3, batch_size: 32"))
    (tmp_path / "model.py").write_text(NET.replace("BREAK", broken))
    sets = [part for override in overrides for part in ("--set", override)]
    done = run_millrace(tmp_path, "run", *sets, code=5)
    assert text in done.stderr
    assert "log:" in done.stderr
    steps = tmp_path / ".millrace" / "scratch" / "steps"
    assert list(steps.rglob("*.safetensors")), "the last checkpoint is kept"
    assert states_of(tmp_path)["train"] == "failed"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process: subprocess.Popen[str], step: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("step") == step and event.get("state") == "running":
            return


@pytest.mark.rotating(1, "ends of runs")
def test_ctrl_c_cancels_and_a_new_run_continues(small: Path) -> None:
    for number, step, data in ((signal.SIGINT, "train", "succeeded"), (signal.SIGTERM, "evaluate", "cached")):
        process = start(small, "run", "--json")
        wait_for_step(process, step)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == 130
        view = json.loads(run_millrace(small, "runs", "show", "last", "--json").stdout)
        assert view["run"]["state"] == "cancelled"
        states = {one["name"]: one["state"] for one in view["steps"]}
        assert states["data"] == data
        assert "running" not in states.values()
    run_millrace(small, "run")
    states = states_of(small)
    assert [states[step] for step in ("data", "train", "export", "monitor")] == ["cached"] * 3 + ["succeeded"]


@pytest.mark.rotating(1, "ends of runs")
def test_a_reader_that_leaves_cancels_and_a_new_run_continues(small: Path) -> None:
    """`millrace run | head -1` ends."""
    process = start(small, "run")
    assert process.stdout is not None
    while not process.stdout.readline().startswith(" data "):
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(60) == 0
    (run,) = json.loads(run_millrace(small, "runs", "--json").stdout)
    assert run["state"] == "cancelled"
    run_millrace(small, "run")
    assert states_of(small)["data"] == "cached"


@pytest.mark.rotating(1, "ends of runs")
def test_another_terminal_cancels(small: Path) -> None:
    process = start(small, "run", "--json")
    wait_for_step(process, "train")
    run_millrace(small, "runs", "cancel", "last")
    process.communicate(timeout=30)
    assert process.returncode in (0, 130)


@pytest.mark.rotating(1, "ends of runs")
def test_detached_runs_go_on_without_this_terminal(small: Path) -> None:
    run_millrace(small, "run", "--detach")
    deadline = time.monotonic() + 60
    while json.loads(run_millrace(small, "runs", "--json").stdout)[0]["state"] in ("pending", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert set(states_of(small).values()) == {"succeeded"}


@pytest.mark.rotating(1, "ends of runs")
def test_two_specs_at_once_on_one_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    processes = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write_table(folder / "cancer.csv")
        (folder / "millrace.yaml").write_text(SMALL_SPEC.replace("project: cancer", f"project: {name}"))
        processes.append(start(folder, "--home", str(home), "run"))
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    models = json.loads(run_millrace(tmp_path, "--home", str(home), "models", "--json").stdout)
    assert sorted(model["name"] for model in models) == ["one", "two"]


@pytest.mark.root
@pytest.mark.rotating(1, "ends of runs")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_said_and_survived(small: Path, undisturbed_digest: str) -> None:
    home = small / "disk"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", home], check=False)
    if mounted.returncode != 0:
        pytest.skip("cannot mount here")
    try:
        done = run_millrace(small, "--home", str(home), "run", code=None)
        assert done.returncode == 9, done.stdout + done.stderr
        assert "disk" in done.stderr
        assert "space" in done.stderr
        assert not [path for path in home.rglob("*") if path.name.endswith((".part", ".tmp"))]
        subprocess.run(["mount", "-o", "remount,size=200m", "none", home], check=True)
        run_millrace(small, "--home", str(home), "run")
        with_space = json.loads(run_millrace(small, "--home", str(home), "models", "--json").stdout)[0]["digest"]
    finally:
        subprocess.run(["umount", "-l", home], check=True)
    assert with_space == undisturbed_digest


def test_a_busy_port_names_its_holder(finished: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = run_millrace(finished, "serve", "cancer", "--port", str(port), code=10)
    assert str(port) in done.stderr
    assert str(os.getpid()) in done.stderr


SCRIPT = """import os, sys, time
import millrace
with millrace.track("script", params={"lr": 0.1}) as tracker:
    for step in range(4000):
        tracker.log_metric("loss", 1.0 / (step + 1), step)
        if step == 2000 and sys.argv[1] == "kill":
            time.sleep(1.2)
            for more in range(2001, 2100):
                tracker.log_metric("loss", 0.0, more)
            os.kill(os.getpid(), 9)
    open("weights.bin", "wb").write(b"w")
    tracker.log_artifact("weights.bin")
"""


@pytest.mark.rotating(1)
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_points_of_a_script_survive(tmp_path: Path, end: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py", end], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == (0 if end == "exit" else -9)
    run = json.loads(run_millrace(tmp_path, "runs", "--json").stdout)[0]
    view = json.loads(run_millrace(tmp_path, "runs", "show", run["id"], "--json").stdout)
    assert view["values"]["params"] == {"lr": "0.1"}
    code = "import millrace, sys; print(len(millrace.connect().runs()[0].metrics('loss')))"
    counted = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True
    )
    points = int(counted.stdout)
    if end == "exit":
        assert points == 4000
        assert run["state"] == "succeeded"
    else:
        assert points >= 2000, "what is older than a second is not lost"
