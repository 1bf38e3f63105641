"""A step that looks around: which secrets and which files of others it finds, and what the documents say of the rest.

Where each comes from: CVE-2023-48022 of Ray (whoever may send jobs has the machine), CWE-732 and CWE-379 (folders that
others may read), CWE-526 and CWE-214 (secrets in environments and arguments), CWE-200. Code runs as whoever starts it:
what is not kept from it stands in `SECURITY.md`, and is not claimed here.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.control.dispatch import Dispatcher
from millrace.core.types import Step
from millrace.wiring import open_dispatcher

CANARY = "kanarienvogel-4711-im-bergwerk"
STEPS = '''
import os, subprocess, sys, time
from pathlib import Path

def keeper(ctx):
    """Holds its secret while the other one looks."""
    value = ctx.secret("TOKEN")
    (ctx.scratch / "notes").write_text("scratch of the keeper")
    (ctx.project_dir / "holds").touch()
    deadline = time.monotonic() + 30
    while not (ctx.project_dir / "looked").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"length": len(value)}

def thief(ctx):
    """Names no secret, and looks for one wherever a process can look without attacking the system."""
    deadline = time.monotonic() + 30
    while not (ctx.project_dir / "holds").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    home, mark, found = Path(os.environ["MILLRACE_HOME"]), b"kanarienvogel" + b"-4711", []
    if mark in repr(dict(os.environ)).encode() or mark in repr(sys.argv).encode():
        found.append("my own environment")
    for name in ("environ", "cmdline"):
        for path in Path("/proc").glob(f"[0-9]*/{name}"):
            try:
                if mark in path.read_bytes():
                    found.append(str(path))
            except OSError:
                pass
    for path in [*home.rglob("*"), *Path("/tmp").glob("millrace*")]:
        try:
            if path.is_file() and mark in path.read_bytes():
                found.append(str(path))
        except OSError:
            pass
    child = subprocess.run([sys.executable, "-c", "import os; print(dict(os.environ))"], capture_output=True)
    if mark in child.stdout:
        found.append("a child's environment")
    try:
        refused = ctx.secret("TOKEN")
    except Exception as error:
        refused = str(error)
    (ctx.project_dir / "looked").touch()
    return {"found": found, "refused": refused, "scratch": str(ctx.scratch), "held": (ctx.project_dir / "holds").exists()}

def breaker(ctx):
    """Tries to get at the home's keys, at the scratch of the keeper and at processes of others."""
    deadline = time.monotonic() + 30
    while not (ctx.project_dir / "holds").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    home = Path(os.environ["MILLRACE_HOME"])
    steps = ctx.scratch.parents[1]
    got = {
        "keys": _read(home / "keys" / "kek.json"), "scratch": sorted(map(str, steps.rglob("notes"))),
        "steps": len(list(steps.iterdir())), "uploads": sorted(map(str, (home / "projects").glob("*/*"))),
        "driver": _read(Path(f"/proc/{DRIVER}/environ")), "root": _read(Path(f"/proc/{DRIVER}/root") / str(home / "keys/kek.json")[1:]),
    }
    is_isolated = os.readlink("/proc/self/ns/user") != "OUTSIDE"
    for name, command in {}.items() if not is_isolated else {  # as root and not isolated, these would do harm
        "umount": f"umount {home}/keys; cat {home}/keys/kek.json",
        "nested": f"unshare --user --mount sh -c 'umount -l {home}/keys {steps}; cat {home}/keys/kek.json; find {steps} -name notes'",
        "as root": f"unshare --user --map-root-user --mount sh -c 'umount -l {home}/keys {steps}; cat {home}/keys/kek.json'",
        "mount": f"mount -t tmpfs none {ctx.scratch}; mount --move {home}/keys {ctx.scratch}; cat {ctx.scratch}/kek.json",
        "enter": f"nsenter -t {DRIVER} -m cat {home}/keys/kek.json",
    }.items():
        got[name] = subprocess.run(command, shell=True, capture_output=True).stdout.decode("utf-8", "replace")
    (ctx.project_dir / "looked").touch()
    (ctx.scratch / "result").write_text("mine")
    ctx.output("result", ctx.scratch / "result")
    return {"got": got, "held": (ctx.project_dir / "holds").exists(), "user": os.getuid()}

def _read(path):
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""

def again(ctx):
    """A later step of another run."""
    home = Path(os.environ["MILLRACE_HOME"])
    return {"left": sorted(str(path) for path in (home / "scratch").rglob("notes")), "mine": sorted(map(str, ctx.scratch.iterdir()))}
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    (tmp_path / "steps.py").write_text(STEPS)
    before = os.umask(0o022)
    monkeypatch.setenv("MILLRACE_PARALLEL_STEPS", "2")
    opened = open_dispatcher(str(tmp_path / ".millrace"))
    opened.call("secret.set", {"name": "TOKEN", "value": CANARY, "in_project": "p"})
    yield opened
    opened.close()
    os.umask(before)


def run(home: Dispatcher, folder: Path, *steps: str) -> dict[str, Step]:
    (folder / "millrace.yaml").write_text("project: p\nsteps:\n" + "".join(f"  - {step}\n" for step in steps))
    submitted = home.call("run.submit", {"spec_path": str(folder / "millrace.yaml")})
    for _ in home.stream("run.drive", {"run": submitted.run.id}):
        pass
    return {step.name: step for step in home.services.records.find(Step, {"run_id": submitted.run.id})}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


KEEPER, THIEF = '{name: keeper, uses: "steps.py:keeper", secrets: [TOKEN]}', '{name: thief, uses: "steps.py:thief"}'


def test_a_step_that_names_no_secret_finds_it_nowhere(home: Dispatcher, tmp_path: Path) -> None:
    """Beside a step that holds it at that moment: not in files, environments or arguments of any process."""
    modes: dict[str, int] = {}

    def look() -> None:
        while not (tmp_path / "holds").exists():
            if ended.wait(0.01):
                return
        modes.update({str(path.parent): mode(path.parent.parent) for path in (tmp_path / ".millrace").rglob("notes")})

    ended = threading.Event()
    looking = threading.Thread(target=look)
    looking.start()
    steps = run(home, tmp_path, KEEPER, THIEF)
    ended.set()
    looking.join()
    assert {name: step.state for name, step in steps.items()} == {"keeper": "succeeded", "thief": "succeeded"}
    facts = steps["thief"].facts
    assert facts["held"], "it looked while the other one had it"
    assert facts["found"] == []
    assert "has no secret 'TOKEN'" in facts["refused"]
    assert steps["keeper"].facts == {"length": len(CANARY)}
    assert set(modes.values()) == {0o700}, "another account cannot look into the scratch of a step"


def test_nothing_of_a_step_is_left_for_the_next(home: Dispatcher, tmp_path: Path) -> None:
    (tmp_path / "looked").touch()
    run(home, tmp_path, KEEPER)
    facts = run(home, tmp_path, '{name: again, uses: "steps.py:again"}')["again"].facts
    assert facts == {"left": [], "mine": []}


def test_an_isolated_step_has_no_way_to_keys_scratch_and_processes(
    home: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor back to them by unmounting, by another namespace, or through a process outside."""
    (tmp_path / "steps.py").write_text(
        STEPS.replace("DRIVER", str(os.getpid())).replace("OUTSIDE", os.readlink("/proc/self/ns/user"))
    )
    (tmp_path / ".millrace" / "projects" / "other").mkdir(parents=True)
    (tmp_path / ".millrace" / "projects" / "other" / "rows.csv").write_text("a")
    key = (tmp_path / ".millrace" / "keys" / "kek.json").read_text()
    monkeypatch.setenv("MILLRACE_ISOLATE_STEPS", "on")
    steps = run(home, tmp_path, KEEPER, '{name: breaker, uses: "steps.py:breaker"}')
    assert {name: step.state for name, step in steps.items()} == {"keeper": "succeeded", "breaker": "succeeded"}
    log = Path(steps["breaker"].log_path).read_text()
    if "not isolated: " in log:
        pytest.skip("the system lets this user make no namespaces; the log of the step says so")
    assert "isolated: the home's keys" in log
    facts = steps["breaker"].facts
    assert facts["held"], "it looked while the other one was there"
    assert facts["user"] == os.getuid()
    got = facts["got"]
    assert got.pop("steps") == 1
    assert {name: value for name, value in got.items() if value not in ("", [])} == {}
    assert key, "and there is something to find"
    assert home.services.blobs.exists(steps["breaker"].outputs["result"].digest)
    deadline, left = time.monotonic() + 20, tmp_path / ".millrace" / "scratch" / "steps"
    while list(left.iterdir()):  # its process is seen off after its result
        assert time.monotonic() < deadline, list(left.rglob("*"))
        time.sleep(0.02)


def test_what_is_not_isolated_is_found(home: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without isolation it does find them: so the test above can see a difference, and the documents are true."""
    (tmp_path / "steps.py").write_text(
        STEPS.replace("DRIVER", str(os.getpid())).replace("OUTSIDE", os.readlink("/proc/self/ns/user"))
    )
    monkeypatch.setenv("MILLRACE_ISOLATE_STEPS", "off")
    facts = run(home, tmp_path, KEEPER, '{name: breaker, uses: "steps.py:breaker"}')["breaker"].facts
    assert facts["held"]
    assert facts["got"]["keys"]
    assert facts["got"]["scratch"]


def test_another_account_of_the_machine_may_not_look_into_a_home(home: Dispatcher, tmp_path: Path) -> None:
    """Whatever the umask is: records, logs, scratch and keys lie below."""
    run(home, tmp_path, '{name: again, uses: "steps.py:again"}')
    folder = tmp_path / ".millrace"
    assert mode(folder) == 0o700
    keys = [path for path in (folder / "keys").rglob("*") if path.is_file()]
    assert mode(folder / "keys") == 0o700
    assert keys
    assert {mode(path) & 0o077 for path in keys} == {0}


def test_the_documents_say_what_is_not_isolated() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    section = re.search(r"## What is not isolated\n(.*?)(\n## |\Z)", text, re.S)
    assert section
    for words in ("rights of whoever starts it", "`keys/`", "other runs' files", "workers"):
        assert words in section[1], words
