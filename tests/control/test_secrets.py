"""Secrets and keys as operations: set, rotate, list, delete; numbers in cache keys; erasing; what others may."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import millrace
from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.client.track import Tracker
from millrace.compute.link import Order
from millrace.control.authorisation import acting_as
from millrace.control.dispatch import Dispatcher
from millrace.control.garbage import collect
from millrace.control.keys import mark_subject
from millrace.control.secrets import names_of, open_values
from millrace.core.errors import ConflictError, CorruptError, DeniedError, InputError, NotFoundError
from millrace.core.operations.secrets import SecretSet
from millrace.core.ports import Work
from millrace.core.principals import Grant, Principal
from millrace.core.redaction import Redactor
from millrace.core.spec import Data, Spec, StepSpec
from millrace.core.types import DataKey, Run, Secret, Step, WorkFrame, WorkItem
from millrace.store.blobs_encrypted import EncryptedBlobs
from millrace.store.leases import LeaseKeeper, acquire
from millrace.wiring import open_dispatcher, open_transport

VALUE = "correct-horse-battery"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    """A home with encrypted blobs."""
    monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", f"file:{tmp_path}/kek.json")
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


def put(home: Dispatcher, name: str = "TOKEN", value: str = VALUE, project: str = "p") -> int:
    return home.call("secret.set", {"name": name, "value": value, "in_project": project}).number


# --------------------------------------------------------------------------- secrets


def test_a_value_is_kept_sealed_and_never_shown(home: Dispatcher, tmp_path: Path) -> None:
    put(home)
    (view,) = home.call("secret.list", {})
    assert (view.name, view.project) == ("TOKEN", "p")
    assert open_values(home.services, "p", ["TOKEN"]) == {"TOKEN": VALUE}
    home.services.records.seal()
    events = home.services.records.events()
    assert [event.detail["request"]["value"] for event in events if event.verb == "secret.set"] == ["…"]
    home.close()
    found = [one for one in tmp_path.rglob("*") if one.is_file() and VALUE.encode() in one.read_bytes()]
    assert found == []
    assert (tmp_path / "home/keys/kek.json").stat().st_mode & 0o777 == 0o600


def test_numbers_grow_also_over_a_deletion(home: Dispatcher) -> None:
    numbers = [put(home), put(home, value=VALUE + "2")]
    numbers.append(home.call("secret.rotate", {"name": "TOKEN", "value": VALUE + "3", "in_project": "p"}).number)
    assert numbers == sorted(set(numbers))
    assert open_values(home.services, "p", ["TOKEN"]) == {"TOKEN": VALUE + "3"}
    home.call("secret.delete", {"name": "TOKEN", "in_project": "p"})
    for call in ("secret.rotate", "secret.delete"):
        body = {"name": "TOKEN", "in_project": "p", **({"value": VALUE} if call == "secret.rotate" else {})}
        with pytest.raises(NotFoundError, match="no secret 'TOKEN'"):
            home.call(call, body)


@pytest.mark.parametrize(
    "name", ["", "a-b", "1A", "PATH", "path", "LD_PRELOAD", "PYTHONPATH", "MILLRACE_X", "A" * 65, "é"]
)
def test_names_that_are_none_are_refused(home: Dispatcher, name: str) -> None:
    with pytest.raises(InputError, match="name"):
        put(home, name)


@pytest.mark.parametrize("value", ["", "short", "     \n", "with\0nul-inside", "x" * 20_000, "\ud800" * 8])
def test_values_that_are_none_are_refused_and_not_shown(home: Dispatcher, value: str) -> None:
    with pytest.raises(InputError) as raised:
        put(home, value=value)
    assert not value.strip() or value not in f"{raised.value} {raised.value.hint}"


def test_records_that_are_swapped_do_not_open(home: Dispatcher) -> None:
    put(home, "ONE")
    put(home, "TWO", "another value")
    records = home.services.records
    one, two = records.get(Secret, "p/ONE"), records.get(Secret, "p/TWO")
    assert one is not None
    assert two is not None
    records.put(Secret(**{**{f: getattr(one, f) for f in one.__struct_fields__}, "sealed": two.sealed}))
    with pytest.raises(CorruptError):
        open_values(home.services, "p", ["ONE"])


def test_projects_are_apart(home: Dispatcher) -> None:
    put(home, project="p")
    put(home, project="q", value="of the other project")
    maintainer = Principal(id="user:ada", grants=(Grant(role="maintainer", where="p"),))
    developer = Principal(id="user:bob", grants=(Grant(role="developer", where="p"),))
    with acting_as(maintainer):
        assert [one.project for one in home.call("secret.list", {})] == ["p"]
        with pytest.raises(DeniedError):
            put(home, project="q")
        with pytest.raises(DeniedError):
            home.call("key.rotate", {})
    with acting_as(developer), pytest.raises(DeniedError):
        home.call("secret.list", {})
    with acting_as(Principal(id="user:eve", grants=(Grant(role="owner", where="p"),))):
        for call, body in (("key.rotate", {}), ("key.drop", {"name": "x"}), ("key.erase", {"subject": "x"})):
            with pytest.raises(DeniedError, match="all projects"):
                home.call(call, body)


def test_a_spec_says_which_step_gets_which() -> None:
    steps = [StepSpec(uses="a.py:f", name="a", secrets=["A"]), StepSpec(uses="a.py:f", name="a-b", secrets=["B"]),
             StepSpec(uses="a.py:f", name="m", matrix={"x": [1, 2]}, secrets=["C"])]  # fmt: skip
    spec = Spec(data=Data(source="x", label="y", secrets=["D"]), steps=steps)
    found = [names_of(spec, name, stage) for name, stage in (("a", "user"), ("a-b", "user"), ("m-1", "user"),
             ("data", "data"), ("train", "train"))]  # fmt: skip
    assert found == [("A",), ("B",), ("C",), ("D",), ()]


def test_a_step_runs_again_when_the_value_changed_and_not_before(home: Dispatcher, tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text("def use(ctx):\n    return {'size': len(ctx.secret('TOKEN'))}\n")
    (tmp_path / "millrace.yaml").write_text(
        'project: p\nsteps: [{name: use, uses: "steps.py:use", secrets: [TOKEN]}]\n'
    )

    def run() -> Step:
        submitted = home.call("run.submit", {"spec_path": str(tmp_path / "millrace.yaml")})
        list(home.stream("run.drive", {"run": submitted.run.id}))
        (step,) = home.services.records.find(Step, {"run_id": submitted.run.id})
        return step

    failed = run()
    assert failed.state == "failed"
    assert "millrace secrets set TOKEN --in-project p" in str(failed.error)
    number = put(home)
    first = run()
    assert (first.state, first.facts, first.key_parts["secret TOKEN"]) == ("succeeded", {"size": 21}, str(number))
    assert run().state == "cached"
    put(home, value=VALUE + "!")
    assert run().facts == {"size": 22}


def test_a_worker_elsewhere_is_told_when_it_claims_and_nothing_is_stored(home: Dispatcher) -> None:
    put(home)
    records, clock = home.services.records, home.services.clock
    records.put(Run(id="r", project="p", state="running", spec_path="x"))
    work = Work(step_id="s", run_id="r", name="use", implementation="m:f", spec=b"{}", project="p",
                secrets=("TOKEN", "GONE"))  # fmt: skip
    records.put(WorkItem(id="w", run_id="r", name="use", work=msgspec.to_builtins(work)))
    lease = acquire(records, "run/r", clock, 60.0)
    assert lease is not None
    with LeaseKeeper(records, lease, clock, 60.0):
        order = home.call("work.claim", {"worker": "gpu", "version": millrace.__version__})
    assert order.secrets == {"TOKEN": VALUE}
    assert VALUE not in f"{order!r} {order.work!r}"
    records.seal()
    stored = [records.find(kind) for kind in (WorkItem, WorkFrame, Run)]
    assert VALUE not in f"{stored} {records.events()}"


@given(
    st.text(st.characters(codec="utf-8"), min_size=6, max_size=30).filter(lambda text: len(text.strip()) >= 6),
    st.lists(st.integers(1, 9), max_size=20),
    st.binary(max_size=20),
)
def test_a_stream_hides_a_value_however_it_is_cut(value: str, cuts: list[int], other: bytes) -> None:
    hide = Redactor([value])
    data = other + value.encode() * 2 + b"\n" + json.dumps([value]).encode() + base64.b64encode(value.encode())
    stream, rest, out = hide.stream(), io.BytesIO(data), b""
    for cut in cuts:
        out += stream.feed(rest.read(cut))
    out += stream.feed(rest.read()) + stream.end()
    assert value.encode() not in out
    assert b"***" in out


def test_the_command_reads_a_pipe_or_a_file_and_takes_no_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path / "home"))

    def invoke(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
        done = CliRunner().invoke(cli, list(arguments), obj=Session(open_transport), input=stdin)
        return done.exit_code, done.output

    assert invoke("secrets", "set", "A", stdin=VALUE + "\n")[0] == 0
    (tmp_path / "value").write_text("line one\nline two\n")
    assert invoke("secrets", "set", "B", "--file", str(tmp_path / "value"))[0] == 0
    code, said = invoke("secrets", "rotate", "A", "--json", stdin="another-value")
    assert code == 0
    assert "another-value" not in said
    assert invoke("secrets", "set", "A", VALUE)[0] == 2
    code, listed = invoke("secrets", "--json")
    assert [one["name"] for one in json.loads(listed)] == ["A", "B"]
    assert VALUE not in listed
    opened = open_dispatcher(str(tmp_path / "home"))
    assert open_values(opened.services, "default", ["A", "B"]) == {"A": "another-value", "B": "line one\nline two"}
    opened.close()


# --------------------------------------------------------------------------- keys


def test_rotation_rewraps_and_the_old_key_can_be_dropped(sealed: Dispatcher) -> None:
    services = sealed.services
    digests = [services.blobs.put(b"blob %d" % number).digest for number in range(20)]
    put(sealed)
    assert isinstance(services.blobs, EncryptedBlobs)
    below = {one.digest for one in services.blobs.inner.list()}
    (first,) = sealed.call("key.list", {})
    assert (first.is_current, first.blobs, first.secrets) == (True, 20, 1)
    with pytest.raises(ConflictError, match="20 blobs and 1 secrets"):
        sealed.call("key.drop", {"name": first.id})
    rotated = sealed.call("key.rotate", {})
    assert (rotated.is_new, rotated.blobs, rotated.secrets) == (True, 20, 1)
    assert sealed.call("key.drop", {"name": first.id}).id == first.id
    with pytest.raises(NotFoundError):
        sealed.call("key.drop", {"name": first.id})
    with pytest.raises(ConflictError):
        sealed.call("key.drop", {"name": rotated.current})
    assert {one.digest for one in services.blobs.inner.list()} == below
    assert [services.blobs.read(digest) for digest in digests] == [b"blob %d" % number for number in range(20)]
    assert open_values(services, "p", ["TOKEN"]) == {"TOKEN": VALUE}


def test_a_home_that_is_encrypted_wants_its_key(
    sealed: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sealed.services.blobs.put(b"x").digest
    sealed.close()
    home = str(tmp_path / "home")
    monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", f"file:{tmp_path}/other.json")
    without = open_dispatcher(home)
    with pytest.raises(NotFoundError, match="something here is encrypted"):
        without.services.blobs  # noqa: B018
    without.close()
    monkeypatch.setenv("OTHER", "00" * 32)
    monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", "env:OTHER")
    wrong = open_dispatcher(home)
    with pytest.raises(InputError, match="encrypted under"):
        wrong.services.blobs  # noqa: B018
    wrong.close()
    monkeypatch.delenv("MILLRACE_ENCRYPTION_KEY")
    plain = open_dispatcher(home)
    with pytest.raises(InputError, match="names no key"):
        plain.services.blobs  # noqa: B018
    plain.close()
    monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", f"file:{tmp_path}/kek.json")
    right = open_dispatcher(home)
    assert right.services.blobs.read(digest) == b"x"
    right.close()


def test_erasing_somebody(sealed: Dispatcher, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/scan").write_bytes(b"canary of a patient")
    tracker = Tracker(sealed, name="t", params={}, project="p")
    digest = tracker.log_artifact(tmp_path / "mine", "scans", data_subject="patient-4711")
    kept = tracker.log_artifact(tmp_path / "mine", "scans2", data_subject="patient-4711")
    tracker._stop.set()
    assert kept == digest
    services = sealed.services
    working = services.home / "scratch" / "trees" / digest.replace(":", "-")
    services.blobs.materialize(digest, working)
    (tmp_path / "mine/scan").unlink()
    assert sealed.call("key.erase", {"subject": "patient-4712"}).blobs == 0
    done = sealed.call("key.erase", {"subject": "patient-4711"})
    assert (done.blobs, done.folders) == (2, 1)
    assert not working.exists()
    with pytest.raises(NotFoundError, match="erased"):
        services.blobs.tree(digest)
    services.records.seal()
    assert "patient-4711" not in str([event.detail for event in services.records.events()])
    found = [one for one in tmp_path.rglob("*") if one.is_file() and b"canary" in one.read_bytes()]
    assert found == []
    with pytest.raises(InputError, match="--subject"):
        sealed.call("key.erase", {})


def test_a_subject_wants_encryption(home: Dispatcher) -> None:
    with pytest.raises(InputError, match="encrypted"):
        mark_subject(home.services, home.services.blobs.put(b"x"), "somebody")


def test_garbage_is_collected_with_its_keys(sealed: Dispatcher) -> None:
    services = sealed.services
    services.records.put(Run(id="r", state="succeeded", created_at=1.0, spec_path="x"))
    digest = services.blobs.put(b"garbage").digest
    done = collect(services, apply=True, now=True)
    assert (done.purged, done.purged_bytes) == (1, 7)
    assert not services.blobs.exists(digest)
    assert services.records.get(DataKey, digest) is None


def test_requests_and_orders_show_no_value() -> None:
    work = Work(step_id="s", run_id="r", name="use", implementation="m:f", spec=b"{}")
    shown = [SecretSet(name="A", value=VALUE), Order(entry="m:f", work=work, secrets={"A": VALUE})]
    assert VALUE not in repr(shown)
