"""Canaries: a secret that a step prints, raises, returns, logs and passes on is found nowhere afterwards.

Looked at: every file of the project and the home (records and their log, reports, step logs, notes), what people are
shown, and the arguments and environments of every process while the step runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import millrace
from millrace.compute.agent import Agent
from millrace.compute.local import LocalCompute
from millrace.control.dispatch import Dispatcher
from millrace.core.types import ModelVersion, Step
from millrace.wiring import open_dispatcher

CANARY = 'kanarienvogel+/9f3b "q" ü'
STEPS = """
import base64, ctypes, json, os, resource, subprocess, sys, time, urllib.parse
from pathlib import Path

def tell(ctx):
    value = ctx.secret("TOKEN")
    print("printed", value, repr(value), json.dumps(value), base64.b64encode(value.encode()).decode())
    print(urllib.parse.quote(value), file=sys.stderr)
    os.write(1, b"in two parts " + value.encode()[:7]); time.sleep(0.05); os.write(1, value.encode()[7:] + b"\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('by a child', sys.stdin.read())"], input=value, text=True)
    ctx.log_metric("loss " + value, 1.0)
    ctx.progress(1, 1, "at " + value)
    return {
        "fact": value, value: [{"deep": "x" + value}],
        "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "in_environ": value in os.environ.values(),
    }

def fail(ctx):
    value = ctx.secret("TOKEN")
    try:
        raise KeyError(value)
    except KeyError as error:
        raise RuntimeError("cannot log in with " + value) from error

def crash(ctx):
    print("before the end", ctx.secret("TOKEN"), flush=True)
    ctypes.string_at(0)

def wait(ctx):
    value = ctx.secret("TOKEN")
    Path(ctx.project_dir / "waiting").touch()
    while not (ctx.project_dir / "seen").exists():
        time.sleep(0.02)
    return {"length": len(value)}

def nosy(ctx):
    return {"names": sorted(name for name in os.environ if "TOKEN" in name), "got": _try(ctx)}

def _try(ctx):
    try:
        return ctx.secret("TOKEN")
    except Exception as error:
        return str(error)
"""
SCRIPT = """
set -eu
echo "script $TOKEN" ; echo "length ${#TOKEN}" ; touch waiting-script
while [ ! -e seen ]; do sleep 0.02; done
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "script.sh").write_text(SCRIPT)
    opened = open_dispatcher(str(tmp_path / ".millrace"))
    opened.call("secret.set", {"name": "TOKEN", "value": CANARY, "in_project": "p"})
    yield opened
    opened.close()


def run(home: Dispatcher, folder: Path, *steps: str) -> tuple[list[str], dict[str, Step]]:
    """What people were shown, and the steps."""
    (folder / "millrace.yaml").write_text("project: p\nsteps:\n" + "".join(f"  - {step}\n" for step in steps))
    submitted = home.call("run.submit", {"spec_path": str(folder / "millrace.yaml")})
    shown = [repr(event) for event in home.stream("run.drive", {"run": submitted.run.id})]
    shown.append(repr(home.call("run.get", {"run": submitted.run.id})))
    return shown, {step.name: step for step in home.services.records.find(Step, {"run_id": submitted.run.id})}


def forms() -> list[bytes]:
    """The canary and enough of it to know it again."""
    return [CANARY.encode(), b"kanarienvogel"]


def files_with_canary(folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(form in path.read_bytes() for form in forms()):
            found.append(path)
    return found


def step(name: str, *, secrets: str = "[TOKEN]", uses: str | None = None) -> str:
    return f'{{name: {name}, uses: "{uses or f"steps.py:{name}"}", secrets: {secrets}}}'


def test_nothing_that_is_kept_or_shown_has_the_canary(home: Dispatcher, tmp_path: Path) -> None:
    shown, steps = run(home, tmp_path, step("tell"), step("nosy", secrets="[]"))
    assert steps["tell"].state == "succeeded"
    facts = steps["tell"].facts
    assert (facts["fact"], facts["***"], facts["in_environ"]) == ("***", [{"deep": "x***"}], False)
    assert (facts["dumpable"] if sys.platform == "linux" else 0, facts["core"]) == (0, 0)
    assert steps["nosy"].facts["names"] == []
    assert "has no secret 'TOKEN'" in steps["nosy"].facts["got"]
    failed_shown, failed = run(home, tmp_path, step("fail"))
    assert failed["fail"].state == "failed"
    assert "cannot log in with ***" in str(failed["fail"].error)
    text = "".join([*shown, *failed_shown])
    assert "at ***" in text
    assert not [form for form in forms() if form.decode() in text]
    log = Path(steps["tell"].log_path).read_text()
    assert "printed ***" in log
    assert "in two parts ***" in log
    assert "by a child ***" in log
    home.services.records.seal()
    home.close()
    assert files_with_canary(tmp_path) == []
    assert list((tmp_path / ".millrace").rglob("report.html")) or (tmp_path / "report.html").is_file()


def test_a_step_that_crashes_leaves_its_log_and_its_place(home: Dispatcher, tmp_path: Path) -> None:
    _, steps = run(home, tmp_path, step("crash"))
    assert steps["crash"].state == "failed"
    assert "SIGSEGV" in str(steps["crash"].error)
    assert "steps.py" in str(steps["crash"].error)
    deadline = time.monotonic() + 5
    while "before the end ***" not in Path(steps["crash"].log_path).read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "before the end ***" in Path(steps["crash"].log_path).read_text()
    assert files_with_canary(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_other_process_shows_it(home: Dispatcher, tmp_path: Path) -> None:
    """Only the script's own process, and what it starts, has it in its environment; no argument anywhere does."""
    seen: dict[str, list[str]] = {}

    def look() -> None:
        while not ((tmp_path / "waiting").exists() and (tmp_path / "waiting-script").exists()):
            time.sleep(0.02)
        seen["ps"] = [line for line in _ps() if "kanarienvogel" in line]
        seen["environ"] = list(_with_canary("environ"))
        seen["cmdline"] = list(_with_canary("cmdline"))
        (tmp_path / "seen").touch()

    looking = threading.Thread(target=look)
    looking.start()
    _, steps = run(home, tmp_path, step("wait"), step("script", uses="script.sh"))
    looking.join()
    assert {name: one.state for name, one in steps.items()} == {"wait": "succeeded", "script": "succeeded"}
    assert (seen["ps"], seen["cmdline"]) == ([], [])
    assert seen["environ"]
    assert set(seen["environ"]) <= {"bash", "sleep"}
    assert f"length {len(CANARY)}" in Path(steps["script"].log_path).read_text()


def test_a_whole_run_and_its_migration_over_encrypted_blobs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage reads and writes through the keyring; below there is ciphertext alone, also after a move."""
    monkeypatch.setenv("KEK", "5a" * 32)
    monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", "env:KEK")
    opened = open_dispatcher(str(small / ".millrace"))
    submitted = opened.call("run.submit", {"spec_path": str(small / "millrace.yaml")})
    events = list(opened.stream("run.drive", {"run": submitted.run.id}))
    assert events[-1].state == "succeeded", events[-1].error
    assert opened.call("model.open", {"model": opened.call("model.list", {})[0].name}).folder
    assert opened.call("system.gc", {}).blobs == 0
    below = [one for one in (small / ".millrace/blobs/sha256").rglob("*") if one.is_file()]
    assert len(below) > 10
    assert {one.read_bytes()[:3] for one in below} == {b"MRE"}
    target = f"file://{small}/elsewhere"
    assert opened.call("system.migrate", {"blobs_to": target}).blobs == len(below)
    moved = [one for one in (small / "elsewhere/sha256").rglob("*") if one.is_file()]
    assert {one.read_bytes()[:3] for one in moved} == {b"MRE"}
    bundle = opened.services.records.find(ModelVersion)[0].bundle
    opened.close()
    monkeypatch.setenv("MILLRACE_BLOBS_URL", target)
    again = open_dispatcher(str(small / ".millrace"))
    assert again.services.blobs.tree(bundle.digest)
    again.close()


class Far:
    """The server as a worker of another machine has it: calls, and nothing to close."""

    def __init__(self, home: Dispatcher) -> None:
        self.call, self.stream = home.call, home.stream

    def close(self) -> None:
        """Nothing."""


def test_a_worker_elsewhere_sends_nothing_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prints, metrics, facts and errors travel through the records: they are hidden before they leave it."""
    monkeypatch.setenv("MILLRACE_COMPUTE", "workers")
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    (project / "steps.py").write_text(STEPS)
    home = open_dispatcher(str(project / ".millrace"))
    home.call("secret.set", {"name": "TOKEN", "value": CANARY, "in_project": "p"})
    local = LocalCompute(elsewhere, entry="millrace.wiring:execute")
    agent = Agent(
        Far(home), lambda order, place: (Far(home), home.services.blobs), local, folder=elsewhere, name="far",
        version=millrace.__version__,
    )  # fmt: skip
    said: list[str] = []
    working = threading.Thread(target=agent.run, args=(said.append,))
    working.start()
    try:
        shown, steps = run(home, project, step("tell"), step("fail"))
    finally:
        agent.stop()
        working.join()
        local.close()
    assert steps["tell"].facts["fact"] == "***"
    assert "printed ***" in Path(steps["tell"].log_path).read_text()
    assert "cannot log in with ***" in "".join(shown)
    home.close()
    assert not [form for form in forms() if form.decode() in "".join([*shown, *said])]
    assert files_with_canary(tmp_path) == []


def _ps() -> list[str]:
    if not _has_ps():
        return []
    return subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout.splitlines()


def _has_ps() -> bool:
    return any(os.access(f"{folder}/ps", os.X_OK) for folder in os.environ.get("PATH", "").split(os.pathsep))


def _with_canary(name: str) -> Iterator[str]:
    """Names of processes whose file has it; whoever may not be read shows nothing either."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if CANARY.encode() in (folder / name).read_bytes():
                    yield (folder / "comm").read_text().strip()
            except OSError:
                continue
