"""Rollouts at a real server: a bad candidate is rolled back, a good one promoted, and no request is dropped."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from millrace.client.http import HttpTransport
from millrace.core.errors import ConflictError, InputError, MillraceError
from millrace.core.types import Endpoint, Rollout
from millrace.testing.graphs import fragile_scaler, scaler
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.xdist_group("rollout")
LIMIT = 1000.0  # of a fragile model


class Team:
    """A server whose rollouts are quick, and a client of it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = {"MILLRACE_ROLLOUT_LOOK_S": "0.1", "MILLRACE_ROLLOUT_STEP_S": "0.2"}
        self.server = RunningServer(home, environment=environment).start()
        self.transport = HttpTransport(self.server.url)

    def call(self, operation: str, **body: Any) -> Any:
        return self.transport.call(operation, body)

    def register(self, name: str, model: Any) -> None:
        path = self.home.parent / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        self.call("model.register", path=str(path), name=name, alias=None)

    def expect(self, name: str, check: Callable[[Endpoint], bool], what: str, timeout_s: float = 30.0) -> Endpoint:
        deadline = time.monotonic() + timeout_s
        while not check(seen := self.call("endpoint.get", name=name)):
            assert time.monotonic() < deadline, f"{what}: {seen}"
            time.sleep(0.05)
        return seen

    def deploy(self, model: str, name: str, **more: Any) -> Endpoint:
        self.call("endpoint.deploy", model=model, endpoint=name, **more)
        return self.expect(name, lambda one: one.state == "ready", f"{name} is ready")

    def roll_out(self, name: str, model: str, **more: Any) -> Rollout:
        self.call("endpoint.rollout", name=name, model=model, **more)
        return rollout_of(self.expect(name, lambda one: rollout_of(one).state != "starting", "the candidate is loaded"))

    def expect_end(self, name: str, state: str) -> Rollout:
        return rollout_of(self.expect(name, lambda one: rollout_of(one).state == state, f"the rollout is {state}"))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "millrace", "--home", str(self.home), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def rollout_of(endpoint: Endpoint) -> Rollout:
    assert endpoint.rollout is not None
    return endpoint.rollout


class Caller(threading.Thread):
    """Asks without a pause; some of its values are too large for a fragile model. Keeps statuses and factors."""

    def __init__(self, url: str, name: str, large: float) -> None:
        super().__init__(daemon=True)
        self._netloc, self._name, self._large = urlsplit(url).netloc, name, large
        self._stop_asking = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.factors: Counter[float] = Counter()
        self.last: list[float] = []
        self.cuts = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._netloc, timeout=20)
        while not self._stop_asking.is_set():
            value = LIMIT if random.random() < self._large else 1.0
            tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [value, 1.0]}
            try:
                connection.request("POST", f"/v2/models/{self._name}/infer", json.dumps({"inputs": [tensor]}))
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self.cuts += 1
                continue
            self.statuses[answer.status] += 1
            if answer.status == 200:
                factor = json.loads(body)["outputs"][0]["data"][1]
                self.factors[factor] += 1
                self.last = [*self.last[-19:], factor]
            time.sleep(0.001)
        connection.close()


@contextmanager
def called(url: str | None, name: str, large: float = 0.0) -> Iterator[Caller]:
    assert url is not None
    caller = Caller(url, name, large)
    caller.start()
    yield caller
    caller._stop_asking.set()
    caller.join(30)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server with `scaler`: v1 x 2, v2 x 3, v3 x 5 but fragile."""
    made = Team(tmp_path_factory.mktemp("rollout") / "home")
    for model in (scaler(2.0), scaler(3.0), fragile_scaler(5.0, LIMIT)):
        made.register("scaler", model)
    yield made
    made.transport.close()
    made.server.stop()


def events(team: Team, verb: str, name: str) -> list[Any]:
    found = team.call("event.list", since=0, limit=1000)
    return [one for one in found if (one.verb, one.subject) == (verb, f"endpoint:{name}")]


def test_a_candidate_that_fails_is_rolled_back_by_itself(team: Team) -> None:
    endpoint = team.deploy("scaler@1", "bad")
    with called(endpoint.url, "bad", large=0.3) as caller:
        team.roll_out("bad", "scaler@3", steps=[20, 50])
        ended = team.expect_end("bad", "aborted")
        assert "of its" in ended.reason
        assert "requests failed" in ended.reason
        team.expect("bad", lambda one: caller.last == [2.0] * 20, "all requests are the baseline's again")
    assert caller.cuts == 0
    assert {*caller.statuses} == {200, 500}
    assert caller.factors[5.0] > 0
    after = team.call("endpoint.get", name="bad")
    assert (after.number, after.state) == (1, "ready")
    assert ended.facts["evidence"]["candidate"]["errors"] > 0
    team.expect("bad", lambda _: events(team, "endpoint.abort", "bad"), "its event is sealed")
    (event,) = events(team, "endpoint.abort", "bad")
    assert event.actor == "system:rollout"
    shown = team.command("endpoints", "status", "bad")
    assert "rollout aborted" in shown.stdout
    assert "requests failed" in shown.stdout


def test_a_good_candidate_takes_its_steps_and_is_promoted(team: Team) -> None:
    team.call("model.promote", model="scaler@1", alias="live")
    endpoint = team.deploy("scaler@live", "good")
    with called(endpoint.url, "good") as caller:
        seen = team.roll_out("good", "scaler@2", steps=[30, 60])
        assert seen.weight == 30
        ended = team.expect_end("good", "promoted")
        team.expect("good", lambda one: (one.number, one.state) == (2, "ready"), "the candidate is what is served")
        team.expect("good", lambda one: caller.last == [3.0] * 20, "and answers every request")
    assert ended.step == 1
    assert "shown by" in ended.reason
    assert {*caller.statuses} == {200}
    assert caller.cuts == 0
    assert {*caller.factors} == {2.0, 3.0}
    (alias,) = [one for one in team.call("model.get", model="scaler@live").aliases if one.name == "live"]
    assert alias.number == 2
    assert "rollout of good" in alias.history[-1]["reason"]


def test_a_promotion_that_wants_a_second_person_waits_for_them(team: Team) -> None:
    team.call("model.promote", model="scaler@1", alias="guarded")
    team.call("approval_rule.set", in_project=team.call("model.get", model="scaler@1").version.project, alias="guarded")
    endpoint = team.deploy("scaler@guarded", "careful")
    with called(endpoint.url, "careful"):
        team.roll_out("careful", "scaler@2", steps=[50])
        waiting = rollout_of(team.expect("careful", lambda one: rollout_of(one).is_held, "it waits"))
        assert waiting.state == "running"
        assert "wants somebody else to agree" in waiting.reason
        (approval,) = team.call("approval.list", state="waiting")
        assert approval.asked_by == "system:rollout"
        team.call("approval.approve", name=approval.id)
        ended = team.expect_end("careful", "promoted")
    assert "alias" in ended.reason
    team.expect("careful", lambda one: (one.number, one.state) == (2, "ready"), "the alias is followed")


def test_a_candidate_that_cannot_be_loaded_is_aborted_and_the_baseline_stays(team: Team) -> None:
    """Its file goes bad between what a person wants and what the loop does."""
    endpoint = team.deploy("scaler@1", "steady")
    team.register("scaler", scaler(9.0))
    version = team.call("model.get", model="scaler@4").version
    entries = team.call("tree.get", digest=version.bundle.digest)
    digest = next(entry.digest for entry in entries if entry.path == "model.onnx").partition(":")[2]
    (blob,) = [path for path in (team.home / "blobs").rglob("*") if path.is_file() and digest[2:] in path.name]
    with called(endpoint.url, "steady") as caller:
        loop = team.server.children()["loop"]
        os.kill(loop, signal.SIGSTOP)
        try:
            team.call("endpoint.rollout", name="steady", model="scaler@4")
            shutil.rmtree(team.home / "scratch" / "trees" / version.bundle.digest.replace(":", "-"))
            blob.chmod(0o644)
            blob.write_bytes(b"\x00" * blob.stat().st_size)
        finally:
            os.kill(loop, signal.SIGCONT)
        ended = team.expect_end("steady", "aborted")
    assert ended.reason.startswith("it cannot be served: ")
    assert digest[:12] in ended.reason
    assert {*caller.statuses} == {200}
    assert {*caller.factors} == {2.0}
    assert team.call("endpoint.get", name="steady").state == "ready"


def test_a_shadow_answers_nobody_and_its_answers_are_compared(team: Team) -> None:
    endpoint = team.deploy("scaler@1", "copied")
    with called(endpoint.url, "copied") as caller:
        team.roll_out("copied", "scaler@2", shadow=True)

        def is_compared(one: Endpoint) -> bool:
            return rollout_of(one).facts.get("mirrored", {}).get("mirrored_rows", 0) > 20

        mirrored = rollout_of(team.expect("copied", is_compared, "copies are compared")).facts["mirrored"]
    assert {*caller.factors} == {2.0}
    assert mirrored["mirrored_max_difference"] == 1.0
    assert mirrored["mirrored_failed"] == 0
    shown = httpx.get(f"{team.server.url}/endpoints/copied").text
    assert "copied rows" in shown
    assert "shadow" in shown
    promoted = team.call("endpoint.promote", name="copied", reason="seen enough")
    assert (promoted.number, promoted.rollout.reason) == (2, "seen enough")


def test_what_a_rollout_wants_is_checked_and_said(team: Team) -> None:
    team.deploy("scaler@1", "checked")
    team.register("other", scaler(4.0))
    for body, complaint in (
        ({"model": "scaler@1"}, "serves already"),
        ({"model": "other@1"}, "want another version of that"),
        ({"model": "scaler@2", "steps": [50, 20]}, "want steps that grow"),
        ({"model": "scaler@2", "steps": [100]}, "between 0 and 100"),
        ({"model": "scaler@99"}, "no version 99"),
    ):
        with pytest.raises(MillraceError, match=complaint):
            team.call("endpoint.rollout", name="checked", **body)
    with pytest.raises(ConflictError, match="has no rollout now"):
        team.call("endpoint.promote", name="checked")
    with pytest.raises(InputError, match="between 0 and 100 percent"):
        team.call("endpoint.forecast", name="checked", weight=100)
    assert team.call("endpoint.get", name="checked").rollout is None


def test_the_command_says_how_long_it_takes_before_it_starts(team: Team) -> None:
    team.deploy("scaler@1", "told")
    done = team.command("endpoints", "rollout", "told", "scaler@2", "--weight", "10", "--hold")
    assert done.returncode == 0, done.stderr
    assert "is found after 1100 requests (median; 95 % of the time within" in done.stderr
    assert "rollout running" in done.stdout
    with pytest.raises(ConflictError, match="has a rollout already"):
        team.call("endpoint.rollout", name="told", model="scaler@2")
    assert rollout_of(team.call("endpoint.abort", name="told", reason="only tried")).state == "aborted"
    assert "only tried" in httpx.get(f"{team.server.url}/endpoints/told").text


def test_a_rollout_outlives_the_leader_and_the_process_that_dies_ends_it(team: Team) -> None:
    endpoint = team.deploy("scaler@1", "lasting")
    team.roll_out("lasting", "scaler@2", hold=True)
    with called(endpoint.url, "lasting"):
        gathered = team.expect("lasting", lambda one: windows(one) > 2, "there is evidence")
    os.kill(team.server.children()["loop"], signal.SIGKILL)
    again = team.expect("lasting", lambda one: one.state == "ready" and one.pid != endpoint.pid, "it is served again")
    assert rollout_of(again).state == "running"
    assert windows(again) >= windows(gathered)
    with called(again.url, "lasting") as caller:
        team.expect("lasting", lambda one: windows(one) > windows(gathered), "evidence is added to what there was")
    assert {*caller.factors} == {2.0, 3.0}
    assert again.pid is not None
    os.kill(again.pid, signal.SIGKILL)
    ended = team.expect_end("lasting", "aborted")
    assert "the serving process died" in ended.reason
    team.expect("lasting", lambda one: one.state == "ready", "the baseline is served again")


def windows(endpoint: Endpoint) -> int:
    return rollout_of(endpoint).facts.get("evidence", {}).get("windows", 0)
