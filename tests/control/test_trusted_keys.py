"""Trusted keys: added, within their times, revoked; and every verb that opens a model asks."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.control.authorisation import acting_as
from millrace.control.commits import commit_model, prepare_register
from millrace.control.deployments import Reconciler
from millrace.control.dispatch import Dispatcher
from millrace.control.heads import sign_now
from millrace.control.models import resolve_model
from millrace.control.trust import publish_key, published_key, refusal_of
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError, UntrustedError
from millrace.core.facts import GateFacts, RegisterFacts
from millrace.core.principals import Grant, Principal
from millrace.core.spec import Data, Register, Spec
from millrace.core.types import Endpoint, Run, Step, TrustedKey
from millrace.security.signing import HomeSigner
from millrace.store.leases import acquire
from millrace.testing.graphs import write_scaler
from millrace.wiring import open_dispatcher, open_transport


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


@pytest.fixture
def partner(tmp_path: Path) -> HomeSigner:
    return HomeSigner(tmp_path / "partner")


def add(home: Dispatcher, key: HomeSigner, **more: str) -> str:
    return home.call("trusted_key.add", {"pem": key.public_key().decode(), **more}).id


def register(home: Dispatcher, folder: Path, signer: HomeSigner | None = None) -> None:
    """The model `m`; signed by somebody else, as if it had come from another home."""
    write_scaler(folder / "m.onnx")
    home.call("model.register", {"path": str(folder / "m.onnx")})
    if signer is not None:
        version = resolve_model(home.services, "m")
        proof = home.services.blobs.put(signer.sign(version.bundle.digest), media_type="application/json")
        changed = msgspec.structs.replace(version, signature=proof)
        home.services.records.put(changed, expect_version=version.version)


def doors(home: Dispatcher, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Whatever opens a registered model."""
    spec = Spec(project="m", data=Data(source="x.csv", label="y"), register=Register(model="m"))
    return {
        "open": lambda: home.call("model.open", {"model": "m"}),
        "export": lambda: home.call("model.export", {"model": "m", "to": str(tmp_path / "exported")}),
        "deploy": lambda: home.call("endpoint.deploy", {"model": "m", "endpoint": "e"}),
        "serve": lambda: list(home.stream("endpoint.serve", {"model": "m", "port": 0})),
        "champion of a run": lambda: prepare_register(home.services, spec, {}, {}),
    }


def all_refuse(home: Dispatcher, tmp_path: Path, says: str) -> None:
    for door, use in doors(home, tmp_path).items():
        with pytest.raises(UntrustedError, match=says) as refused:
            use()
        assert refused.value.code == "artifact.untrusted", door
    assert not (tmp_path / "exported").exists()
    assert home.services.records.find(Endpoint) == []


def test_an_altered_bundle_signed_by_a_stranger_is_refused_by_every_door(
    home: Dispatcher, tmp_path: Path, partner: HomeSigner
) -> None:
    register(home, tmp_path, partner)
    all_refuse(home, tmp_path, "not trusted here")
    add(home, partner)
    assert home.call("model.open", {"model": "m"}).number == 1


def test_a_revoked_key_is_refused_by_every_door(home: Dispatcher, tmp_path: Path, partner: HomeSigner) -> None:
    register(home, tmp_path, partner)
    key = add(home, partner)
    assert home.call("model.open", {"model": "m"}).number == 1
    assert home.call("trusted_key.revoke", {"key": key}).state == "revoked"
    all_refuse(home, tmp_path, "was revoked on")
    with pytest.raises(ConflictError, match="for ever"):
        add(home, partner)
    first = home.services.records.get(TrustedKey, key)
    home.call("trusted_key.revoke", {"key": key})
    assert home.services.records.get(TrustedKey, key) == first, "once is once"
    home.call("model.register", {"path": str(tmp_path / "m.onnx"), "name": "again"})
    assert home.call("model.open", {"model": "again"}).number == 1


def test_the_records_are_stronger_than_a_file(home: Dispatcher, tmp_path: Path, partner: HomeSigner) -> None:
    place = tmp_path / "home/keys/trusted/partner.pub"
    place.parent.mkdir(parents=True)
    place.write_bytes(partner.public_key())
    register(home, tmp_path, partner)
    (view,) = [one for one in home.call("trusted_key.list", {}) if one.where.startswith("trusted/")]
    assert (view.id, view.state, view.where) == (partner.key_id, "valid", "trusted/partner.pub")
    home.call("trusted_key.revoke", {"key": partner.key_id})
    all_refuse(home, tmp_path, "was revoked on")
    place.unlink()
    assert published_key(home.services.records, partner.key_id) is None
    all_refuse(home, tmp_path, "was revoked on")
    with pytest.raises(UntrustedError, match="was revoked on"):  # not "add it", which would be refused
        home.call("model.open", {"model": "m"})


def test_what_a_revoked_key_has_signed_is_registered_again_by_its_spec(
    home: Dispatcher, tmp_path: Path, partner: HomeSigner
) -> None:
    """No step is reused whose signature counts no more; equal bytes are signed again, and open."""
    register(home, tmp_path, partner)
    key, services = add(home, partner), home.services
    version = resolve_model(services, "m")
    assert version.signature is not None
    spec = Spec(project="m", data=Data(source="x.csv", label="y"), register=Register(model="m", alias="next"))
    facts = RegisterFacts(model="m", gate=GateFacts(verdict="first"))
    step = Step(
        id="1", project=version.project, run_id="r", name="register", stage="register", state="succeeded",
        key_parts={"model": "m", "champion": "none"}, facts=msgspec.to_builtins(facts),
        outputs={"bundle": version.bundle, "signature": version.signature},
    )  # fmt: skip
    services.records.put(step, expect_version=0)
    assert prepare_register(services, spec, {}, {}).reuse is not None
    home.call("trusted_key.revoke", {"key": key})
    with pytest.raises(KeyError, match="data"):  # on to the work itself, which wants the steps before
        prepare_register(services, spec, {}, {})
    with pytest.raises(UntrustedError) as refused:
        prepare_register(services, msgspec.structs.replace(spec, register=Register(model="m")), {}, {})
    assert "--set register.alias=next" in refused.value.hint
    with services.records.transaction() as transaction:
        commit_model(services, transaction, Run(id="r", project=version.project, name="m"), spec, step)
    assert home.call("model.open", {"model": "m@next"}).number == version.number


@pytest.mark.parametrize(("times", "state", "says"), [
    ({"not_before": "2999-01-01"}, "not yet valid", "not valid before 2999-01-01"),
    ({"not_after": "2001-01-01T12:00"}, "expired", "was valid until 2001-01-01T12:00"),
    ({"not_before": "2001-01-01", "not_after": "2999-01-01"}, "valid", ""),
])  # fmt: skip
def test_a_key_counts_within_its_times(
    home: Dispatcher, tmp_path: Path, partner: HomeSigner, times: dict[str, str], state: str, says: str
) -> None:
    register(home, tmp_path, partner)
    add(home, partner, **times)
    assert [one.state for one in home.call("trusted_key.list", {}) if one.where == "records"] == [state]
    if says:
        all_refuse(home, tmp_path, says)
    else:
        assert home.call("model.open", {"model": "m"}).number == 1


def test_the_end_of_its_time_is_exact(home: Dispatcher, partner: HomeSigner) -> None:
    add(home, partner, not_before="2027-01-01T00:00:00+01:00", not_after="2027-01-02")
    first, last = datetime(2026, 12, 31, 23, tzinfo=UTC).timestamp(), datetime(2027, 1, 2, tzinfo=UTC).timestamp()
    found = [refusal_of(home.services.records, now, partner.key_id) for now in (first - 1, first, last - 1, last)]
    assert [refusal is None for refusal in found] == [False, True, True, False]


@pytest.mark.parametrize("body", [
    {"pem": "nonsense"}, {"pem": "x" * 5000}, {"not_before": "soon"}, {"not_after": "2027-13-01"}, {"name": "a\nb"},
    {"not_before": "2027-01-02", "not_after": "2027-01-02"}, {"name": "x" * 200},
])  # fmt: skip
def test_what_cannot_be_a_trusted_key_is_refused(home: Dispatcher, partner: HomeSigner, body: dict[str, str]) -> None:
    with pytest.raises(InputError):
        add(home, partner) if not body else home.call("trusted_key.add", {"pem": partner.public_key().decode(), **body})
    assert home.services.records.find(TrustedKey) == []


def test_an_unknown_key_cannot_be_revoked(home: Dispatcher) -> None:
    with pytest.raises(NotFoundError, match="no key"):
        home.call("trusted_key.revoke", {"key": "ed25519:00"})


def test_owners_alone_change_keys(home: Dispatcher, partner: HomeSigner) -> None:
    for role in ("maintainer", "developer", "operator", "viewer"):
        for where in ("*", "mine"):
            with acting_as(Principal(id="user:x", grants=(Grant(role=role, where=where),))):
                for verb, body in (
                    ("add", {"pem": partner.public_key().decode()}), ("revoke", {"key": partner.key_id}), ("list", {}),
                ):  # fmt: skip
                    with pytest.raises(DeniedError):
                        home.call(f"trusted_key.{verb}", body)
    with acting_as(Principal(id="user:o", grants=(Grant(role="owner", where="mine"),))), pytest.raises(DeniedError):
        home.call("trusted_key.add", {"pem": partner.public_key().decode()})
    assert home.services.records.find(TrustedKey) == []


def test_events_name_the_key_and_never_what_was_pasted(home: Dispatcher, tmp_path: Path, partner: HomeSigner) -> None:
    key = add(home, partner, name="the partner")
    private = (tmp_path / "partner/keys/signing.key").read_text()
    with pytest.raises(InputError):
        home.call("trusted_key.add", {"pem": private})
    home.call("trusted_key.revoke", {"key": key})
    home.services.records.seal()
    events = [one for one in home.services.records.events(0) if one.verb.startswith("trusted_key.")]
    assert [(one.verb, one.subject) for one in events] == [
        ("trusted_key.add", f"trusted_key:{key}"), ("trusted_key.revoke", f"trusted_key:{key}"),
    ]  # fmt: skip
    secret = private.splitlines()[1]
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file())


def test_old_heads_stay_proven_by_the_new_key(home: Dispatcher, tmp_path: Path) -> None:
    """A head that a later signed one names needs no signature of its own that counts."""
    home.call("project.create", {"name": "one"})
    home.services.records.seal()
    sign_now(home.services)
    before = home.call("audit.verify", {})
    assert before.is_whole
    (old,) = before.keys
    home.call("trusted_key.revoke", {"key": old})
    home.services.records.seal()
    broken = home.call("audit.verify", {})
    assert [one.problem for one in broken.breaks] == ["signature"]
    assert "was revoked on" in broken.breaks[0].explanation
    with pytest.raises(UntrustedError, match="own key") as refused:
        sign_now(home.services)
    source, target = re.findall("`mv (.+) (.+)`", refused.value.hint)[0]
    Path(source).rename(target)
    home.services.records.seal()
    sign_now(home.services)
    after = home.call("audit.verify", {})
    assert after.is_whole
    assert after.heads == 2
    assert old not in after.keys


def test_a_home_on_shared_records_is_not_published_again_after_it_was_revoked(home: Dispatcher) -> None:
    records, clock = home.services.records, home.services.clock
    publish_key(records, clock, "/other", "ed25519:1", b"PEM")
    published = records.get(TrustedKey, "ed25519:1")
    assert published is not None
    records.put(msgspec.structs.replace(published, revoked_at=1.0), expect_version=1)
    publish_key(records, clock, "/other", "ed25519:1", b"PEM")
    assert refusal_of(records, 2.0, "ed25519:1") == "was revoked on 1970-01-01"


def test_what_is_served_is_let_go_in_the_round_after_its_key_was_revoked(
    home: Dispatcher, tmp_path: Path, partner: HomeSigner
) -> None:
    """Every round asks again: no restart, no new deployment."""
    register(home, tmp_path, partner)
    key = add(home, partner)
    home.call("endpoint.deploy", {"model": "m", "endpoint": "e"})
    lease = acquire(home.services.records, "leader", home.services.clock, 60.0)
    assert lease is not None
    reconciler = Reconciler(home.services)
    try:
        for _ in range(200):
            reconciler(lease)
            if home.call("endpoint.get", {"name": "e"}).state == "ready":
                break
            home.services.clock.sleep(0.05)
        assert home.call("endpoint.get", {"name": "e"}).state == "ready"
        home.call("trusted_key.revoke", {"key": key})
        reconciler(lease)
        endpoint = home.call("endpoint.get", {"name": "e"})
        assert (endpoint.state, endpoint.url) == ("failed", None)
        assert "was revoked on" in endpoint.text
    finally:
        reconciler.close()


def test_a_server_in_the_foreground_asks_again_when_it_starts_its_process_again(
    home: Dispatcher, tmp_path: Path, partner: HomeSigner
) -> None:
    register(home, tmp_path, partner)
    key = add(home, partner)
    events = home.stream("endpoint.serve", {"model": "m", "port": 0})
    ready = next(iter(events))
    home.call("trusted_key.revoke", {"key": key})
    os.kill(ready.facts["pid"], signal.SIGKILL)
    with pytest.raises(UntrustedError, match="was revoked on"):
        list(events)


def command(home: Path, *arguments: str, given: str = "") -> tuple[int, str, str]:
    words = ["--home", str(home), "trusted-keys", *arguments]
    done = CliRunner().invoke(cli, words, obj=Session(open_transport), prog_name="millrace", input=given)
    return done.exit_code, done.stdout, done.stderr


def test_by_command(tmp_path: Path, partner: HomeSigner) -> None:
    home, pub = tmp_path / "home", tmp_path / "partner/keys/signing.pub"
    id = partner.key_id
    code, out, _ = command(home, "add", str(pub), "--name", "the partner", "--not-after", "2999-12-31", "--json")
    assert code == 0
    assert json.loads(out)["id"] == id
    code, out, _ = command(home)
    assert (code, id in out, "2999-12-31" in out) == (0, True, True)
    code, _, err = command(home, "add", "-", given=pub.read_text())
    assert (code, "is here already" in err) == (4, True)
    code, out, _ = command(home, "revoke", id)
    assert (code, "revoked" in out) == (0, True)
    code, _, err = command(home, "add", str(pub.with_name("signing.key")))
    assert (code, "private key" in err) == (2, True)
    assert command(home, "add", str(tmp_path / "gone"))[0] == 3
    (tmp_path / "big").write_bytes(b"x" * 5000)
    assert command(home, "add", str(tmp_path / "big"))[0] == 2
