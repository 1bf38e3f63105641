"""Ways to more rights that were tried and found open once: roles that come again, projects' owners, events, works.

Each is what somebody with a token could do; the door is dispatch, as for every transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from oidc_site import Site
from onnx import TensorProto, helper

import millrace
from millrace.api.app import build_app
from millrace.control.authorisation import acting_as, authenticate, user_principal
from millrace.control.deployments import Reconciler
from millrace.control.dispatch import Dispatcher
from millrace.control.foreign import register_foreign
from millrace.control.registered import rename_model
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError, SpecError
from millrace.core.operations.registry import RegisterRequest
from millrace.core.ports import Work
from millrace.core.principals import Grant, Principal
from millrace.core.types import Endpoint, Event, Lease, Run, User, WorkItem
from millrace.wiring import open_dispatcher

pytestmark = pytest.mark.usefixtures("quick_passwords")

PASSWORD = "blue tractor on mars"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


def one_of(role: str, where: str = "*") -> Principal:
    return Principal(id=f"user:{role}", grants=(Grant(role=role, where=where),))


def bearer_of(home: Dispatcher, name: str, scope: str) -> Principal:
    """Of a token that acts for nobody: its scopes are all that bounds it."""
    return authenticate(home.services, home.call("token.create", {"name": name, "scope": scope}).secret)


# --------------------------------------------------------------------------- roles


def test_a_role_that_comes_again_with_more_is_no_way_up(home: Dispatcher) -> None:
    """A token keeps its scope when the role is deleted: who makes that name anew would fill it."""
    maintainer = bearer_of(home, "deploy", "maintainer")
    with acting_as(maintainer):
        home.call("role.create", {"name": "lister", "allow": "run.list"})
        lister = bearer_of(home, "list", "lister")
        home.call("role.delete", {"name": "lister"})
        for body in ({"allow": "*"}, {"allow": "user.*"}, {"deny": "model.promote"}):
            with pytest.raises(DeniedError, match="may not do all that lister allows"):
                home.call("role.create", {"name": "lister", **body})
        with pytest.raises(ConflictError, match="scope 'lister' of a role that was deleted"):
            home.call("role.create", {"name": "lister", "allow": "model.*"})
    with pytest.raises(ConflictError):  # not by an owner who knows nothing of that token, either
        home.call("role.create", {"name": "lister", "allow": "*"})
    with acting_as(lister), pytest.raises(DeniedError):
        home.call("model.list", {})
    home.call("token.revoke", {"name": "list"})
    assert home.call("role.create", {"name": "lister", "allow": "*"}).allow == ("*",)


def test_taking_one_binding_takes_no_other(home: Dispatcher) -> None:
    """`|` parts the id of a binding: a group's name may have it, a project may not."""
    home.call("role.grant", {"who": "group:x|owner|*", "role": "viewer", "project": "digits"})
    for verb in ("role.revoke", "role.grant"):
        with pytest.raises(InputError, match="a scope is a role, or role:project"):
            home.call(verb, {"who": "group:x", "role": "owner", "project": "*|viewer|digits"})
    assert [one.principal for one in home.call("role.bindings", {})] == ["group:x|owner|*"]


def test_nobody_takes_a_project_from_somebody_by_giving(home: Dispatcher) -> None:
    """`!digits` among the projects of somebody means: all but digits. Only an owner's roles deny."""
    home.call("user.create", {"name": "olga"})
    home.call("role.grant", {"who": "olga", "role": "owner"})
    run = home.call("run.track", {"name": "x", "project": "digits"})
    for who in (one_of("maintainer"), one_of("owner")):
        with acting_as(who):
            with pytest.raises(InputError):
                home.call("role.grant", {"who": "olga", "role": "maintainer", "project": "!digits"})
            with pytest.raises(InputError):
                home.call("token.create", {"name": "t", "scope": "viewer,viewer:!digits"})
    with acting_as(of_user(home, "olga", None)):
        assert home.call("run.get", {"run": run.id}).run.id == run.id


# --------------------------------------------------------------------------- users are of all projects


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("user.set_password", {"name": "newcomer", "password": PASSWORD}),
        ("user.disable_totp", {"name": "newcomer"}),
        ("user.enable_totp", {"name": "newcomer", "secret": "A" * 32, "code": "123456"}),
        ("user.disable", {"name": "newcomer"}),
        ("user.enable", {"name": "newcomer"}),
        ("user.create", {"name": "somebody", "password": PASSWORD}),
    ],
)
def test_an_owner_of_one_project_takes_nobodys_account(home: Dispatcher, verb: str, body: dict[str, Any]) -> None:
    """Who has no role yet stands below everybody; with a password of a stranger they would get one elsewhere."""
    home.call("user.create", {"name": "newcomer"})
    before = home.services.records.get(User, "newcomer")
    with acting_as(one_of("owner", "a")), pytest.raises(DeniedError):
        home.call(verb, body)
    assert [one.name for one in home.services.records.find(User)] == ["newcomer"]
    assert home.services.records.get(User, "newcomer") == before


def test_an_owner_of_one_project_makes_no_token_of_a_service_account(home: Dispatcher) -> None:
    home.call("user.create", {"name": "bot", "service": True})
    body = {"name": "mine", "scope": "viewer:a", "user": "bot"}
    with acting_as(one_of("owner", "a")), pytest.raises(DeniedError, match="for themselves alone"):
        home.call("token.create", body)
    with acting_as(one_of("owner")):
        assert home.call("token.create", body).token.user_name == "bot"


# --------------------------------------------------------------------------- events


def events(home: Dispatcher, who: Principal) -> list[Event]:
    home.services.records.seal()
    with acting_as(who):
        listed = home.call("event.list", {})
        watched = home.stream("event.watch", {})
        seen = []
        while (event := next(watched)) is not None:
            seen.append(event)
    assert seen == listed
    return listed


def test_events_about_people_are_for_who_may_search_the_audit(home: Dispatcher) -> None:
    """A viewer of everything may not list users: events would tell their addresses, and whence they sign in."""
    home.call("user.create", {"name": "ada", "email": "ada@example.org"})
    home.call("secret.set", {"name": "DB_PASSWORD", "value": "hunter2hunter2", "in_project": "a"})
    run = home.call("run.track", {"name": "x", "project": "a"})
    for role in ("viewer", "developer", "operator", "maintainer"):
        assert [event.subject for event in events(home, one_of(role))] == [f"run:{run.id}"], role
    assert {"user:ada", "secret:DB_PASSWORD"} <= {event.subject for event in events(home, one_of("owner"))}


def test_what_is_begun_in_a_project_is_no_event_of_another_one(home: Dispatcher) -> None:
    """The request names parameters; it used to be about `default`, whichever project the run is of."""
    home.call("run.track", {"name": "x", "project": "default"})
    run = home.call("run.track", {"name": "x", "project": "a", "params": {"patient": "4711"}})
    assert "4711" not in str(events(home, one_of("viewer", "default")))
    assert [event.subject for event in events(home, one_of("viewer", "a"))] == [f"run:{run.id}"]


# --------------------------------------------------------------------------- works


def work_of(home: Dispatcher, project: str) -> WorkItem:
    run = home.call("run.track", {"name": "x", "project": project})
    item = WorkItem(id="0" * 32, run_id=run.id, name="train", state="claimed", attempt=1, work={})
    assert home.services.records.get(Run, run.id) is not None
    return home.services.records.put(item, expect_version=0)


def test_a_work_of_another_project_is_not_reported_on(home: Dispatcher) -> None:
    item = work_of(home, "b")
    body = {"work": item.id, "attempt": 1, "first": 0, "frames": []}
    with acting_as(one_of("owner", "a")):
        with pytest.raises(NotFoundError, match="there is no work"):
            home.call("work.report", body)
        assert home.call("work.claim", {"worker": "w", "version": millrace.__version__}) is None
    with acting_as(one_of("owner", "b")):
        assert home.call("work.report", body).received == 0


def test_works_of_other_projects_do_not_keep_a_worker_from_its_own(home: Dispatcher) -> None:
    """However many of theirs, or of drivers that have died, wait before it."""
    for number, project in enumerate([*"bbbbbb", "a"]):
        run = home.call("run.track", {"name": "x", "project": project})
        lease = Lease(id=f"run/{run.id}", boot_id="elsewhere", held=True, expires_at=home.services.clock.now() + 60)
        home.services.records.put(lease)
        work = Work(
            step_id="s", run_id=run.id, name="train", implementation="x:y", spec=b"{}",
            project=project,
        )  # fmt: skip
        item = WorkItem(id=f"{number:032}", run_id=run.id, name="train", work=msgspec.to_builtins(work))
        home.services.records.put(item, expect_version=0)
    body = {"worker": "w", "version": millrace.__version__}
    with acting_as(one_of("worker", "a")):
        order = home.call("work.claim", body)
        assert order is not None
        assert order.work.project == "a"
        assert home.call("work.claim", body) is None


# --------------------------------------------------------------------------- tokens that may less than their user


def test_a_token_of_an_owner_that_may_less_names_no_path_of_the_server(home: Dispatcher, tmp_path: Path) -> None:
    """Who finds a token of a CI job does not read the server's disk, whoever's token it is."""
    secret = tmp_path / "secret.yaml"
    secret.write_text("password: hunter2hunter2\n")
    home.call("user.create", {"name": "olga"})
    home.call("role.grant", {"who": "olga", "role": "owner"})
    everything = Grant(role="owner")
    for within in (None, (everything,)):
        with acting_as(of_user(home, "olga", within)), pytest.raises(SpecError):
            home.call("run.plan", {"spec_path": str(secret)})
    for scope in ("developer", "developer:a", "owner:a", "maintainer"):
        with acting_as(of_user(home, "olga", (Grant.parse(scope),))):
            for verb, field in (("run.plan", "spec_path"), ("run.submit", "spec_path"), ("model.register", "path")):
                with pytest.raises(DeniedError, match="only an owner may name"):
                    home.call(verb, {field: str(secret)})


def of_user(home: Dispatcher, name: str, within: tuple[Grant, ...] | None) -> Principal:
    return user_principal(home.services, home.services.records.get(User, name), within=within)


# --------------------------------------------------------------------------- what goes on after a right has ended


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("token.revoke", {"name": "t"}),
        ("user.disable", {"name": "ada"}),
        ("role.revoke", {"who": "ada", "role": "viewer", "project": "a"}),
    ],
)
def test_who_listens_hears_nothing_more_when_their_right_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, body: dict[str, str]
) -> None:
    """A stream may last for days: it is not only asked at its beginning."""
    monkeypatch.setattr("millrace.api.stream.AGAIN_S", 0.1)
    with Site(tmp_path) as site:
        site.start()
        for name, request in (
            ("user.create", {"name": "ada", "service": True}),
            ("role.grant", {"who": "ada", "role": "viewer", "project": "a"}),
        ):
            site.home.call(name, request)
        secret = site.home.call("token.create", {"name": "t", "scope": "viewer:a", "user": "ada"}).secret
        headers, url = {"Authorization": f"Bearer {secret}"}, f"{site.url}/api/v1/events/stream"
        with httpx.stream("GET", url, headers=headers, timeout=20, trust_env=False) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": open"
            site.home.call("run.track", {"name": "x", "project": "a"})
            site.home.services.records.seal()
            assert any("run.track" in line for line in lines)
            site.home.call(verb, body)
            assert [line for line in lines if line] == []
        assert httpx.get(url, headers=headers, trust_env=False).status_code in (401, 403)


# --------------------------------------------------------------------------- what strangers are told


def test_a_stranger_is_not_told_where_the_records_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres is away: its address and the name to sign in with are for the log."""
    monkeypatch.setenv("MILLRACE_RECORDS_URL", "postgresql://keeper@127.0.0.1:1/secret_place")
    with closing(open_dispatcher(str(tmp_path / "home"))) as home:
        app = build_app(home, wants_token=True)
        for path, headers in (
            ("/readyz", {}),
            ("/api/v1/runs", {"Authorization": "Bearer mr_x"}),
            ("/runs", {"Cookie": "millrace=x", "Accept": "text/html"}),
            ("/login", {"Cookie": "millrace=x", "Accept": "text/html"}),
        ):
            answer = asyncio.run(asked(app, path, headers))
            assert answer.status_code == 503, path
            assert not any(word in answer.text for word in ("keeper", "127.0.0.1", "secret_place", ":1")), answer.text


async def asked(app: Any, path: str, headers: dict[str, str]) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return await client.get(path, headers=headers)


# --------------------------------------------------------------------------- names that become free


def test_an_endpoint_serves_no_model_of_another_project_that_has_taken_the_name(
    home: Dispatcher, tmp_path: Path
) -> None:
    """Its own was renamed: whoever registers that name next, elsewhere, would answer those who call it."""
    for name, value in (("own", 1.0), ("theirs", 2.0)):
        (tmp_path / f"{name}.onnx").write_bytes(adding(value))
    home.call("model.register", {"path": str(tmp_path / "own.onnx"), "name": "digits"})
    home.call("endpoint.deploy", {"model": "digits", "endpoint": "e"})
    endpoint = home.services.records.get(Endpoint, "e")
    assert endpoint is not None
    reconciler = Reconciler(home.services)
    served = reconciler._model_of(endpoint)
    assert served is not None
    rename_model(home.services, "digits", "older")
    register_foreign(
        home.services.scoped(frozenset({"b"})), RegisterRequest(path=str(tmp_path / "theirs.onnx"), name="digits")
    )
    assert home.call("model.get", {"model": "digits"}).version.project == "b"
    with pytest.raises(ConflictError, match="is of the project 'b'"):
        reconciler._open(endpoint, reconciler._wish_of(endpoint))


def adding(value: float) -> bytes:
    """y = x + value."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])], "adding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor("c", TensorProto.FLOAT, [1], [value])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
