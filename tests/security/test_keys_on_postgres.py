"""Keys, secrets, blobs and signed heads where two hosts share one Postgres and one bucket."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from two_hosts import Homes, at_once, behind, of_type, two_homes

from millrace.control.authorisation import acting_as
from millrace.control.dispatch import Dispatcher
from millrace.control.heads import Extension, ledger
from millrace.control.keys import keyring_of, mark_subject
from millrace.control.loop import take_lead
from millrace.control.secrets import open_values
from millrace.control.trust import publish_key, refusal_of
from millrace.core.clock import SystemClock
from millrace.core.errors import ConflictError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.principals import Grant, Principal
from millrace.core.types import AuditHead, DataKey, Event, Secret, TrustedKey
from millrace.security.signing import HomeSigner
from millrace.store.blobs_encrypted import EncryptedBlobs
from millrace.testing.moto_server import MotoServer
from millrace.testing.radosgw import Radosgw, missing_programs
from millrace.wiring import open_dispatcher

BUCKET = "trust"
WRITER = """
import sys
from millrace.wiring import open_services
home = open_services(sys.argv[1])
for number in range(10):
    home.blobs.put(b"of another process, number %d" % number)
home.close()
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    """A service with a bucket: radosgw, which is a real one, where it is installed; named by the environment."""
    with tempfile.TemporaryDirectory(prefix="rgw") as folder, pytest.MonkeyPatch.context() as patch:
        server = (MotoServer if missing_programs() else Radosgw)(Path(folder)).start()
        try:
            for name, value in {
                "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key,
                "AWS_REGION": server.region, "AWS_ENDPOINT_URL": server.endpoint,
            }.items():  # fmt: skip
                patch.setenv(name, value)
            boto3.client("s3", region_name=server.region).create_bucket(Bucket=BUCKET)
            yield
        finally:
            server.stop()


@pytest.fixture
def homes(bucket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Homes]:
    """With a key of keys that both can read."""
    key, place = f"file:{tmp_path / 'kek.json'}", f"s3://{BUCKET}/{new_id()}"
    with two_homes(tmp_path, monkeypatch, blobs_url=place, encryption_key=key) as made:
        yield made


def test_secrets_that_are_set_at_once_have_each_a_number_and_open_everywhere(homes: Homes) -> None:
    def keep(home: Dispatcher, value: str) -> Any:
        return home.call("secret.set", {"name": "TOKEN", "in_project": "default", "value": value})

    works: list[Callable[[], Any]] = [partial(keep, homes[n % 2], f"value number {n}") for n in range(24)]
    found = at_once([*works, partial(homes[1].call, "key.rotate", {})])
    numbers = [one.number for one in found[:-1]]
    assert len(set(numbers)) == 24, found
    last = f"value number {numbers.index(max(numbers))}"
    assert [open_values(home.services, "default", ["TOKEN"]) for home in homes] == [{"TOKEN": last}] * 2


def test_a_host_with_keys_of_its_own_stores_nothing_that_others_cannot_open(
    homes: Homes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = []
    for name in ("a", "b"):
        monkeypatch.setenv("MILLRACE_ENCRYPTION_KEY", f"file:{tmp_path / name}.json")
        hosts.append(open_dispatcher(str(tmp_path / name)))
        assert blobs_of(hosts[-1]), "each has made its keys before anything was stored"
    body = {"in_project": "default", "value": "a value of somebody"}
    for what in (
        [partial(home.call, "secret.set", {"name": f"TOKEN_{n}", **body}) for n, home in enumerate(hosts)],
        [partial(home.services.blobs.put, home.services.home.name.encode()) for home in hosts],
    ):
        found = at_once([*what])
        (refused,) = of_type(found, NotFoundError)
        assert "is not " in refused.message
    first = hosts[0].services.records.find(Secret)
    assert len(first) == len(hosts[0].services.records.find(DataKey)) == 1
    other = acting_as(Principal(id="user:m", grants=(Grant(role="maintainer", where="other"),)))
    late = hosts[first[0].name == "TOKEN_0"]
    with other, pytest.raises(NotFoundError, match="not among the keys"):  # also who sees no secret of those
        late.call("secret.set", {"name": "TOKEN", "in_project": "other", "value": body["value"]})
    for home in hosts:
        home.close()


def test_keys_are_rotated_while_others_put(homes: Homes) -> None:
    left, right = homes
    ring, artifacts, rotating = keyring_of(left.services), [], []
    pool = ThreadPoolExecutor(1)
    assert right.call("key.list", {})[0].blobs == 0, "it is open, so that what waits below is the change of keys"

    class Slow:
        """The keys; who has wrapped a key with them writes that down when others are done with rotating, nearly."""

        def __getattr__(self, name: str) -> Any:
            return getattr(ring, name)

        def wrap(self, key: bytes, context: str) -> tuple[str, str]:
            made = ring.wrap(key, context)
            rotating.append(pool.submit(right.call, "key.rotate", {}))
            time.sleep(0.3)
            return made

    slow: Any = Slow()
    blobs_of(left)._ciphers = slow
    artifacts.append(left.services.blobs.put(b"of the last moment"))
    assert rotating[0].result().blobs == 1
    blobs_of(left)._ciphers = ring
    with subprocess.Popen([sys.executable, "-c", WRITER, str(left.services.home)]) as writer:
        while writer.poll() is None:
            artifacts.append(left.services.blobs.put(b"of this process, number %d" % len(artifacts)))
            right.call("key.rotate", {})
            time.sleep(0.2)
    assert writer.returncode == 0
    keys = left.services.records.find(DataKey)
    assert {key.kek for key in keys} == {ring.current}
    assert len(keys) == 10 + len(artifacts)
    for one in [one for one in left.call("key.list", {}) if not one.is_current][-2:]:
        right.call("key.drop", {"name": one.id})
    for key in keys[::3]:
        assert [home.services.blobs.read(key.id)[:3] for home in homes] == [b"of "] * 2
        assert b"of " not in blobs_of(left).inner.read(key.stored)[:3]


def blobs_of(home: Dispatcher) -> EncryptedBlobs:
    blobs = home.services.blobs
    assert isinstance(blobs, EncryptedBlobs)
    return blobs


def test_data_of_somebody_is_erased_for_all_and_copies_on_each_host(homes: Homes) -> None:
    left, right = homes
    artifact = left.services.blobs.put(b"a scan of somebody")
    mark_subject(left.services, artifact, "patient-1")
    copies = [home.services.blobs.path(artifact.digest) for home in homes]
    done = at_once([partial(home.call, "key.erase", {"subject": "patient-1"}) for home in homes])
    assert sorted(one.blobs for one in done) == [0, 1]
    for home in homes:
        with pytest.raises(NotFoundError, match="erased"):
            home.services.blobs.read(artifact.digest)
    assert not list(blobs_of(right).inner.list())
    right.call("key.erase", {"subject": "patient-1"})
    assert [path.exists() for path in copies] == [False, False], "each host forgets its plain copy when it is told"


def test_trusted_keys_are_added_once_and_revoked_for_all(homes: Homes, tmp_path: Path) -> None:
    left, right = homes
    partner, third = HomeSigner(tmp_path / "partner"), HomeSigner(tmp_path / "third")
    body = {"pem": partner.public_key().decode(), "name": "partner"}
    found = at_once([partial(homes[n % 2].call, "trusted_key.add", body) for n in range(6)])
    assert len(of_type(found, ConflictError)) == 5
    assert {one.id: one.state for one in right.call("trusted_key.list", {})}[partner.key_id] == "valid"
    right.call("trusted_key.revoke", {"key": partner.key_id})
    assert "revoked" in str(refusal_of(left.services.records, SystemClock().now(), partner.key_id))
    publish = partial(publish_key, right.services.records, SystemClock(), "x", third.key_id, third.public_key())
    revoked = TrustedKey(id=third.key_id, pem="", revoked_at=1.0)
    behind(left, publish, lambda transaction: transaction.put(revoked)).result()
    assert "revoked" in str(refusal_of(left.services.records, SystemClock().now(), third.key_id))


def test_heads_are_signed_by_one_who_leads(homes: Homes) -> None:
    left, right = homes
    records = ledger(left.services)
    for number in range(30):
        with records.transaction() as transaction:
            transaction.append(Event(at=float(number), actor="user:u", verb="run.end", subject="run:r"))
    at_once([ledger(home.services).seal for home in homes])
    extensions = [Extension(ledger(home.services)) for home in homes]
    assert all(one.advance() for one in extensions)
    signed = at_once([partial(one.store, home.services, None) for one, home in zip(extensions, homes, strict=True)])
    assert len(of_type(signed, AuditHead)) == 1
    leads = [one for one in at_once([partial(take_lead, home.services) for home in homes]) if one is not None]
    assert len(leads) == 1
    with records.transaction() as transaction:
        transaction.append(Event(at=99.0, actor="user:u", verb="run.end", subject="run:r"))
    records.seal()
    late = Extension(records)
    assert late.advance()
    with pytest.raises(ConflictError):
        late.store(left.services, msgspec.structs.replace(leads[0], token=leads[0].token - 1))
    assert late.store(right.services, leads[0]) is not None
    assert right.call("audit.verify", {}).is_whole
