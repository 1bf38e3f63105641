"""The controller of rollouts: what is decided from which facts, and how frames become evidence."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from millrace.control.authorisation import acting_as
from millrace.control.canaries import LEARNT_REQUESTS, SAVE_S, Action, Canary, Facts, decide
from millrace.control.rollouts import check_steps
from millrace.control.traffic import RECENT_S, added, requests_per_min
from millrace.core.clock import FakeClock
from millrace.core.errors import ConflictError, DeniedError, InputError
from millrace.core.principals import Grant, Principal, RoleRule
from millrace.core.types import Endpoint, Rollout
from millrace.serve.telemetry import TelemetryFrame
from millrace.stats.canary import Arm, Evidence, observe
from millrace.wiring import open_dispatcher

CLOCK = FakeClock()
NOW = CLOCK.now()
WANTED = Rollout(id="r", number=2, label="2", base=1, steps=(10.0, 50.0))
RUNNING = msgspec.structs.replace(WANTED, state="running", stepped_at=NOW - 100)
LAST = msgspec.structs.replace(RUNNING, step=1)
GOOD = Evidence(
    step_base=Arm(requests=9000, errors=9, timed=2000, slow=100),
    step_candidate=Arm(requests=1000, errors=1, timed=1000, slow=50),
)
FAIR = Evidence(
    step_base=Arm(requests=2000, errors=2, timed=300, slow=15),
    step_candidate=Arm(requests=200, errors=1, timed=200, slow=10),
)
BAD = observe(Evidence(), Arm(requests=100, errors=1), Arm(requests=100, errors=20), np.random.default_rng(0))


def changed(rollout: Rollout, **changes: object) -> Rollout:
    return msgspec.structs.replace(rollout, **changes)


@pytest.mark.parametrize(
    ("rollout", "more", "kind"),
    [
        (WANTED, {}, None),
        (WANTED, {"is_loaded": True}, "run"),
        (WANTED, {"error": "no such file"}, "abort"),
        (WANTED, {"number": 2}, "settle"),  # somebody moved the alias to the candidate
        (RUNNING, {"number": 3}, "abort"),  # or to yet another version
        (RUNNING, {}, None),
        (RUNNING, {"evidence": BAD}, "abort"),
        (RUNNING, {"evidence": BAD, "step_s": 1000.0}, "abort"),  # harm does not wait for the step's end
        (RUNNING, {"evidence": GOOD}, "step"),
        (RUNNING, {"evidence": FAIR}, "step"),
        (RUNNING, {"evidence": GOOD, "step_s": 101.0}, None),
        (LAST, {"evidence": GOOD}, "promote"),
        (LAST, {"evidence": FAIR}, None),  # enough to go on, not enough to be promoted
        (LAST, {"evidence": GOOD, "step_s": 101.0}, None),
        (LAST, {"evidence": BAD}, "abort"),
        (LAST, {"error": "its process died", "evidence": GOOD}, "abort"),
        (changed(RUNNING, is_held=True), {"evidence": GOOD}, "step"),
        (changed(LAST, is_held=True), {"evidence": GOOD}, None),
        (changed(LAST, is_held=True), {"evidence": BAD}, "abort"),
        (changed(RUNNING, is_shadow=True), {"evidence": BAD}, None),
        (changed(RUNNING, is_shadow=True), {"error": "it is corrupt"}, "abort"),
        (changed(RUNNING, number=1, label="1-int8"), {"evidence": GOOD}, "step"),  # another variant of the same
        (changed(RUNNING, state="promoted"), {"evidence": BAD}, None),
        (changed(RUNNING, state="aborted"), {"number": 2}, None),
    ],
)
def test_what_is_decided(rollout: Rollout, more: dict[str, object], kind: str | None) -> None:
    facts = msgspec.structs.replace(Facts(rollout=rollout, number=1), **more)
    action = decide(NOW, facts)
    assert (action.kind if action is not None else None) == kind
    if action is not None and kind != "run":
        assert action.reason


def test_the_reason_is_in_the_words_of_the_facts() -> None:
    assert decide(NOW, Facts(rollout=RUNNING, number=1, evidence=BAD)) == Action(
        kind="abort", reason="20 % of its 100 requests failed, 1 % of the baseline's 100"
    )
    assert "v3 now, not v1" in getattr(decide(NOW, Facts(rollout=RUNNING, number=3)), "reason", "")


def frame(version: str, answered: int, failed: int = 0, bin: int = 80, **more: float) -> TelemetryFrame:
    counters = {"answered": answered, "failed": failed, "status_4xx": 7, **more}
    return TelemetryFrame(endpoint="e", version=version, counters=counters, latencies={bin: answered})


def test_a_window_is_closed_by_requests_of_both_and_by_time() -> None:
    canary, clock = Canary(RUNNING, np.random.default_rng(0)), FakeClock(1000.0)
    canary.take(frame("1", 50))
    canary.take(frame("9", 50, 50))  # of neither
    canary.look(clock.now(), 1.0)
    assert canary.evidence.windows == 0
    canary.take(frame("2", 4))
    canary.look(clock.now(), 1.0)
    assert canary.evidence.windows == 0
    canary.take(frame("2", 4, 2))
    canary.look(clock.now(), 1.0)
    seen = canary.evidence
    assert (seen.windows, seen.base.requests) == (1, 50)
    assert (seen.candidate.requests, seen.candidate.errors) == (10, 2)
    for version in ("1", "2"):
        canary.take(frame(version, 20))
    canary.look(clock.now(), 1.0)
    assert canary.evidence.windows == 1
    clock.sleep(1.0)
    canary.look(clock.now(), 1.0)
    assert canary.evidence.windows == 2


def test_what_slow_means_is_learnt_from_the_baseline_first() -> None:
    canary = Canary(RUNNING, np.random.default_rng(0))
    for version in ("1", "2"):
        canary.take(frame(version, LEARNT_REQUESTS, bin=120))
    canary.look(1.0, 0.0)
    assert canary.evidence.candidate.timed == 0
    for number in range(10):
        canary.take(frame("1", 20, bin=120))
        canary.take(frame("2", 20, bin=136))  # four times as long
        canary.look(2.0 + number, 0.0)
    assert canary.evidence.candidate.slow == 200
    assert canary.evidence.base.slow == 0
    action = decide(NOW, Facts(rollout=RUNNING, number=1, evidence=canary.evidence))
    assert action is not None
    assert "100 % of its 200 requests took longer than the baseline's 95th percentile, 0 %" in action.reason


def test_an_heir_goes_on_where_the_leader_before_it_stored() -> None:
    canary = Canary(RUNNING, np.random.default_rng(0))
    for version in ("1", "2"):
        canary.take(frame(version, LEARNT_REQUESTS, mirrored_rows=3.0, mirrored_max_difference=0.5))
    canary.look(1.0, 0.0)
    assert canary.is_to_save(SAVE_S)
    stored = msgspec.json.decode(msgspec.json.encode(canary.facts(SAVE_S)))
    assert not canary.is_to_save(10 * SAVE_S)
    heir = Canary(changed(RUNNING, facts=stored), np.random.default_rng(0))
    assert heir.evidence == canary.evidence
    heir.take(frame("2", 10, mirrored_rows=1.0, mirrored_max_difference=0.25))  # a new process counts from nothing
    facts = heir.facts(0.0)
    assert facts["threshold"] == stored["threshold"]
    assert facts["mirrored"] == {"mirrored_rows": 7.0, "mirrored_max_difference": 1.0}


def test_the_largest_difference_is_that_of_one_replica_not_of_all_together() -> None:
    canary = Canary(RUNNING)
    for process, more in ((7, 0.5), (8, 0.4), (7, 0.2)):  # each tells by how much its own largest has grown
        canary.take(frame("2", 10, mirrored_rows=1.0, mirrored_max_difference=more), process)
    assert canary.facts(0.0)["mirrored"] == {"mirrored_rows": 3.0, "mirrored_max_difference": 0.7}


def test_more_requests_gather_evidence_anew_for_the_promotion_alone() -> None:
    canary = Canary(changed(RUNNING, facts={"evidence": msgspec.to_builtins(BAD)}))
    canary.step()
    assert canary.evidence.step_candidate == Arm()
    assert canary.evidence.against == BAD.against


def test_steps_are_checked() -> None:
    assert check_steps([5, 20, 100]) == (5, 20)
    for steps in ([], [0], [100], [10, 10], [50, 20], [-1], [float("nan")], [10, 101], [float("inf")], [*range(1, 40)]):
        with pytest.raises(InputError, match="want"):
            check_steps(steps)


def test_the_rate_is_of_the_last_minutes() -> None:
    traffic: dict[str, object] = {}
    for second in range(0, 3600, 10):
        traffic = added(traffic, {"status_2xx": 20, "status_5xx": 0, "rows": 90}, NOW + second)
    assert requests_per_min(traffic, NOW + 3590) == pytest.approx(120, rel=0.05)
    assert len(traffic["recent"]) <= RECENT_S / 10 + 1  # type: ignore[arg-type]
    assert requests_per_min(traffic, NOW + 3590 + RECENT_S + 1) == 0
    assert requests_per_min({}, NOW) == 0


def test_who_may_not_move_an_alias_may_not_promote_what_follows_it(tmp_path: Path) -> None:
    dispatcher = open_dispatcher(str(tmp_path / "home"))
    endpoint = Endpoint(
        id="e", name="e", model="m", number=1, alias="champion", variant="", is_managed=True, rollout=RUNNING
    )  # fmt: skip
    dispatcher.services.records.put(endpoint)
    rule = RoleRule(description="deploys", allow=("endpoint.*",))
    deployer = Principal(id="user:bo", grants=(Grant(role="deployer"),), custom=(("deployer", rule),))
    try:
        with acting_as(deployer):
            with pytest.raises(DeniedError, match=r"user:bo may not model.promote"):
                dispatcher.call("endpoint.promote", {"name": "e"})
            assert dispatcher.call("endpoint.abort", {"name": "e", "rollout": "r"}).rollout.reason == "aborted by hand"
            with pytest.raises(ConflictError, match="has no rollout now"):
                dispatcher.call("endpoint.abort", {"name": "e"})
        dispatcher.services.records.seal()
        events = [(one.verb, one.detail["outcome"]) for one in dispatcher.services.records.events()]
    finally:
        dispatcher.close()
    assert events == [
        ("endpoint.promote", "auth.denied"), ("endpoint.abort", "ok"), ("endpoint.abort", "record.conflict")
    ]  # fmt: skip


def test_endpoints_that_older_releases_stored_are_readable() -> None:
    old = b'{"id":"e","name":"e","model":"m","number":1,"variant":"fp32","state":"ready","facts":{}}'
    assert msgspec.json.decode(old, type=Endpoint).rollout is None
    new = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(msgspec.json.decode(old, type=Endpoint),
                                                                          rollout=LAST)), type=Endpoint)  # fmt: skip
    assert new.rollout == LAST
    assert LAST.weight == 50.0
