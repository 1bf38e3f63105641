"""Roles: what is allowed where; and records as somebody sees them who may work in some projects only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.control.authorisation import acting_as, authorise
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import DeniedError, InputError, MillraceError, NotFoundError
from millrace.core.operations.table import OPERATIONS
from millrace.core.principals import (
    EVERYWHERE,
    OWNER,
    ROLES,
    Grant,
    Principal,
    RoleRule,
    both,
    check_scopes,
    includes,
    matches,
)
from millrace.core.types import MetricPoint
from millrace.wiring import open_dispatcher

PROJECTS = ("a", "b", "c")
places = st.sampled_from((EVERYWHERE, *PROJECTS))
roles = st.sampled_from([name for name in ROLES if name != "work"])
grants = st.lists(st.builds(Grant, role=roles, where=places), max_size=4).map(tuple)
custom = st.builds(
    RoleRule, description=st.just(""), allow=st.sampled_from([(), ("*",), ("run.*",), ("model.promote",)]),
    deny=st.sampled_from([(), ("*",), ("run.*",), ("model.promote",)]),
)  # fmt: skip
operations = st.sampled_from(sorted(OPERATIONS))


def naive(principal: Principal, operation: str, project: str) -> bool:
    """The rule in its own words: allowed by one grant that reaches to the project, denied by no custom role there."""
    rules = {**dict(principal.custom), **ROLES}

    def allowed(given: tuple[Grant, ...]) -> bool:
        here = [grant for grant in given if grant.where in (EVERYWHERE, project)]
        if any(grant.role not in ROLES and matches(rules[grant.role].deny, operation) for grant in here):
            return False
        return any(
            (matches(rule.allow, operation) or (rule.reads and not OPERATIONS[operation].is_write))
            and not matches(rule.deny, operation)
            for rule in (rules[grant.role] for grant in here)
        )

    return allowed(principal.grants) and (principal.within is None or allowed(principal.within))


@given(grants, st.none() | grants, custom, st.lists(places, max_size=2), operations, st.sampled_from(PROJECTS))
def test_a_principal_may_what_the_rule_says(
    own: tuple[Grant, ...],
    within: tuple[Grant, ...] | None,
    rule: RoleRule,
    at: list[str],
    operation: str,
    project: str,
) -> None:
    grants = (*own, *(Grant(role="special", where=where) for where in at))
    principal = Principal(id="user:x", grants=grants, within=within, custom=(("special", rule),))
    where = principal.where(operation, OPERATIONS[operation].is_write)
    assert includes(where, project) == naive(principal, operation, project)


@given(st.frozensets(places), st.frozensets(places), st.sampled_from(PROJECTS))
def test_both_is_both(left: frozenset[str], right: frozenset[str], project: str) -> None:
    assert includes(both(left, right), project) == (includes(left, project) and includes(right, project))


def test_nobody_may_anything_by_default() -> None:
    nobody = Principal(id="user:nobody", grants=())
    removed = Principal(id="user:x", grants=(Grant(role="a-role-that-is-gone"),))
    for operation in OPERATIONS.values():
        assert nobody.where(operation.name, operation.is_write) == frozenset()
        assert removed.where(operation.name, operation.is_write) == frozenset()


def test_who_may_what() -> None:
    """The table of docs/how-to/roles.md, in examples."""
    may = {
        "viewer": {"run.get", "model.get", "endpoint.list"},
        "annotator": {"dataset.get"},
        "developer": {"run.get", "run.submit", "model.register", "blob.put"},
        "operator": {"run.get", "model.promote", "endpoint.deploy", "alert.resolve", "approval.approve"},
        "maintainer": {"run.submit", "model.promote", "model.delete", "token.list", "approval.approve"},
    }
    may_not = {
        "viewer": {"run.submit", "model.promote", "token.list", "system.gc", "approval.approve"},
        "annotator": {"run.get", "run.submit", "model.get"},
        "developer": {"model.promote", "endpoint.deploy", "token.create", "system.migrate", "quota.set"},
        "operator": {"run.submit", "model.register", "token.create", "approval_rule.set"},
        "maintainer": {"system.migrate", "approval_rule.set", "quota.set", "work.claim"},
    }
    for role, names in may.items():
        principal = Principal(id="user:x", grants=(Grant(role=role, where="a"),))
        for name in names:
            assert principal.where(name, OPERATIONS[name].is_write) == {"a"}, (role, name)
        for name in may_not[role]:
            assert principal.where(name, OPERATIONS[name].is_write) == frozenset(), (role, name)
    owner = Principal(id="user:o")
    assert all(owner.where(one.name, one.is_write) == {EVERYWHERE} for one in OPERATIONS.values())


@pytest.mark.parametrize("scopes", [[], ["king"], ["work"], ["viewer", "king:a"]])
def test_scopes_that_are_none(scopes: list[str]) -> None:
    with pytest.raises(InputError, match="a scope is a role"):
        check_scopes(scopes)


# --------------------------------------------------------------------------- what somebody sees


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


def one_of(project: str, role: str = "developer") -> Principal:
    return Principal(id=f"user:{role}-{project}", grants=(Grant(role=role, where=project),))


def track(home: Dispatcher, project: str, folder: Path) -> str:
    run = home.call("run.track", {"name": project, "project": project, "params": {"x": 1}})
    home.call("run.log", {"run": run.id, "points": [MetricPoint(run.id, "loss", 0, 0.5, 1.0)]})
    (folder / f"{project}.txt").write_text(f"of {project}")
    home.call("run.artifact", {"run": run.id, "name": "notes", "path": str(folder / f"{project}.txt")})
    return run.id


def test_other_projects_do_not_exist(home: Dispatcher, tmp_path: Path) -> None:
    ids = {project: track(home, project, tmp_path) for project in ("a", "b")}
    digests = {
        project: home.call("run.get", {"run": id}).steps[0].outputs["notes"].digest for project, id in ids.items()
    }
    with acting_as(one_of("a")):
        assert [run.id for run in home.call("run.list", {})] == [ids["a"]]
        assert [one.project for one in home.call("project.list", {})] == ["a"]
        assert b"".join(home.stream("blob.get", {"digest": digests["a"]})) == b"of a"
        for name, body in {
            "run.get": {"run": ids["b"]}, "run.logs": {"run": ids["b"]}, "run.delete": {"run": ids["b"]},
            "run.cancel": {"run": ids["b"]}, "run.end": {"run": ids["b"], "state": "failed"},
            "run.diff": {"left": ids["a"], "right": ids["b"]}, "run.artifact": {"run": ids["b"], "name": "x", "path": "/"},
            "run.log": {"run": ids["b"], "tags": {"x": "y"}},
        }.items():  # fmt: skip
            with pytest.raises(NotFoundError):
                home.call(name, body)
        points = [MetricPoint(ids["b"], "loss", 1, 0.1, 2.0)]
        with pytest.raises(NotFoundError):
            home.call("run.log", {"run": ids["a"], "points": points})
        with pytest.raises(NotFoundError):
            home.stream("blob.get", {"digest": digests["b"]})
        entries = [{"path": "x", "digest": digests["b"], "size_bytes": 4}]
        with pytest.raises(NotFoundError):
            home.call("tree.put", {"entries": entries})
        with pytest.raises(DeniedError):
            home.call("run.track", {"name": "x", "project": "b"})
        with pytest.raises(DeniedError):
            home.call("project.create", {"name": "new"})
        subjects = {event.subject for event in home.call("event.list", {"limit": 1000})}
        assert f"run:{ids['b']}" not in subjects
    view = home.call("run.get", {"run": ids["b"]})
    assert (view.run.state, len(home.call("run.metrics", {"run": ids["b"]}))) == ("running", 1)


def test_a_path_of_the_servers_machine_is_for_its_owner(home: Dispatcher, tmp_path: Path) -> None:
    run = track(home, "a", tmp_path)
    home.call("model.list", {})
    with acting_as(one_of("a", "maintainer")):
        for name, body in {
            "run.artifact": {"run": run, "name": "x", "path": "/etc/passwd"},
            "run.submit": {"spec_path": str(tmp_path / "millrace.yaml")},
            "run.plan": {"spec_path": "/etc/passwd"},
            "model.register": {"path": "/etc/passwd"},
            "model.compress": {"path": "/etc/passwd", "data": "/etc/passwd", "label": "x"},
        }.items():
            with pytest.raises(DeniedError, match="only an owner may name"):
                home.call(name, body)


def test_errors_tell_somebody_elsewhere_no_path(home: Dispatcher, tmp_path: Path) -> None:
    track(home, "a", tmp_path)
    with acting_as(one_of("a", "viewer")):
        for name, body in {"model.get": {"model": "nothing"}, "endpoint.get": {"name": "nothing"}}.items():
            with pytest.raises(MillraceError) as caught:
                home.call(name, body)
            assert str(tmp_path) not in str(caught.value.to_dict())


def test_every_operation_asks(home: Dispatcher) -> None:
    nobody = Principal(id="user:nobody", grants=())
    for operation in OPERATIONS.values():
        with pytest.raises(DeniedError):
            authorise(home.services, nobody, operation, None)
    assert OWNER in ROLES


def test_a_grant_more_takes_nothing_away() -> None:
    """Who may something everywhere may it everywhere, whatever they may in single projects besides."""
    more = Grant(role="developer", where="digits")
    owner = Principal(id="user:x", grants=(Grant(role="owner"), more))
    within = Principal(id="user:x/token:t", grants=owner.grants, within=(Grant(role="owner"), more))
    for operation in OPERATIONS.values():
        for principal in (owner, within):
            assert principal.where(operation.name, operation.is_write) == {"*"}, operation.name
