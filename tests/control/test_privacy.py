"""Everything about somebody, and erasing it: nothing is missed, nobody else is met, the chain verifies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.control import privacy
from millrace.control.backup_making import Options, make_backup
from millrace.control.backup_restoring import Target, restore_backup
from millrace.control.dispatch import Dispatcher
from millrace.control.heads import sign_now
from millrace.control.keys import mark_subject
from millrace.control.privacy import _Person
from millrace.control.services import Services
from millrace.core.errors import InputError, NotFoundError
from millrace.core.types import Approval, DataKey, DatasetVersion, Event, RoleBinding, Run, Session, Token, User
from millrace.store.backup_place import FolderPlace
from millrace.store.backup_vault import Manifest, Vault
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records
from millrace.testing.postgres import new_records_url
from millrace.wiring import open_dispatcher, open_services

pytestmark = pytest.mark.xdist_group("postgres")
CANARY = "$argon2id$canary"


def event(actor: str, subject: str, detail: dict[str, Any]) -> Event:
    return Event(at=5.0, actor=actor, verb="run.end", subject=subject, detail=detail)


@pytest.fixture(params=["sqlite", "postgres"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Dispatcher]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "postgres":
            patch.setenv("MILLRACE_RECORDS_URL", new_records_url())
        dispatcher = open_dispatcher(str(tmp_path / "home"))
    with dispatcher.services.records.transaction() as transaction:
        for record in (
            User(id="ada", name="ada", password=CANARY, email="Ada@Example.org", external="https://idp|sub-17",
                 totp=CANARY, groups=("ml",)),
            User(id="adam", name="adam", password=CANARY, email="adam@example.org"),
            Token(id="c" * 64, name="laptop", prefix="mr_abcdef", scopes=("viewer",), user_name="ada"),
            Token(id="d" * 64, name="other", prefix="mr_ghijkl", scopes=("viewer",), user_name="adam"),
            Session(id="e" * 64, user_name="ada", csrf=CANARY, used_at=1.0, expires_at=2.0),
            RoleBinding(id="b1", principal="user:ada", role="developer"),
            RoleBinding(id="b2", principal="user:adam", role="viewer"),
            Run(id="r1", name="one", created_by="user:ada"),
            Run(id="r2", name="two", created_by="user:adam", facts={"place": "Canada"}),
            Run(id="r3", name="by hand", spec_text="owner: ada"),
            Approval(id="a1", model="m", alias="champion", number=1, asked_by="user:adam", approved_by=("user:ada",)),
        ):  # fmt: skip
            transaction.put(record)
        transaction.log("r2", tags={"reviewer": "ada", "country": "Canada"})
        transaction.append(event("user:ada", "run:r1", {"request": {"n": 1}}))
        transaction.append(event("user:adam", "user:ada", {"request": {"mail": "x"}}))
        transaction.append(event("user:adam", "run:r1", {"request": {"to": ["mail ada@example.org now"]}}))
        transaction.append(event("user:adam", "run:r1", {"request": {"params": {"ada": 1}}}))
        transaction.append(event("user:adam", "run:r1", {"request": {"note": 'sub-17 said "no"'}}))
        transaction.append(event("user:adam", "run:r2", {"request": {"place": "Canada", "who": "adam"}}))
    dispatcher.services.records.seal()
    sign_now(dispatcher.services)
    yield dispatcher
    dispatcher.close()


@pytest.mark.parametrize("subject", ["ada", "user:ada", "Ada@Example.org"])
def test_everything_about_somebody_is_exported_and_nobody_else_and_no_secret(home: Dispatcher, subject: str) -> None:
    found = home.call("audit.export_subject", {"subject": subject})
    assert (found.subject, found.names) == ("ada", ["Ada@Example.org", "ada", "sub-17"])
    assert found.user["email"] == "Ada@Example.org"
    assert [one["seq"] for one in found.events] == [1, 2, 3, 4, 5]
    ids = {kind: [one.get("id", one.get("name", "")) for one in records] for kind, records in found.records.items()}
    assert ids == {
        "user": ["ada"], "token": ["laptop"], "session": [""], "role_binding": ["b1"], "run": ["r1", "r3"],
        "approval": ["a1"],
    }  # fmt: skip
    assert found.run_values == [{"run": "r2", "key": "reviewer", "value": "ada"}]
    text = msgspec.json.encode(found).decode()
    assert CANARY not in text
    assert "c" * 64 not in text
    assert "e" * 64 not in text
    home.services.records.seal()
    (said,) = home.call("audit.search", {"verb": "audit.export_subject"})
    assert "ada" not in json.dumps([said.detail, said.subject])


def test_an_erasure_is_only_counted_until_it_is_wanted(home: Dispatcher) -> None:
    asked = home.call("audit.erase_subject", {"subject": "ada"})
    assert (asked.applied, asked.details) == (False, 3)
    assert asked.records == {"approval": 1, "role_binding": 1, "run": 1, "session": 1, "token": 1, "user": 1}
    assert home.services.records.get(User, "ada") is not None
    assert home.call("audit.verify", {}).erased == 0


def test_somebody_is_erased_and_the_chain_verifies_and_says_so(home: Dispatcher) -> None:
    seen: list[str] = []
    done_names = ["Ada@Example.org", "ada", "sub-17"]
    privacy.SUBJECT_ERASERS.append(lambda _, name: (seen.append(name), {"keys": 2})[1])
    try:
        done = home.call("audit.erase_subject", {"subject": "ada", "apply": True})
    finally:
        privacy.SUBJECT_ERASERS.pop()
    assert (done.applied, done.details, seen, done.data) == (True, 3, done_names, {"keys": 6})
    assert done.left == {"run": ["r3"]}, "what people wrote is named"
    records = home.services.records
    assert records.get(User, "ada") is None
    left = records.get(User, done.pseudonym)
    assert left is not None
    assert (left.email, left.password, left.external, left.totp, left.groups) == ("", "", "", "", ())
    assert left.disabled_at is not None
    run, other = records.get(Run, "r1"), records.get(Run, "r2")
    assert run is not None
    assert other is not None
    assert (run.created_by, other.created_by) == (f"user:{done.pseudonym}", "user:adam")
    approval = records.get(Approval, "a1")
    assert approval is not None
    assert (approval.asked_by, approval.approved_by) == ("user:adam", (f"user:{done.pseudonym}",))
    assert [one.name for one in records.find(Token)] == ["other"]
    assert [one.id for one in records.find(RoleBinding)] == ["b2"]
    assert records.find(Session) == []
    report = home.call("audit.verify", {})
    assert (report.is_whole, report.erased) == (True, 3)
    (said,) = home.call("audit.search", {"verb": "audit.erased"})
    assert said.subject == f"user:{done.pseudonym}"
    assert said.detail["erased"] == [[3, 5]]
    assert "ada" not in json.dumps(said.detail)
    events = home.call("audit.export_subject", {"subject": "ada"}).events
    assert [one["seq"] for one in events] == [1, 2], "rows of the chain stay"


def test_an_erasure_that_finds_no_detail_is_an_event_too(home: Dispatcher) -> None:
    done = home.call("audit.erase_subject", {"subject": "nobody@example.net", "apply": True})
    assert (done.details, done.records) == (0, {})
    (said,) = home.call("audit.search", {"verb": "audit.erased"})
    assert said.detail["erased"] == []
    assert home.call("audit.verify", {}).is_whole


def test_nobody_has_no_name(home: Dispatcher) -> None:
    with pytest.raises(InputError, match="somebody's name"):
        home.call("audit.export_subject", {"subject": " "})


# --------------------------------------------------------------------------- blobs


class Clinic:
    """A home that encrypts, with data of two people."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dispatcher = open_dispatcher(str(folder))
        self.services = self.dispatcher.services
        self.blobs = self.services.blobs

    def keep(self, name: str, data: bytes, subject: str) -> str:
        artifact = self.blobs.put(data)
        mark_subject(self.services, artifact, subject)
        self.services.records.put(DatasetVersion(id=f"{name}/1", name=name, number=1, artifact=artifact))
        return artifact.digest


@pytest.fixture
def clinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clinic]:
    monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", f"file:{tmp_path}/kek.json")
    made = Clinic(tmp_path / "home")
    yield made
    made.dispatcher.close()


def test_the_blobs_of_somebody_cannot_be_read_after_an_erasure_and_those_of_others_can(clinic: Clinic) -> None:
    scan = clinic.keep("scan", b"the scan of 4711", "patient-4711")
    other = clinic.keep("other", b"the scan of 4712", "patient-4712")
    plain = clinic.blobs.put(b"of nobody").digest
    assert clinic.blobs.path(scan).read_bytes() == b"the scan of 4711"  # also in the cache of plain copies
    records = clinic.services.records
    key = records.get(DataKey, scan)
    assert key is not None
    asked = clinic.dispatcher.call("audit.erase_subject", {"subject": "patient-4711"})
    assert (asked.applied, asked.data) == (False, {"blobs": 1})
    assert clinic.blobs.read(scan) == b"the scan of 4711"
    done = clinic.dispatcher.call("audit.erase_subject", {"subject": "patient-4711", "apply": True})
    assert (done.applied, done.data, done.left) == (True, {"blobs": 1}, {})
    with pytest.raises(NotFoundError, match="erased"):
        clinic.blobs.read(scan)
    assert clinic.blobs.read(other) == b"the scan of 4712"
    assert clinic.blobs.read(plain) == b"of nobody"
    assert clinic.dispatcher.call("audit.verify", {}).is_whole
    found = clinic.dispatcher.call("audit.export_subject", {"subject": "patient-4711"})
    assert (found.events, found.records, found.run_values) == ([], {}, [])
    (said,) = clinic.dispatcher.call("audit.search", {"verb": "audit.erased"})
    assert said.detail["data"] == {"blobs": 1}
    assert "patient" not in json.dumps([said.subject, said.detail])
    for path in clinic.folder.rglob("*"):  # the log of the records included
        data = path.read_bytes() if path.is_file() else b""
        assert b"the scan of 4711" not in data, path
        assert key.wrapped.encode() not in data, path
        assert b"patient-4711" not in data, path


def test_the_keys_verb_leaves_no_trace_of_the_key_either(clinic: Clinic) -> None:
    scan = clinic.keep("scan", b"the scan of 4711", "patient-4711")
    key = clinic.services.records.get(DataKey, scan)
    assert key is not None
    assert clinic.dispatcher.call("key.erase", {"subject": "patient-4711"}).blobs == 1
    assert not any(key.wrapped.encode() in one.read_bytes() for one in clinic.folder.glob("records.db*"))


def test_a_backup_from_before_brings_it_back_until_the_old_key_of_keys_is_dropped(
    clinic: Clinic, tmp_path: Path
) -> None:
    scan = clinic.keep("scan", b"the scan of 4711", "patient-4711")
    other = clinic.keep("other", b"the scan of 4712", "patient-4712")
    vault = Vault(FolderPlace(tmp_path / "to"), None)
    before = make_backup(clinic.services, vault, Options()).manifest
    clinic.dispatcher.call("audit.erase_subject", {"subject": "patient-4711", "apply": True})
    after = make_backup(clinic.services, vault, Options()).manifest

    def restored(name: str, manifest: Manifest) -> Services:
        home = tmp_path / name
        target = Target(home, lambda: open_records(home / "records.db"), LocalBlobs(home / "blobs"))
        restore_backup(vault, manifest, target, clinic.services.clock)
        return open_services(str(home))

    old = restored("old", before)
    assert old.blobs.read(scan) == b"the scan of 4711"
    old.close()
    new = restored("new", after)
    with pytest.raises(NotFoundError, match="erased"):
        new.blobs.read(scan)
    assert new.blobs.read(other) == b"the scan of 4712"
    new.close()
    (first,) = clinic.dispatcher.call("key.list", {})
    clinic.dispatcher.call("key.rotate", {})
    clinic.dispatcher.call("key.drop", {"name": first.id})
    assert clinic.blobs.read(other) == b"the scan of 4712"
    late = restored("late", before)
    with pytest.raises(InputError, match="encrypted under"):
        _ = late.blobs
    late.close()


class _NoRecords:
    """There are no users."""

    def find(self, *_: Any) -> list[Any]:
        return []


WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)


@given(WORDS, WORDS, st.sampled_from([" ", ", ", "/", "@", '"', "\n"]))
def test_a_name_is_found_as_a_word_whatever_stands_around_it(name: str, other: str, between: str) -> None:
    person = _Person(_NoRecords(), name)  # type: ignore[arg-type]
    assert person.is_named(f"{other}{between}{name}{between}{other}")
    assert person.is_named_in({"request": {"a": [f"{name}"]}}, fields=2)
    assert person.is_named_in({"request": {"b": {name: 1}}}, fields=2)
    assert not person.is_named(f"{other}{name}")
    assert not person.is_named(f"{name}{other}")
