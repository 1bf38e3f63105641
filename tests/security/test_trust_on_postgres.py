"""Users, roles, tokens, approvals and quotas where two hosts share one Postgres, and everything happens at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from oidc_issuer import Issuer
from two_hosts import Homes, at_once, behind, of_type, two_homes

from millrace.api.app import build_app
from millrace.control import sign_in, terminals
from millrace.control.authorisation import acting_as, authenticate, user_principal
from millrace.control.callers import living_callers
from millrace.control.dispatch import Dispatcher
from millrace.control.heads import ledger
from millrace.control.tokens import first_tokens
from millrace.core.clock import FakeClock, SystemClock
from millrace.core.errors import (
    ConflictError,
    DeniedError,
    InputError,
    MillraceError,
    QuotaError,
    UnauthenticatedError,
)
from millrace.core.principals import Grant, Principal
from millrace.core.types import Alias, Artifact, ModelVersion, Role, RoleBinding, Run, Session, Token, User
from millrace.security import totp
from millrace.security.passwords import hash_password
from millrace.testing.postgres import STORES, open_place
from millrace.wiring import open_dispatcher, open_services

PASSWORD, OTHER, THIRD = "blue tractor on mars", "seven green umbrellas", "a quiet lake at noon"


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Homes]:
    with two_homes(tmp_path, monkeypatch) as made:
        yield made


def find_user(home: Dispatcher, name: str) -> User:
    user = home.services.records.get(User, name)
    assert user is not None
    return user


def as_user(home: Dispatcher, person: str, call: str, **body: Any) -> Callable[[], Any]:
    """A request of somebody who has been let in already."""
    principal = user_principal(home.services, find_user(home, person))

    def ask() -> Any:
        with acting_as(principal):
            return home.call(call, body)

    return ask


def owners(home: Dispatcher, *names: str) -> None:
    for name in names:
        home.services.records.put(User(id=name, name=name, external=f"https://issuer.example|{name}"))
        home.call("role.grant", {"who": name, "role": "owner"})


# --------------------------------------------------------------------------- signing in


def test_wrong_passwords_of_64_at_once_are_counted_exactly(homes: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ada", "bob"):
        homes[0].services.records.put(User(id=name, name=name, password="$argon2id$none"))
    found = at_once([partial(sign_in.begin, homes[n % 2].services, "ada") for n in range(64)])
    assert sum(bool(attempt.stored) for attempt in found) == sign_in.FREE_FAILURES + 1
    assert find_user(homes[0], "ada").failures == sign_in.FREE_FAILURES + 1
    monkeypatch.setattr(sign_in, "FREE_FAILURES", 1000)
    found = at_once([partial(sign_in.begin, homes[n % 2].services, "bob") for n in range(64)])
    assert all(attempt.stored for attempt in found)
    assert find_user(homes[1], "bob").failures == 64


def test_64_people_at_the_page_are_refused_and_no_error_of_the_database_is_shown(
    homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.api.sessions.FREE_FAILURES", 1000)
    for home in homes:
        home.services.clock = FakeClock(time.time())
    homes[0].call("user.create", {"name": "ada", "password": PASSWORD})
    apps = [build_app(home, wants_token=True) for home in homes]

    async def enter(number: int, password: str) -> httpx.Response:
        transport = httpx.ASGITransport(apps[number % 2])
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as browser:
            await browser.get("/login")
            form = {"form": browser.cookies["millrace-form"], "name": "ada", "password": password}
            return await browser.post("/login", data=form)

    async def all_at_once() -> list[httpx.Response]:
        return [await enter(0, PASSWORD), *await asyncio.gather(*(enter(n, "wrong") for n in range(64)))]

    first, *answers = asyncio.run(all_at_once())
    assert (first.status_code, {one.status_code for one in answers}) == (303, {401})
    assert find_user(homes[1], "ada").failures == sign_in.FREE_FAILURES + 1
    assert asyncio.run(enter(1, PASSWORD)).status_code == 401, "nor is the right one looked at before its time"
    records = ledger(homes[1].services)
    records.seal()
    assert [one.detail["outcome"] for one in records.events() if one.verb == "session.create"].count(
        "auth.denied"
    ) == 65
    cookie = first.cookies["millrace"]
    assert sign_in.authenticate_session(homes[1].services, cookie)[0].id == "user:ada"
    homes[1].call("user.disable", {"name": "ada"})
    with pytest.raises(UnauthenticatedError):
        sign_in.authenticate_session(homes[0].services, cookie)


def test_a_password_that_was_changed_meanwhile_is_not_changed_by_who_knew_it(homes: Homes) -> None:
    left, right = homes
    left.call("user.create", {"name": "ada", "password": PASSWORD})
    new = hash_password(OTHER)

    def change(transaction: Any) -> None:
        sign_in.set_password(left.services, transaction, transaction.get(User, "ada"), new)

    body = {"name": "ada", "current": PASSWORD, "password": THIRD}
    with pytest.raises(DeniedError):
        behind(left, as_user(right, "ada", "user.set_password", **body), change).result()
    assert find_user(left, "ada").password == new
    body["current"] = OTHER
    found = at_once([as_user(home, "ada", "user.set_password", **body) for home in homes])
    assert len(of_type(found, MillraceError)) == 1, found


def test_what_is_good_once_is_good_once_on_every_host(homes: Homes) -> None:
    services = [home.services for home in homes]
    secret, none = sorted(at_once([partial(first_tokens, one) for one in services]), reverse=True)
    assert secret and not none, "two servers that start at once make one first owner"  # noqa: PT018
    enter = [partial(sign_in.first_password, services[n % 2], "owner", secret, PASSWORD, address="a") for n in range(4)]
    assert len(of_type(at_once([*enter]), sign_in.SignedIn)) == 1
    key, now = totp.new_secret(), services[0].clock.now()
    owner = services[0].records.put(msgspec.structs.replace(find_user(homes[0], "owner"), totp=key, totp_step=0), None)
    attempt, code = sign_in.Attempt(name="owner", stored=owner.password), totp.code(key, now)
    enter = [partial(sign_in.sign_in, services[n % 2], attempt, code, address="a") for n in range(8)]
    assert len(of_type(at_once([*enter]), sign_in.SignedIn)) == 1
    wanted = terminals.check_wanted(terminals.challenge_of("verifier"), "laptop", "3600")
    code = terminals.give_code(services[0], "owner", wanted)
    made = at_once([partial(terminals.redeem, services[n % 2], code, "verifier", address="a") for n in range(8)])
    assert len(of_type(made, UnauthenticatedError)) == 7


def test_what_an_issuer_answers_is_good_once_and_makes_one_user(
    homes: Homes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Again(dict[str, Any]):
        pop = dict.get  # an issuer that redeems a code twice: ours does not

    with Issuer(SystemClock()) as issuer:
        issuer.codes = Again()
        monkeypatch.setenv("MILLRACE_OIDC_ISSUER", issuer.url)
        monkeypatch.setenv("MILLRACE_OIDC_CLIENT_ID", "millrace")
        hosts = [open_dispatcher(str(tmp_path / name)) for name in ("left", "right")]
        apps = [build_app(home, wants_token=True) for home in hosts]

        async def race() -> list[httpx.Response]:
            waiting = []
            for person in range(2):  # the same one, in two browsers
                client = partial(httpx.AsyncClient, base_url="http://127.0.0.1", timeout=60)
                async with client(transport=httpx.ASGITransport(apps[person])) as browser:
                    place = (await browser.get("/login/oidc")).headers["location"]
                    cookies = dict(browser.cookies)
                answer = issuer.approve(place)
                clients = [client(transport=httpx.ASGITransport(apps[n % 2]), cookies=cookies) for n in range(4)]
                waiting += [one.get("/login/callback", params=answer) for one in clients]
            return await asyncio.gather(*waiting)

        answers = asyncio.run(race())
        places = sorted(one.headers["location"] for one in answers)
        assert places == ["/", "/", *["/login?problem=oidc"] * 6]
        assert [user.name for user in hosts[0].services.records.find(User)] == ["ada"]
        assert len(hosts[0].services.records.find(Session)) == 2
        for home in hosts:
            home.close()


# --------------------------------------------------------------------------- who may do what


def test_two_owners_who_end_each_other_leave_one(homes: Homes) -> None:
    left, right = homes
    owners(left, "ada", "bob")
    for _ in range(5):
        ada = as_user(left, "ada", "user.disable", name="bob")
        bob = as_user(right, "bob", "user.disable", name="ada")
        assert len(of_type(at_once([ada, bob]), ConflictError)) == 1
        gone = [user.name for user in left.services.records.find(User) if user.disabled_at is not None]
        assert len(gone) == 1
        left.call("user.enable", {"name": gone[0]})
        ada = as_user(left, "ada", "role.revoke", who="bob", role="owner")
        bob = as_user(right, "bob", "role.revoke", who="ada", role="owner")
        assert len(of_type(at_once([ada, bob]), ConflictError)) == 1
        assert len(left.services.records.find(RoleBinding, {"role": "owner"})) == 1
        owners(left, *({"ada", "bob"} - {one.principal[5:] for one in left.services.records.find(RoleBinding)}))


def test_a_role_that_was_deleted_or_changed_meanwhile_is_not_given(homes: Homes) -> None:
    left, right = homes
    left.call("user.create", {"name": "ada"})
    owners(left, "olga")
    left.call("role.grant", {"who": "ada", "role": "maintainer"})
    give = as_user(right, "ada", "role.grant", who="ada", role="reader", project="digits")
    left.call("role.create", {"name": "reader", "allow": "run.list"})
    with pytest.raises(InputError):
        behind(left, give, lambda transaction: transaction.delete(Role, "reader")).result()
    assert not left.services.records.find(RoleBinding, {"role": "reader"}), "who makes it again gives it to nobody"
    left.call("role.create", {"name": "reader", "allow": "run.list"})
    give = as_user(right, "olga", "token.create", name="t", scope="reader")
    with pytest.raises(InputError):
        behind(left, give, lambda transaction: transaction.delete(Role, "reader")).result()


def test_tokens_are_one_of_a_name_and_revoked_everywhere_at_once(homes: Homes) -> None:
    left, right = homes
    made = at_once([partial(homes[n % 2].call, "token.create", {"name": "t", "scope": "viewer"}) for n in range(8)])
    assert len(of_type(made, ConflictError)) == 7
    created = next(one for one in made if not isinstance(one, MillraceError))
    looks: list[Callable[[], Any]] = [partial(authenticate, homes[n % 2].services, created.secret) for n in range(16)]
    at_once([*looks, partial(left.call, "token.revoke", {"name": "t"})])
    with pytest.raises(UnauthenticatedError, match="revoked"):  # the note of its use has not undone it
        authenticate(right.services, created.secret)
    assert len(left.services.records.find(Token, {"name": "t"})) == 1


def test_serving_processes_are_told_the_same_by_both_stores(tmp_path: Path) -> None:
    told = []
    for store, new_place in STORES.items():
        (tmp_path / store).mkdir()
        records = open_place(new_place(tmp_path / store))
        services = open_services(str(tmp_path / store))
        services._made["records"] = records
        for number in range(40):
            name, other = f"u{number % 7}", ("viewer", "operator", "strange", "Ärger")[number % 4]
            at = float(number)
            ended = None if number % 11 else 5.0
            records.put(User(id=name, name=name, groups=("staff", "é")[: number % 3], disabled_at=ended, created_at=at))
            for who in (f"user:{name}", "group:staff", "group:é"):
                where, id = ("*", "digits", "b-c", "b_c")[number % 4], f"{who}|{number % 4}"
                records.put(RoleBinding(id=id, principal=who, role=other, where=where, created_at=at))
            records.put(Role(id="strange", allow=("endpoint.*",), deny=("run.*",), created_at=at))
            records.put(Token(id=f"{number:x}-{number % 3}", name=f"t{number}", prefix="mr_", scopes=("operator:a",) * (
                number % 2), user_name=name if number % 3 else "", revoked_at=None if number % 5 else 1.0,
                expires_at=None if number % 6 else 9e9 * (number % 4), created_at=at))  # fmt: skip
        told.append(living_callers(services))
        services.close()
    assert told[0] == told[1]
    assert len(told[0]) > 10


def test_an_approval_is_used_once_and_nobody_counts_twice(homes: Homes) -> None:
    left = homes[0]
    version = ModelVersion(id="m1", name="m", number=1, bundle=Artifact(digest="sha256:" + "0" * 64, size_bytes=1,
                           media_type="x/y"))  # fmt: skip
    left.services.records.put(version)

    def agree(home: Dispatcher, who: str, id: str) -> Any:
        with acting_as(Principal(id=f"user:{who}", grants=(Grant(role="owner"),))):
            return home.call("approval.approve", {"name": id})

    for needed, people, fails in ((1, ["b", "c", "b", "c"], 3), (3, ["b", "c", "b", "c"], 2)):
        left.call("approval_rule.set", {"in_project": "default", "needed": needed})
        asked = at_once([partial(ask, homes[n % 2]) for n in range(4)])
        (id,) = {one.details["approval"] for one in asked}
        found = at_once([partial(agree, homes[n % 2], who, id) for n, who in enumerate(people)])
        assert len(of_type(found, ConflictError)) == fails, found
    alias = left.services.records.get(Alias, "m/champion")
    assert alias is not None
    assert len(alias.history) == 1, "the second one waits for a third person"


def ask(home: Dispatcher) -> Any:
    with acting_as(Principal(id="user:a", grants=(Grant(role="owner"),))):
        return home.call("model.promote", {"model": "m@1"})


def test_quotas_hold_for_those_who_come_at_once(homes: Homes, tmp_path: Path) -> None:
    left = homes[0]
    left.call("quota.set", {"in_project": "default", "runs": 3, "storage": "100KB"})
    begun = at_once([partial(homes[n % 2].call, "run.track", {"name": "r"}) for n in range(16)])
    assert (len(of_type(begun, Run)), len(of_type(begun, QuotaError))) == (3, 13)
    run, keep = of_type(begun, Run)[0].id, []
    for number in range(16):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes([number]) * 30_000)
        keep.append(partial(left.call, "run.artifact", {"run": run, "name": path.stem, "path": str(path)}))
    assert len(of_type(at_once(keep), QuotaError)) == 13
