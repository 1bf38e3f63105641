"""Garbage: what is old and unreferenced goes, in two steps; nothing live ever does, whoever writes meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.control.dispatch import Dispatcher
from millrace.control.garbage import collect, collect_garbage
from millrace.control.services import Services
from millrace.core.clock import FakeClock
from millrace.core.errors import ConflictError, DeniedError
from millrace.core.operations.live import GcRequest, GcResponse
from millrace.core.types import (
    TREE_MEDIA_TYPE,
    Artifact,
    ArtifactFile,
    DatasetVersion,
    MetricPoint,
    ModelVersion,
    Run,
    Step,
)
from millrace.store.leases import acquire
from millrace.wiring import open_dispatcher

HOUR_S = 3600.0


class Home:
    """A home whose clock, and whose files' ages, the test moves."""

    def __init__(self, folder: Path) -> None:
        self.dispatcher: Dispatcher = open_dispatcher(str(folder))
        self.services: Services = self.dispatcher.services
        self.clock = FakeClock(time.time() + 1000 * HOUR_S)  # far off, so that real and fake ages can be told apart
        self.services.clock = self.clock

    def put(self, data: bytes) -> Artifact:
        artifact = self.services.blobs.put(data)
        self.date(artifact.digest)
        return artifact

    def date(self, digest: str) -> None:
        """As if stored or touched at the fake time."""
        os.utime(self.services.blobs.path(digest), (self.clock.now(), self.clock.now()))

    def gc(self, **options: bool) -> GcResponse:
        answer = self.dispatcher.call("system.gc", options)
        self.date_discarded()
        return answer

    def date_discarded(self) -> None:
        """What was put aside just now was put aside at the fake time."""
        for artifact, _ in list(self.services.blobs.discarded()):
            place = self.services.home / "blobs" / "discarded" / artifact.digest[7:]
            if abs(place.stat().st_mtime - time.time()) < 60:
                os.utime(place, (self.clock.now(), self.clock.now()))

    def digests(self) -> set[str]:
        return {artifact.digest for artifact in self.services.blobs.list()}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    opened = Home(tmp_path / "home")
    opened.services.records.put(Run(id="other", state="succeeded", created_at=1.0, spec_path="x"))
    yield opened
    opened.dispatcher.close()


def test_garbage_goes_in_two_steps_and_only_when_told(home: Home, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/model.onnx").write_bytes(b"weights")
    bundle = home.services.blobs.put_tree(tmp_path / "bundle")
    assert bundle.media_type == TREE_MEDIA_TYPE
    leaves = [entry.digest for entry in home.services.blobs.tree(bundle.digest)]
    garbage, dataset, card = (home.put(data).digest for data in (b"garbage", b"dataset", b"card"))
    home.services.records.put(
        ModelVersion(id="m/1", name="m", number=1, bundle=bundle, card=Artifact(digest=card, size_bytes=4))
    )
    home.services.records.put(
        DatasetVersion(id="d/1", name="d", number=1, artifact=Artifact(digest=dataset, size_bytes=7))
    )
    for digest in (bundle.digest, *leaves):
        home.date(digest)
    home.clock.sleep(2 * HOUR_S)
    young = home.put(b"young").digest
    said = home.gc()
    assert (said.blobs, said.size_bytes, said.purged, said.applied) == (1, 7, 0, False)
    assert garbage in home.digests()
    done = home.gc(apply=True)
    assert (done.blobs, done.purged, done.applied) == (1, 0, True)
    assert home.digests() == {bundle.digest, *leaves, dataset, card, young}
    assert home.gc(apply=True).purged == 0
    home.clock.sleep(2 * HOUR_S)
    home.date(young)
    assert home.gc().purged_bytes == 7
    assert home.gc(apply=True).purged == 1
    assert not home.services.blobs.exists(garbage)
    assert home.digests() == {bundle.digest, *leaves, dataset, card, young}


def test_now_spares_nothing_for_its_age(home: Home) -> None:
    home.put(b"just written")
    assert home.gc(apply=True, now=True).purged == 1
    assert home.digests() == set()


def test_outputs_are_kept_by_number_by_age_and_of_scripts(home: Home) -> None:
    home.services.settings = {
        **home.services.settings,
        "gc_keep_runs": msgspec.structs.replace(home.services.settings["gc_keep_runs"], value=1),
    }
    kept = {}
    for name, age_days, spec in (("old", 100, "s"), ("young", 3, "s"), ("script", 100, ""), ("newest", 0, "s")):
        made = home.put(name.encode())
        created = home.clock.now() - age_days * 86_400
        home.services.records.put(Run(id=name, state="succeeded", created_at=created, spec_path=spec))
        step = Step(id=f"{name}/data", run_id=name, name="data", stage="data", state="succeeded", outputs={"x": made})
        home.services.records.put(step)
        kept[name] = made.digest
    home.clock.sleep(2 * HOUR_S)
    home.gc(apply=True)
    assert home.digests() == {kept["young"], kept["script"], kept["newest"]}


def test_what_a_running_run_stored_early_is_spared(home: Home) -> None:
    home.services.records.put(Run(id="r", state="running", started_at=home.clock.now()))
    home.clock.sleep(10)
    early = home.put(b"early").digest
    home.clock.sleep(50 * HOUR_S)
    assert home.gc(apply=True).blobs == 0
    assert early in home.digests()


def test_runs_deleted_long_ago_are_removed_with_their_files(home: Home) -> None:
    artifact = home.put(b"a file")
    home.services.records.put(Run(id="gone", state="succeeded", deleted_at=home.clock.now()))
    home.services.records.put(ArtifactFile(id="gone/a", owner="gone", path="a", artifact=artifact))
    home.clock.sleep(29 * 86_400)
    assert home.gc(apply=True).runs == 0
    assert artifact.digest in home.digests()
    home.clock.sleep(2 * 86_400)
    assert home.gc(apply=True).runs == 1
    assert home.services.records.get(Run, "gone") is None
    assert home.digests() == set()


def send(home: Home, owner: str, path: str) -> str:
    """A part of an upload, or a file that somebody sent; its digest."""
    artifact = home.put(f"{owner} {path}".encode())
    file = ArtifactFile(
        id=f"{owner}/{path}", owner=owner, path=path, artifact=artifact, created_at=home.clock.now()
    )  # fmt: skip
    home.services.records.put(file)
    return artifact.digest


def test_uploads_that_were_never_completed_are_removed(home: Home) -> None:
    given_up = send(home, "upload-a", "1")
    goes_on = send(home, "upload-b", "1")
    sent = send(home, "upload-ann", "sha256:1")
    kept = send(home, "a-run", "model")
    home.clock.sleep(0.9 * HOUR_S)
    later = send(home, "upload-b", "2"), send(home, "upload-ann", "sha256:2")
    home.clock.sleep(0.2 * HOUR_S)
    said = home.gc()
    assert (said.uploads, said.blobs) == (2, 2)
    assert len(home.services.records.find(ArtifactFile)) == 6
    assert home.gc(apply=True).uploads == 2
    assert {file.id for file in home.services.records.find(ArtifactFile)} == {
        "a-run/model", "upload-b/1", "upload-b/2", "upload-ann/sha256:2",
    }  # fmt: skip
    assert home.digests() == {goes_on, kept, *later}
    assert home.gc(apply=True).uploads == 0
    assert given_up != sent


def test_what_was_logged_to_runs_that_are_gone_is_removed(home: Home) -> None:
    records = home.services.records
    for run in ("other", "gone", "also gone"):
        with records.transaction() as transaction:
            points = [MetricPoint(run, "loss", step, 1.0, 0.0) for step in range(3)]
            transaction.log(run, points=points, params={"lr": "1"}, tags={"a": "b"})
    assert home.gc().values == 2 * (3 + 1 + 1 + 1)
    assert len(records.metrics("gone")) == 3
    assert home.gc(apply=True).values == 12
    assert records.metrics("gone") == records.metrics("also gone") == []
    values = records.run_values(["other", "gone"])
    assert (len(records.metrics("other")), values["other"].params, values["other"].tags) == (3, {"lr": "1"}, {"a": "b"})
    assert not values["gone"].params
    assert home.gc(apply=True).values == 0


def test_who_sees_some_projects_collects_nothing(home: Home) -> None:
    """To them, what other projects refer to looks like garbage."""
    artifact = home.put(b"theirs")
    home.services.records.put(DatasetVersion(id="d/1", project="theirs", name="d", number=1, artifact=artifact))
    home.clock.sleep(2 * HOUR_S)
    with pytest.raises(DeniedError, match="all projects"):
        collect_garbage(home.services.scoped(frozenset({"mine"})), GcRequest(apply=True, now=True))
    assert home.digests() == {artifact.digest}


def test_two_collections_do_not_meet(home: Home) -> None:
    lease = acquire(home.services.records, "gc", home.clock, 60.0)
    assert lease is not None
    with pytest.raises(ConflictError, match="already"):
        home.gc()


# --------------------------------------------------------------------------- interleavings

CONTENTS = [b"alpha", b"beta"]
ACTIONS = st.sampled_from(["store", "store", "refer", "refer", "drop", "read", "wait"])


class Writer:
    """Somebody who stores bytes and, within the time allowed, writes a record that names them."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.promised: dict[str, float] = {}
        self.count = 0

    def act(self, action: str, which: int) -> None:
        home, data = self.home, CONTENTS[which]
        records = home.services.records
        if action == "store":
            self.promised[home.put(data).digest] = home.clock.now()
        elif action == "refer" and self.promised:
            digest, since = sorted(self.promised.items())[which % len(self.promised)]
            del self.promised[digest]
            if home.clock.now() - since < HOUR_S:
                self.count += 1
                artifact = Artifact(digest=digest, size_bytes=0)
                records.put(DatasetVersion(id=f"d/{self.count}", name="d", number=self.count, artifact=artifact))
        elif action == "drop":
            found = records.find(DatasetVersion)
            if found:
                with records.transaction() as transaction:
                    transaction.delete(DatasetVersion, found[which % len(found)].id)
        elif action == "wait":
            home.clock.sleep(HOUR_S * (0.4, 1.2)[which])
        self.check()

    def check(self) -> None:
        """Everything that a record names can be read."""
        for dataset in self.home.services.records.find(DatasetVersion):
            data = self.home.services.blobs.read(dataset.artifact.digest)
            assert data in CONTENTS


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.lists(st.tuples(ACTIONS, st.integers(0, 1)), min_size=20, max_size=60), stride=st.integers(1, 4))
def test_no_live_blob_is_lost_whatever_is_written_between_the_steps(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[str, int]], stride: int
) -> None:
    home = Home(tmp_path_factory.mktemp("gc") / "home")
    writer = Writer(home)
    actions = iter(script)

    def act(times: int) -> bool:
        for _ in range(times):
            chosen = next(actions, None)
            if chosen is None:
                return False
            writer.act(*chosen)
        return True

    while act(stride):
        collect(home.services, apply=True, between=lambda: act(1) and None)
        home.date_discarded()
        writer.check()
    home.dispatcher.close()
