"""Users and roles: who may make, give and take what; and that nobody gives what they do not have."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.cli.main import cli
from millrace.cli.session import Session as Invocation
from millrace.control import sign_in
from millrace.control.authorisation import acting_as, authenticate, user_principal
from millrace.control.dispatch import Dispatcher
from millrace.control.tokens import first_tokens
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError, UnauthenticatedError
from millrace.core.operations.table import OPERATIONS
from millrace.core.principals import ROLES, Grant, Principal
from millrace.core.types import Event, RoleBinding, Session, Token, User
from millrace.security import totp
from millrace.wiring import open_dispatcher, open_transport

pytestmark = pytest.mark.usefixtures("quick_passwords")

PASSWORD, OTHER = "blue tractor on mars", "seven green umbrellas"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


def add(home: Dispatcher, name: str, *roles: str, **more: Any) -> str:
    """A user with roles, as `role` or `role:project`; without a password, which takes a while to hash."""
    home.call("user.create", {"name": name, **more})
    for role in roles:
        grant = Grant.parse(role)
        home.call("role.grant", {"who": name, "role": grant.role, "project": grant.where})
    return name


def as_user(home: Dispatcher, name: str, within: tuple[Grant, ...] | None = None) -> Principal:
    return user_principal(home.services, home.services.records.get(User, name), within=within)


def who(home: Dispatcher, operation: str, project: str = "default") -> dict[str, tuple[str, ...]]:
    found = home.call("user.who_can", {"operation": operation, "project": project})
    return {one.who: one.roles for one in found}


def events(home: Dispatcher) -> list[Event]:
    home.services.records.seal()
    return home.services.records.events(0, limit=10_000)


# --------------------------------------------------------------------------- users


def test_a_new_user_may_nothing_but_look_after_themselves(home: Dispatcher) -> None:
    add(home, "ada")
    with acting_as(as_user(home, "ada")):
        assert home.call("user.get", {"name": "ada"}).name == "ada"
        assert home.call("token.list", {}) == []
        for operation in OPERATIONS.values():
            if operation.name in dict(as_user(home, "ada").custom)["self"].allow:
                continue
            with pytest.raises(DeniedError):
                home.perform(operation.name, "x:y", lambda _: None)
        for name in ("user.get", "user.prepare_totp", "user.disable_totp"):
            with pytest.raises(DeniedError, match="for themselves alone"):
                home.call(name, {"name": "bob"})


@pytest.mark.parametrize("name", ["", "Ada", "a b", "../x", "user:ada", "a/b", "ä", "-a", "a" * 65, "a\n"])
def test_names_that_are_none(home: Dispatcher, name: str) -> None:
    with pytest.raises(InputError, match="name"):
        home.call("user.create", {"name": name})


def test_a_user_is_shown_without_secrets_and_passwords_are_in_no_event(home: Dispatcher) -> None:
    made = home.call("user.create", {"name": "ada", "password": PASSWORD})
    home.call("user.set_password", {"name": "ada", "password": OTHER})
    secret = home.call("user.prepare_totp", {"name": "ada"}).secret
    code = totp.code(secret, home.services.clock.now())
    shown = home.call("user.enable_totp", {"name": "ada", "secret": secret, "code": code})
    assert (made.has_password, made.has_totp, shown.has_totp) == (True, False, True)
    told = msgspec.json.encode([shown, home.call("user.list", {}), events(home)]).decode()
    for hidden in (PASSWORD, OTHER, secret, f'"{code}"', "argon2"):
        assert hidden not in told
    stored = home.services.records.get(User, "ada")
    assert stored is not None
    assert stored.password.startswith("$argon2id$")


@pytest.mark.parametrize("password", ["", "password", "admin", "ada-ada-ada-ada"])
def test_a_bad_password_makes_no_user(home: Dispatcher, password: str) -> None:
    with pytest.raises(InputError):
        home.call("user.create", {"name": "ada", "password": password})
    assert home.call("user.list", {}) == []


def test_ones_own_password_wants_the_one_before(home: Dispatcher) -> None:
    home.call("user.create", {"name": "ada", "password": PASSWORD})
    with acting_as(as_user(home, "ada")):
        for current in (None, "wrong"):
            with pytest.raises(DeniedError, match="present password"):
                home.call("user.set_password", {"name": "ada", "password": OTHER, "current": current})
        home.call("user.set_password", {"name": "ada", "password": OTHER, "current": PASSWORD})
    attempt = sign_in.begin(home.services, "ada")
    assert sign_in.check(attempt, OTHER).result()


def test_who_may_do_less_sets_nobodys_password(home: Dispatcher) -> None:
    """A custom role that may set passwords is no way to become the owner."""
    home.call("role.create", {"name": "desk", "allow": "user.set_password,user.disable,user.disable_totp,user.create"})
    add(home, "boss", "owner")
    add(home, "help", "desk")
    add(home, "ada", "desk")
    add(home, "bot", "owner", service=True)
    with acting_as(as_user(home, "help")):
        for name, body in {
            "user.set_password": {"name": "boss", "password": OTHER}, "user.disable": {"name": "boss"},
            "user.disable_totp": {"name": "boss"}, "token.create": {"name": "t", "scope": "desk", "user": "bot"},
        }.items():  # fmt: skip
            with pytest.raises(DeniedError, match="cannot give or take"):
                home.call(name, body)
        assert home.call("user.set_password", {"name": "ada", "password": OTHER}).has_password


def test_disabled_is_out_by_every_door(home: Dispatcher) -> None:
    home.call("user.create", {"name": "ada", "password": PASSWORD})
    home.call("role.grant", {"who": "ada", "role": "viewer"})
    with acting_as(as_user(home, "ada")):
        secret = home.call("token.create", {"name": "t", "scope": "viewer"}).secret
    attempt = sign_in.begin(home.services, "ada")
    signed = sign_in.sign_in(home.services, attempt, "", address="x")
    assert signed is not None
    home.call("user.disable", {"name": "ada"})
    for refused in (lambda: authenticate(home.services, secret),
                    lambda: sign_in.authenticate_session(home.services, signed.secret)):  # fmt: skip
        with pytest.raises(UnauthenticatedError):
            refused()
    assert sign_in.begin(home.services, "ada").stored == ""
    home.call("user.enable", {"name": "ada"})
    assert authenticate(home.services, secret).id == "user:ada/token:t"
    with pytest.raises(UnauthenticatedError):
        sign_in.authenticate_session(home.services, signed.secret)


def test_a_service_account_has_tokens_alone(home: Dispatcher) -> None:
    add(home, "boss", "owner")
    add(home, "bot", "operator:digits", service=True)
    for name, body in {
        "user.create": {"name": "bot2", "service": True, "password": PASSWORD},
        "user.set_password": {"name": "bot", "password": PASSWORD},
        "token.create": {"name": "t", "scope": "viewer", "user": "boss"},
    }.items():
        with pytest.raises(InputError):
            home.call(name, body)
    with acting_as(as_user(home, "boss")):
        secret = home.call("token.create", {"name": "t", "scope": "operator", "user": "bot"}).secret
    principal = authenticate(home.services, secret)
    assert principal.id == "user:bot/token:t"
    assert principal.where("model.promote", True) == {"digits"}, "no more than the account, whatever the scope"


# --------------------------------------------------------------------------- tokens


def test_a_users_token_is_narrower_and_never_wider(home: Dispatcher) -> None:
    add(home, "ada", "developer:digits", "viewer")
    with acting_as(as_user(home, "ada")):
        secret = home.call("token.create", {"name": "t", "scope": "viewer:digits"}).secret
        for scope in ("owner", "worker", "maintainer:digits", "developer", "operator:digits", "self"):
            with pytest.raises((DeniedError, InputError)):
                home.call("token.create", {"name": f"x-{scope}", "scope": scope})
    principal = authenticate(home.services, secret)
    assert principal.where("run.get", False) == {"digits"}
    assert principal.where("run.submit", True) == frozenset()
    with acting_as(principal), pytest.raises(DeniedError):
        home.call("token.create", {"name": "more", "scope": "viewer:digits"})
    home.call("role.revoke", {"who": "ada", "role": "viewer"})
    home.call("role.revoke", {"who": "ada", "role": "developer", "project": "digits"})
    assert authenticate(home.services, secret).where("run.get", False) == frozenset(), "it acts for her, now"


def test_a_token_makes_no_wider_one(home: Dispatcher) -> None:
    add(home, "boss", "owner")
    with acting_as(as_user(home, "boss")):
        secret = home.call("token.create", {"name": "t", "scope": "maintainer:digits"}).secret
    with acting_as(authenticate(home.services, secret)):
        made = home.call("token.create", {"name": "u", "scope": "developer:digits"})
        assert made.token.user_name == "boss"
        for scope in ("owner", "maintainer", "developer:other", "viewer"):
            with pytest.raises(DeniedError):
                home.call("token.create", {"name": "w", "scope": scope})


def test_nobody_sees_or_revokes_anothers_token_without_the_right(home: Dispatcher) -> None:
    add(home, "boss", "owner")
    add(home, "ada", "viewer")
    add(home, "max", "maintainer:digits")
    home.call("token.create", {"name": "nobodys", "scope": "owner"})
    for name in ("boss", "ada", "max"):
        with acting_as(as_user(home, name)):
            home.call(
                "token.create",
                {
                    "name": f"of-{name}",
                    "scope": {"boss": "owner", "ada": "viewer:digits"}.get(name, "maintainer:digits"),
                },
            )
    seen = {}
    for name in ("boss", "ada", "max"):
        with acting_as(as_user(home, name)):
            seen[name] = {token.name for token in home.call("token.list", {})}
    assert seen == {
        "boss": {"nobodys", "of-boss", "of-ada", "of-max"}, "ada": {"of-ada"}, "max": {"of-max", "of-ada"},
    }  # fmt: skip
    with acting_as(as_user(home, "ada")), pytest.raises(NotFoundError):
        home.call("token.revoke", {"name": "of-boss"})
    with acting_as(as_user(home, "max")), pytest.raises(NotFoundError):
        home.call("token.revoke", {"name": "nobodys"})
    with acting_as(as_user(home, "ada")):
        assert home.call("token.revoke", {"name": "of-ada"}).revoked_at is not None


# --------------------------------------------------------------------------- roles


def test_deny_wins_and_default_is_deny(home: Dispatcher) -> None:
    home.call("role.create", {"name": "no-releases", "deny": "model.promote"})
    add(home, "ada", "operator", "no-releases:digits")
    principal = as_user(home, "ada")
    assert principal.where("model.promote", True) == {"*", "!digits"}
    assert principal.where("run.submit", True) == frozenset()


roles = st.sampled_from([name for name in ROLES if name != "work"])
places = st.sampled_from(["*", "a", "b"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path_factory.mktemp("users") / "home"))
    add(opened, "target")
    yield opened
    opened.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(roles, places), max_size=3),
    st.none() | st.lists(st.tuples(roles, places), min_size=1, max_size=2),
    roles,
    places,
)
def test_nobody_gives_more_than_they_have(
    shared: Dispatcher, own: list[tuple[str, str]], within: list[tuple[str, str]] | None, role: str, place: str
) -> None:
    """What was given never exceeds what the giver may, for every operation and project; else it is refused."""

    def grants(pairs: list[tuple[str, str]]) -> tuple[Grant, ...]:
        return tuple(Grant(role=role, where=where) for role, where in pairs)

    giver = Principal(id="user:giver", grants=grants(own), within=None if within is None else grants(within))
    with acting_as(giver):
        try:
            shared.call("role.grant", {"who": "target", "role": role, "project": place})
        except DeniedError:
            return
    given = as_user(shared, "target")
    shared.call("role.revoke", {"who": "target", "role": role, "project": place})
    for operation in OPERATIONS.values():
        if operation.name in dict(given.custom)["self"].allow:
            continue
        had, got = (one.where(operation.name, operation.is_write) for one in (giver, given))
        assert got <= had or "*" in had, operation.name


def test_a_maintainer_says_who_does_what_in_the_project_alone(home: Dispatcher) -> None:
    add(home, "max", "maintainer:digits")
    add(home, "ada")
    with acting_as(as_user(home, "max")):
        home.call("role.grant", {"who": "ada", "role": "developer", "project": "digits"})
        home.call("role.revoke", {"who": "ada", "role": "developer", "project": "digits"})
        for role, project in (("developer", "*"), ("developer", "other"), ("owner", "digits"), ("worker", "digits")):
            with pytest.raises(DeniedError):
                home.call("role.grant", {"who": "max", "role": role, "project": project})
        with pytest.raises(DeniedError, match="all projects"):
            home.call("role.create", {"name": "mine", "allow": "run.*"})
    home.call("role.create", {"name": "stop", "deny": "run.*"})
    with acting_as(as_user(home, "max")), pytest.raises(DeniedError):
        home.call("role.grant", {"who": "ada", "role": "stop", "project": "digits"})


def test_the_last_owner_stays_one(home: Dispatcher) -> None:
    home.call("user.create", {"name": "boss", "password": PASSWORD})
    home.call("role.grant", {"who": "boss", "role": "owner"})
    home.call("role.create", {"name": "stop", "deny": "role.*"})
    add(home, "ada", "owner")  # without a password: cannot come in
    with acting_as(as_user(home, "boss")):
        for name, body in {
            "user.disable": {"name": "boss"}, "role.revoke": {"who": "boss", "role": "owner"},
            "role.grant": {"who": "boss", "role": "stop"},
        }.items():  # fmt: skip
            with pytest.raises(ConflictError, match="nobody who is an owner"):
                home.call(name, body)
    assert who(home, "user.disable")["user:boss"] == ("owner",)
    home.call("user.set_password", {"name": "ada", "password": OTHER})
    with acting_as(as_user(home, "boss")):
        home.call("role.revoke", {"who": "boss", "role": "owner"})


@pytest.mark.parametrize(
    "body",
    [{"name": "owner", "allow": "*"}, {"name": "self", "allow": "*"}, {"name": "x"}, {"name": "X", "allow": "run.*"},
     {"name": "x", "allow": "nothing.*"}, {"name": "x", "allow": "run.*,rn.get"}],
)  # fmt: skip
def test_roles_that_are_none(home: Dispatcher, body: dict[str, str]) -> None:
    with pytest.raises(InputError):
        home.call("role.create", body)


def test_a_deleted_role_is_nobodys(home: Dispatcher) -> None:
    home.call("role.create", {"name": "releaser", "allow": "model.promote"})
    add(home, "ada", "releaser:digits")
    assert who(home, "model.promote", "digits") == {"user:ada": ("releaser:digits",)}
    home.call("role.delete", {"name": "releaser"})
    assert who(home, "model.promote", "digits") == {}
    assert home.services.records.find(RoleBinding) == []


def test_who_can(home: Dispatcher, tmp_path: Path) -> None:
    add(home, "ada", "operator:digits", "viewer")
    add(home, "bob", "developer:digits")
    add(home, "eve", "operator")
    home.call("user.disable", {"name": "eve"})
    home.call("role.grant", {"who": "group:releasers", "role": "operator", "project": "digits"})
    home.call("token.create", {"name": "ci", "scope": "operator:digits"})
    home.call("token.create", {"name": "old", "scope": "operator:digits"})
    home.call("token.revoke", {"name": "old"})
    expected = {
        "user:ada": ("operator:digits",),
        "group:releasers": ("operator:digits",),
        "token:ci": ("operator:digits",),
    }
    assert who(home, "model.promote", "digits") == expected
    assert who(home, "model.promote", "other") == {}
    with pytest.raises(NotFoundError):
        who(home, "model.demote")
    home.services.records.seal()
    done = CliRunner().invoke(
        cli, ["--home", str(tmp_path / "home"), "users", "who-can", "model.promote", "--project", "digits", "--json"],
        obj=Invocation(open_transport), prog_name="millrace",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {one["who"] for one in msgspec.json.decode(done.stdout)} == set(expected)


def test_groups_of_a_user_give_their_roles(home: Dispatcher) -> None:
    add(home, "ada")
    home.services.records.put(User(id="bob", name="bob", groups=("admins",), external="https://id|1"))
    home.call("role.grant", {"who": "group:admins", "role": "operator", "project": "digits"})
    assert as_user(home, "bob").where("model.promote", True) == {"digits"}
    assert as_user(home, "ada").where("model.promote", True) == frozenset()


# --------------------------------------------------------------------------- the first owner


def test_the_first_start_makes_one_owner_whose_secret_is_good_once(home: Dispatcher) -> None:
    secret = first_tokens(home.services)
    assert secret
    assert first_tokens(home.services) == "", "shown once"
    principal = authenticate(home.services, secret)
    assert principal.id == "user:owner/token:owner"
    assert principal.where("system.migrate", True) == {"*"}
    assert sign_in.first_password(home.services, "owner", "mr_wrong", PASSWORD, address="x") is None
    with pytest.raises(InputError):
        sign_in.first_password(home.services, "owner", secret, "password", address="x")
    signed = sign_in.first_password(home.services, "owner", secret, PASSWORD, address="x")
    assert signed is not None
    assert sign_in.authenticate_session(home.services, signed.secret)[0].id == "user:owner"
    assert sign_in.first_password(home.services, "owner", secret, OTHER, address="x") is None
    with pytest.raises(UnauthenticatedError, match="revoked"):
        authenticate(home.services, secret)
    assert first_tokens(home.services) == ""


def test_a_secret_that_was_never_used_is_replaced_once_it_has_expired(home: Dispatcher) -> None:
    first = first_tokens(home.services)
    token = next(one for one in home.services.records.find(Token) if one.is_once)
    assert token.expires_at is not None
    home.services.records.put(msgspec.structs.replace(token, expires_at=1.0))
    second = first_tokens(home.services)
    assert second not in ("", first)
    assert sign_in.first_password(home.services, "owner", first, PASSWORD, address="x") is None
    assert [user.name for user in home.services.records.find(User)] == ["owner"]


@pytest.mark.parametrize("password", ["", "password\n", "owner-owner-owner", "short"])
def test_an_empty_or_default_password_refuses_to_start(
    tmp_path: Path, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text(password)
    monkeypatch.setenv("MILLRACE_OWNER_PASSWORD_FILE", str(tmp_path / "password"))
    home = open_dispatcher(str(tmp_path / "home"))
    with pytest.raises(InputError, match=f"owner_password_file: {tmp_path}/password"):
        first_tokens(home.services)
    assert home.services.records.find(User) == []
    (tmp_path / "password").write_text(PASSWORD + "\n")
    assert first_tokens(home.services) == ""
    attempt = sign_in.begin(home.services, "owner")
    assert sign_in.check(attempt, PASSWORD).result()
    home.close()


# --------------------------------------------------------------------------- signing in, without HTTP


def test_many_guesses_at_once_are_no_way_round_the_back_off(home: Dispatcher) -> None:
    home.call("user.create", {"name": "ada", "password": PASSWORD})
    looked = [sign_in.begin(home.services, "ada").stored != "" for _ in range(30)]
    assert sum(looked) == sign_in.FREE_FAILURES + 1
    assert looked[-1] is False
    user = home.services.records.get(User, "ada")
    assert user is not None
    assert user.not_before > home.services.clock.now()
    home.services.records.put(msgspec.structs.replace(user, not_before=0.0))
    attempt = sign_in.begin(home.services, "ada")
    assert sign_in.check(attempt, PASSWORD).result()
    assert sign_in.sign_in(home.services, attempt, "", address="x") is not None
    user = home.services.records.get(User, "ada")
    assert user is not None
    assert (user.failures, user.not_before) == (0, 0.0)


def test_a_second_factor_is_wanted_and_each_code_good_once(home: Dispatcher) -> None:
    home.call("user.create", {"name": "ada", "password": PASSWORD})
    secret = base64.b32encode(b"12345678901234567890").decode()
    now = home.services.clock.now()
    with pytest.raises(InputError, match="no code"):
        home.call("user.enable_totp", {"name": "ada", "secret": secret, "code": "000000x"})
    home.call("user.enable_totp", {"name": "ada", "secret": secret, "code": totp.code(secret, now - totp.STEP_S)})

    def enter(code: str) -> object:
        attempt = sign_in.begin(home.services, "ada")
        assert sign_in.check(attempt, PASSWORD).result()
        return sign_in.sign_in(home.services, attempt, code, address="x")

    for code in ("", "123", totp.code(secret, now - totp.STEP_S)):
        assert enter(code) is None
    assert enter(totp.code(secret, now)) is not None
    assert enter(totp.code(secret, now)) is None


def test_what_is_typed_for_a_name_that_nobody_has_is_kept_nowhere(home: Dispatcher) -> None:
    add(home, "ada")
    for name in ("ada", "my secret password"):
        sign_in.refuse(home.services, name, "10.0.0.1")
    denied = [event for event in events(home) if event.verb == "session.create"]
    assert [(event.subject, event.detail["outcome"]) for event in denied] == [
        ("user:ada", "auth.denied"), ("user:unknown", "auth.denied"),
    ]  # fmt: skip
    assert "my secret" not in msgspec.json.encode(denied).decode()


def test_sessions_end(home: Dispatcher) -> None:
    home.call("user.create", {"name": "ada", "password": PASSWORD})

    def enter(old: str = "") -> str:
        signed = sign_in.sign_in(home.services, sign_in.begin(home.services, "ada"), "", address="x", old=old)
        assert signed is not None
        return signed.secret

    def change(secret: str, **values: float) -> None:
        session = home.services.records.get(Session, sign_in.token_id(secret))
        assert session is not None
        home.services.records.put(msgspec.structs.replace(session, **values))

    now = home.services.clock.now()
    idle, long, first = enter(), enter(), enter()
    change(idle, used_at=now - 1801)
    change(long, expires_at=now - 1)
    second = enter(old=first)
    assert len(home.services.records.find(Session)) == 1, "what has ended, and what is replaced, is gone"
    for ended in (idle, long, first, "", "x"):
        with pytest.raises(UnauthenticatedError):
            sign_in.authenticate_session(home.services, ended)
    change(second, used_at=now - 1000)
    principal, _ = sign_in.authenticate_session(home.services, second)
    assert principal.id == "user:ada"
    session = home.services.records.get(Session, sign_in.token_id(second))
    assert session is not None
    assert session.used_at >= now
    sign_in.sign_out(home.services, second)
    with pytest.raises(UnauthenticatedError):
        sign_in.authenticate_session(home.services, second)
