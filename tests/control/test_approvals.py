"""Promotions that want a second person, and what a project may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from millrace.control.authorisation import acting_as, authenticate
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import ApprovalNeededError, ConflictError, DeniedError, InputError, QuotaError
from millrace.core.principals import Grant, Principal
from millrace.wiring import open_dispatcher


def adding(path: Path, value: float) -> str:
    """A model: y = x + value."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])], "adding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor("c", TensorProto.FLOAT, [1], [value])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def acting(name: str, role: str = "owner") -> AbstractContextManager[None]:
    return acting_as(Principal(id=f"user:{name}/token:t", grants=(Grant(role=role),)))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    for value in (1.0, 2.0, 3.0):
        opened.call("model.register", {"path": adding(tmp_path / f"{value}.onnx", value), "name": "m", "alias": None})
    yield opened
    opened.close()


def at(home: Dispatcher) -> int | None:
    found = [one for one in home.call("model.get", {"model": "m@1"}).aliases if one.name == "champion"]
    return found[0].number if found else None


def test_a_promotion_waits_for_a_second_person(home: Dispatcher) -> None:
    with acting("olga"):
        home.call("approval_rule.set", {"in_project": "default"})
    with acting("ada", "operator"), pytest.raises(ApprovalNeededError) as caught:
        home.call("model.promote", {"model": "m@2", "reason": "better"})
    waiting = caught.value.details["approval"]
    assert at(home) is None
    with acting("ada", "operator"):
        with pytest.raises(DeniedError, match="cannot be the one who agrees"):
            home.call("approval.approve", {"name": waiting})
        with pytest.raises(ApprovalNeededError) as again:  # asking again does not add another one
            home.call("model.promote", {"model": "m@2"})
        assert again.value.details["approval"] == waiting
        with pytest.raises(DeniedError):
            home.call("approval_rule.delete", {"in_project": "default"})
    with acting("vera", "viewer"), pytest.raises(DeniedError):
        home.call("approval.approve", {"name": waiting})
    with acting("bob", "operator"):
        assert home.call("approval.approve", {"name": waiting}).state == "used"
        with pytest.raises(ConflictError, match="used already"):
            home.call("approval.approve", {"name": waiting})
    assert at(home) == 2
    history = home.call("model.get", {"model": "m@2"}).aliases[0].history
    assert "asked by user:ada, agreed to by user:bob" in history[-1]["reason"]
    with acting("ada", "operator"), pytest.raises(ApprovalNeededError):  # one approval is good for one promotion
        home.call("model.promote", {"model": "m@3"})
    with acting("bob", "operator"):
        other = home.call("approval.list", {"state": "waiting"})[0]
        assert home.call("approval.refuse", {"name": other.id, "reason": "slow"}).state == "refused"
    assert at(home) == 2


def test_a_token_that_one_has_made_is_no_second_person(home: Dispatcher) -> None:
    """Maintainers make tokens: those are in their hands. Those of an owner are given to people."""
    home.call("approval_rule.set", {"in_project": "default"})
    ada, bob = (made(home, name) for name in ("ada", "bob"))
    with acting_as(ada):
        with pytest.raises(ApprovalNeededError) as caught:
            home.call("model.promote", {"model": "m@2"})
        second = made(home, "second")
    waiting = {"name": caught.value.details["approval"]}
    with acting_as(second):
        third = made(home, "third")
    for one in (ada, second, third):
        with acting_as(one), pytest.raises(DeniedError, match="token:ada has asked for it"):
            home.call("approval.approve", waiting)
    assert third.id == "token:ada/token:third"
    with acting_as(bob):
        assert home.call("approval.approve", waiting).approved_by == ("token:bob",)


def made(home: Dispatcher, name: str) -> Principal:
    return authenticate(home.services, home.call("token.create", {"name": name, "scope": "maintainer"}).secret)


def test_two_of_them(home: Dispatcher) -> None:
    home.call("approval_rule.set", {"in_project": "default", "needed": 2})
    with acting("ada"), pytest.raises(ApprovalNeededError) as caught:
        home.call("model.promote", {"model": "m@1"})
    waiting = {"name": caught.value.details["approval"]}
    with acting("bob"):
        assert home.call("approval.approve", waiting).state == "waiting"
        with pytest.raises(ConflictError, match="has agreed already"):
            home.call("approval.approve", waiting)
    assert at(home) is None
    with acting("cleo"):
        home.call("approval.approve", waiting)
    assert at(home) == 1
    with pytest.raises(InputError):
        home.call("approval_rule.set", {"in_project": "default", "needed": 0})


def test_other_aliases_and_a_rollback_need_nobody(home: Dispatcher) -> None:
    home.call("model.promote", {"model": "m@1"})
    home.call("model.promote", {"model": "m@2"})
    home.call("approval_rule.set", {"in_project": "default"})
    with acting("ada"):
        assert home.call("model.promote", {"model": "m@3", "alias": "canary"}).number == 3
        assert home.call("model.rollback", {"model": "m"}).number == 1
    home.call("approval_rule.delete", {"in_project": "default"})
    assert home.call("model.promote", {"model": "m@3"}).number == 3


def test_runs_at_once_and_bytes_are_bounded(home: Dispatcher, tmp_path: Path) -> None:
    home.call("quota.set", {"in_project": "p", "runs": 2, "storage": "10KB"})
    first = home.call("run.track", {"name": "1", "project": "p"})
    home.call("run.track", {"name": "2", "project": "p"})
    with pytest.raises(QuotaError, match="2 runs at once, and has 2"):
        home.call("run.track", {"name": "3", "project": "p"})
    home.call("run.track", {"name": "3", "project": "q"})
    home.call("run.end", {"run": first.id, "state": "succeeded"})
    run = home.call("run.track", {"name": "3", "project": "p"})
    (tmp_path / "small").write_bytes(b"x" * 6_000)
    (tmp_path / "other").write_bytes(b"y" * 6_000)
    home.call("run.artifact", {"run": run.id, "name": "small", "path": str(tmp_path / "small")})
    with pytest.raises(QuotaError, match="6KB more do not fit"):
        home.call("run.artifact", {"run": run.id, "name": "other", "path": str(tmp_path / "other")})
    for wrong in ({"runs": 0}, {"requests_per_s": -1.0}, {"storage": "much"}):
        with pytest.raises(InputError):
            home.call("quota.set", {"in_project": "p", **wrong})


def test_requests_a_second_are_bounded(home: Dispatcher) -> None:
    home.call("quota.set", {"in_project": "p", "requests_per_s": 5.0})

    def ask_often() -> None:
        for _ in range(12):
            home.call("run.list", {})

    with (
        acting_as(Principal(id="user:x", grants=(Grant(role="viewer", where="p"),))),
        pytest.raises(QuotaError, match="5 requests a second"),
    ):
        ask_often()
    with acting_as(Principal(id="user:y", grants=(Grant(role="viewer", where="q"),))):
        ask_often()
