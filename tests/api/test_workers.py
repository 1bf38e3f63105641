"""Workers of other machines: hosts that reach the server over HTTPS and nothing else of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import millrace
from millrace.core.types import WorkFrame, WorkItem
from millrace.store.records_sql import open_records
from millrace.testing.namespaces import Hosts, can_make
from millrace.testing.server import RunningServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.xdist_group("namespaces"),
    pytest.mark.skipif(not can_make(), reason="network namespaces need root and iproute2"),
]
SPEC = """project: own
steps:
  - {name: first, uses: "own.py:first"}
  - {name: second, uses: "own.py:second", needs: [first]}
"""
OWN = """import json, os, pathlib, time
def first(ctx):
    print("first on", os.environ.get("WORKER", "the server"), flush=True)
    ctx.log_metric("loss", 0.5, 1)
    file = ctx.scratch / "numbers.txt"
    file.write_text("one two three")
    ctx.output("numbers", file)
    return {"on": os.environ.get("WORKER", "the server"), "token": os.environ.get("MILLRACE_TOKEN", "")}
def second(ctx):
    started = pathlib.Path(os.environ["MARKS"]) / f"{os.environ['WORKER']}-{time.time_ns()}"
    started.write_text(str(os.getpid()))
    print("second begins", flush=True)
    until = time.monotonic() + float(os.environ["HOLD_S"])
    while time.monotonic() < until and not ctx.cancelled:
        time.sleep(0.05)
    words = ctx.input("first.numbers").read_text().split()
    access = json.loads((pathlib.Path(os.environ["MILLRACE_HOME"]) / "access.json").read_text())
    (pathlib.Path(os.environ["MARKS"]) / "token").write_text(json.dumps(access))
    return {"on": os.environ["WORKER"], "words": len(words)}
"""


def until(check: Callable[[], object], what: str, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Site:
    """Host 1 serves, hosts 2 and 3 work, host 4 is a person's."""

    def __init__(self, folder: Path, hosts: Hosts, silence_s: int) -> None:
        self.folder, self.hosts, self.hold_s, self.silence_s = folder, hosts, 0.0, silence_s
        self.marks = folder / "marks"
        self.work = folder / "work"
        for made in (self.marks, self.work):
            made.mkdir()
        (self.work / "millrace.yaml").write_text(SPEC)
        (self.work / "own.py").write_text(OWN)
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        authority.issue_cert(hosts.address(1)).private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
        self.server = self.new_server()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.token = ""

    def new_server(self, port: str = "0") -> RunningServer:
        return RunningServer(
            self.folder / "home",
            prefix=self.hosts.prefix(1),
            environment={
                "MILLRACE_COMPUTE": "workers",
                "MILLRACE_HEARTBEAT_TIMEOUT_S": str(self.silence_s),
                "MILLRACE_URL": "",
            },
            arguments=("--host", self.hosts.address(1), "--tls-cert", str(self.folder / "server.pem"), "--port", port),
        )

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "MILLRACE_URL": self.server.url, "MILLRACE_CA_FILE": str(self.ca), **more}

    def start(self) -> Site:
        self.server.start()
        lines = self.server.log.read_text().splitlines()
        self.token = next(line.split()[1] for line in lines if " owner " in line)
        return self

    def type(self, *arguments: str, token: str | None = None, code: int = 0) -> str:
        """A command on the person's host."""
        done = subprocess.run(
            [*self.hosts.prefix(4), sys.executable, "-m", "millrace", *arguments], cwd=self.work, capture_output=True,
            env=self.environment(MILLRACE_TOKEN=self.token if token is None else token), text=True, timeout=90,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def ask(self, *arguments: str) -> Any:
        return json.loads(self.type(*arguments, "--json"))

    def worker_token(self, name: str) -> Path:
        path = self.folder / f"{name}.token"
        path.write_text(self.ask("tokens", "create", name)["secret"])
        return path

    def start_worker(self, number: int) -> subprocess.Popen[bytes]:
        name = f"host{number}"
        token = self.folder / f"{name}.token"
        if not token.exists():
            self.worker_token(name)
        log = (self.folder / f"{name}.log").open("ab")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        environment |= {"WORKER": name, "MARKS": str(self.marks), "HOLD_S": str(self.hold_s)}
        worker = subprocess.Popen(
            [*self.hosts.prefix(number), sys.executable, "-m", "millrace", "worker", self.server.url, "--token-file",
             str(token), "--ca-file", str(self.ca), "--folder", str(self.folder / name), "--name", name],
            env=environment, stdout=log, stderr=log, cwd=self.folder,
        )  # fmt: skip
        log.close()
        self.workers.append(worker)
        return worker

    def submit(self) -> str:
        self.type("run", "--detach")
        return self.ask("runs")[0]["id"]

    def begun(self) -> list[str]:
        """Who began the second step, in order."""
        return [
            mark.name.split("-")[0] for mark in sorted(self.marks.glob("host*"), key=lambda one: one.stat().st_mtime)
        ]

    def events(self) -> list[dict[str, Any]]:
        program = (
            "import json, sys; from millrace.wiring import open_far; url, token, ca = sys.argv[1:]; "
            "events = open_far(url, token, ca).call('event.list', {'limit': 1000}); "
            "print(json.dumps([{'verb': one.verb, 'detail': one.detail} for one in events]))"
        )
        done = subprocess.run(
            [*self.hosts.prefix(4), sys.executable, "-c", program, self.server.url, self.token, str(self.ca)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    def steps(self, run: str) -> dict[str, Any]:
        return {step["name"]: step for step in self.ask("runs", "show", run)["steps"]}

    def ended(self, run: str) -> str:
        state = self.ask("runs", "show", run)["run"]["state"]
        return state if state in ("succeeded", "failed", "cancelled") else ""

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            worker.wait(30)
        self.server.stop()


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Its parameter: after how many seconds a silent worker is given up."""
    with Hosts(4) as hosts:
        made = Site(tmp_path, hosts, getattr(request, "param", 3))
        try:
            yield made.start()
        finally:
            made.close()


def test_a_run_is_done_by_a_worker_that_has_only_a_token_of_its_work(site: Site) -> None:
    site.start_worker(2)
    site.type("run")
    run = site.ask("runs")[0]["id"]
    steps = site.steps(run)
    assert {name: step["facts"]["on"] for name, step in steps.items()} == {"first": "host2", "second": "host2"}
    assert steps["first"]["facts"]["token"] == "", "the worker's own token is not in the environment of steps"
    assert "first on host2" in site.type("logs", run, "--step", "first")
    assert site.ask("runs", "show", run)["values"]["metrics"]["loss"][3] == 0.5


def ask_as(site: Site, number: int, token: str, calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What a host's program gets for operations with a token: `ok` or an error's code."""
    program = (
        "import json, sys\n"
        "from millrace.core.errors import MillraceError\n"
        "from millrace.wiring import open_far\n"
        "url, token, ca, calls = sys.argv[1:]\n"
        "server, said = open_far(url, token, ca), []\n"
        "for name, body in json.loads(calls):\n"
        "    try:\n"
        "        server.download(body['digest'], __import__('pathlib').Path('got')) if name == 'blob.get' "
        "else server.call(name, body)\n"
        "        said.append('ok')\n"
        "    except MillraceError as error:\n"
        "        said.append(error.code)\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run(
        [*site.hosts.prefix(number), sys.executable, "-c", program, site.server.url, token, str(site.ca),
         json.dumps(calls)],
        capture_output=True, text=True, check=True, cwd=site.folder,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_tokens_open_what_their_scope_allows_and_nothing_else(site: Site) -> None:
    (site.work / "rows.txt").write_text("a secret of another run")
    site.hold_s = 6.0
    site.start_worker(2)
    run = site.submit()
    until(lambda: (site.marks / "token").exists() or site.begun(), "the second step begins")
    access = next(site.folder.glob("host2/works/*/access.json"))
    assert access.stat().st_mode & 0o077 == 0
    token = json.loads(access.read_text())["token"]
    numbers = site.steps(run)["first"]["outputs"]["numbers"]["digest"]
    version = millrace.__version__
    foreign = json.loads(site.type("models", "--json"))
    assert foreign == []
    work_id = access.parent.name.split("-")[0]
    calls = [
        ("blob.get", {"digest": numbers}),
        ("work.report", {"work": work_id, "attempt": 1, "first": 0, "frames": []}),
        ("work.report", {"work": "0" * 32, "attempt": 1}),
        ("blob.get", {"digest": "sha256:" + "0" * 64}),
        ("work.claim", {"worker": "x", "version": version}),
        ("run.list", {}),
        ("token.create", {"name": "more", "scope": "owner"}),
        ("token.list", {}),
        ("event.list", {}),
    ]
    assert ask_as(site, 2, token, calls) == ["ok", "ok", *["auth.denied"] * 7]
    worker = (site.folder / "host2.token").read_text()
    others = [("work.claim", {"worker": "x", "version": version}), ("work.claim", {"worker": "x", "version": "0"}),
              ("run.list", {}), ("blob.get", {"digest": numbers}), ("token.create", {"name": "m", "scope": "owner"})]  # fmt: skip
    assert ask_as(site, 2, worker, others) == ["ok", "input.invalid", *["auth.denied"] * 3]
    until(lambda: site.ended(run), "the run ends")
    assert site.ended(run) == "succeeded"
    assert ask_as(site, 2, token, calls[:2]) == ["auth.required"] * 2, "a work's token ends with it"
    for wrong in ("", "mr_unknown"):
        assert ask_as(site, 2, wrong, [("run.list", {})]) == ["auth.required"]
    site.type("tokens", "revoke", "host2")
    assert ask_as(site, 2, worker, others[:1]) == ["auth.required"]
    until(lambda: site.workers[0].poll() is not None, "a worker whose token is revoked ends")
    assert "is revoked" in (site.folder / "host2.log").read_text()
    assert "auth.required" in site.type("runs", "--json", token=worker, code=6)
    verbs = [event["verb"] for event in site.events() if event["detail"].get("outcome") == "auth.denied"]
    assert {"work.report", "run.list", "token.create"} <= set(verbs), "denied attempts are events"


def test_a_worker_that_is_killed_loses_its_step_to_the_next(site: Site) -> None:
    site.hold_s = 2.0
    first = site.start_worker(2)
    run = site.submit()
    until(lambda: site.begun() == ["host2"], "the second step begins")
    first.kill()
    first.wait()
    site.start_worker(3)
    until(lambda: site.ended(run), "the run ends")
    assert site.ended(run) == "succeeded"
    assert site.begun() == ["host2", "host3"]
    assert site.steps(run)["second"]["facts"] == {"on": "host3", "words": 3}
    assert "was not heard for 3 s" in site.type("logs", run, "--step", "second")


def test_a_worker_that_is_stopped_gives_its_step_back_at_once(site: Site) -> None:
    site.hold_s = 2.0
    first = site.start_worker(2)
    run = site.submit()
    until(lambda: site.begun() == ["host2"], "the second step begins")
    first.send_signal(signal.SIGTERM)
    site.start_worker(3)
    assert first.wait(20) == 0
    until(lambda: site.ended(run), "the run ends")
    assert site.ended(run) == "succeeded"
    assert site.steps(run)["second"]["facts"]["on"] == "host3"
    assert "was stopped" in site.type("logs", run, "--step", "second")


def test_a_worker_behind_a_cut_is_replaced_and_its_late_reports_count_no_more(site: Site) -> None:
    site.hold_s = 5.0
    site.start_worker(2)
    run = site.submit()
    until(lambda: site.begun() == ["host2"], "the second step begins")
    site.hosts.cut(2)
    site.start_worker(3)
    until(lambda: site.begun() == ["host2", "host3"], "another one takes the step")
    site.hosts.mend(2)
    until(lambda: site.ended(run), "the run ends")
    assert site.ended(run) == "succeeded"
    assert site.steps(run)["second"]["facts"]["on"] == "host3"
    until(lambda: "second: lost" in (text := (site.folder / "host2.log").read_text()) or "given up" in text, "it knows")
    assert site.workers[0].poll() is None, "it goes on asking"


@pytest.mark.parametrize("site", [30], indirect=True)  # a busy machine may take long to start a server
def test_a_server_that_is_killed_comes_back_to_the_same_worker(site: Site) -> None:
    site.hold_s = 3.0
    site.start_worker(2)
    run = site.submit()
    until(lambda: site.begun() == ["host2"], "the second step begins")
    port = site.server.url.rpartition(":")[2]
    children = list(site.server.children().values())
    site.server.kill()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    site.server = site.new_server(port).start()
    until(lambda: site.ended(run), "the run ends")
    assert site.ended(run) == "succeeded"
    assert site.begun() == ["host2"], "once"


def test_a_cancelled_run_ends_its_works(site: Site) -> None:
    site.hold_s = 60.0
    site.start_worker(2)
    run = site.submit()
    until(lambda: site.begun() == ["host2"], "the second step begins")
    pid = int(next(site.marks.glob("host2-*")).read_text())
    site.type("runs", "cancel", run)
    until(lambda: site.ended(run) == "cancelled", "the run ends")
    until(lambda: not Path(f"/proc/{pid}").exists(), "the step's process ends")
    records = open_records(site.folder / "home" / "records.db")
    try:
        assert (records.find(WorkItem), records.find(WorkFrame)) == ([], [])
    finally:
        records.close()
