"""Backups: consistent, incremental, encrypted, verified, restored, pruned; and what is wrong is found and refused."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.control import backup_making, backup_restoring
from millrace.control.backup_checking import check_backup, chosen
from millrace.control.backup_keeping import kept, made_at, prune_backups
from millrace.control.backup_making import Made, Options, make_backup
from millrace.control.backup_restoring import Target, restore_backup
from millrace.control.backup_schedule import RETRY_S, ScheduledBackups
from millrace.control.backup_seal import BackupKey, read_key
from millrace.control.dispatch import Dispatcher
from millrace.control.loop import take_lead
from millrace.core.clock import FakeClock
from millrace.core.errors import (
    ConflictError,
    CorruptError,
    DeniedError,
    DiskFullError,
    InputError,
    MillraceError,
    NotFoundError,
    SchemaVersionError,
    UntrustedError,
)
from millrace.core.principals import Grant, Principal
from millrace.core.types import Alert, Artifact, DatasetVersion, Event, MetricPoint, ModelVersion, Run, Step, TreeEntry
from millrace.security import chain
from millrace.security.envelope import CHUNK_BYTES
from millrace.security.signing import HomeSigner
from millrace.store import backup_filling, backup_marker, backup_vault, trees
from millrace.store.backup_place import FolderPlace
from millrace.store.backup_vault import Manifest, Vault
from millrace.store.blobs_local import LocalBlobs
from millrace.store.leases import acquire, release
from millrace.store.records_sql import open_records
from millrace.store.transfer import records_digest
from millrace.wiring import open_dispatcher, open_services

KEY = "11" * 32


class Home:
    """A home with something of everything, and a destination."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.to = folder / "home", folder / "to"
        self.dispatcher: Dispatcher = open_dispatcher(str(self.folder))
        self.services = self.dispatcher.services
        self.records: Any = self.services.records

    def fill(self, runs: int = 40) -> None:
        (self.folder / "model").mkdir()
        (self.folder / "model/model.onnx").write_bytes(os.urandom(3_000_000))
        (self.folder / "model/labels.txt").write_bytes(b"labels")
        bundle = self.services.blobs.put_tree(self.folder / "model")
        self.records.put(ModelVersion(id="m/1", name="m", number=1, bundle=bundle))
        self.dataset("d", b"dataset")
        for number in range(runs):
            self.run(number)
        gone = Artifact(digest="sha256:" + "0" * 64, size_bytes=5)  # collected long ago
        self.records.put(Step(id="s/1", run_id="r0", name="data", stage="data", outputs={"x": gone}))

    def dataset(self, name: str, data: bytes) -> str:
        artifact = self.services.blobs.put(data)
        self.records.put(DatasetVersion(id=f"{name}/1", name=name, number=1, artifact=artifact))
        return artifact.digest

    def run(self, number: int) -> None:
        run = Run(id=f"r{number}", name=f"run {number}", state="succeeded", facts={"x": "y" * 500})
        weights = self.services.blobs.put(f"weights {number} ".encode() * 3000)
        with self.records.transaction() as transaction:
            transaction.put(run)
            transaction.put(
                Step(id=f"r{number}/train", run_id=run.id, name="train", stage="train", outputs={"w": weights})
            )
            transaction.append(Event(at=float(number), actor="u", verb="run", subject=f"run:{run.id}", detail={"n": 1}))
            transaction.log(run.id, points=[MetricPoint(run.id, "loss", step, 0.5, 1.0) for step in range(20)])

    def vault(self, key: str | None = None) -> Vault:
        return Vault(FolderPlace(self.to), None if key is None else BackupKey(bytes.fromhex(key)))

    def back_up(self, key: str | None = None, **options: bool) -> Made:
        return make_backup(self.services, self.vault(key), Options(**options))

    def check(self, key: str | None = None, id: str | None = None) -> list[str]:
        vault = self.vault(key)
        return check_backup(vault, chosen(vault, id), self.services.signer).problems

    def objects(self, kind: str) -> list[Path]:
        return sorted(path for path in (self.to / kind).rglob("*") if path.is_file())

    def object_of(self, digest: str) -> Path:
        return self.to / "blobs" / digest[7:9] / digest[9:]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    made.fill()
    yield made
    made.dispatcher.close()


def manifest_of(vault: Vault, id: str | None = None) -> Manifest:
    return vault.manifest(chosen(vault, id))[0]


def restore(vault: Vault, folder: Path, between: Any = str) -> Any:
    target = Target(folder, lambda: open_records(folder / "records.db"), LocalBlobs(folder / "blobs"))
    return restore_backup(vault, manifest_of(vault), target, FakeClock(), between)


def digest_of(folder: Path) -> str:
    records = open_records(folder / "records.db")
    try:
        assert chain.verify(records.links(limit=10**6), head=records.head()).broken is None
        return records_digest(records)
    finally:
        records.close()


# --------------------------------------------------------------------------- made, verified, restored


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_backup_restores_to_the_same_records_and_blobs(home: Home, tmp_path: Path, key: str | None) -> None:
    home.records.seal()
    before = records_digest(home.records)
    made = home.back_up(key)
    assert made.digest == before
    assert (made.manifest.missing, made.damaged, made.repaired) == ([], [], [])
    assert home.check(key) == []
    done = restore(home.vault(key), tmp_path / "new")
    assert done.digest == before == digest_of(tmp_path / "new")
    assert done.chain_problem == ""
    there = {one.digest: one.size_bytes for one in LocalBlobs(tmp_path / "new/blobs").list()}
    assert there == {one.digest: one.size_bytes for one in home.services.blobs.list()}
    assert backup_marker.read(tmp_path / "new") is None


def test_what_did_not_change_is_neither_read_nor_written_again(home: Home) -> None:
    first = home.back_up()
    objects = {path: path.stat().st_mtime_ns for path in home.objects("blobs") + home.objects("chunks")}
    home.run(100)
    reads: list[str] = []
    blobs = home.services.blobs
    opened = LocalBlobs.open

    def counting(self: LocalBlobs, digest: str) -> Any:
        reads.append(digest)
        return opened(self, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalBlobs, "open", counting)
        second = home.back_up()
    new = blobs.put(b"weights 100 " * 3000).digest
    assert reads == [new]
    assert home.object_of(new).is_file()
    assert {path: path.stat().st_mtime_ns for path in objects} == objects
    assert second.written_bytes < first.written_bytes / 10
    assert second.manifest.rows > first.manifest.rows
    third = home.back_up()
    assert third.new_objects <= 2  # the lease that the second one has let go of, and nothing else
    assert home.check() == []


def test_records_that_did_not_change_are_not_read_again_and_restore(home: Home, tmp_path: Path) -> None:
    for number in range(100, 600):
        home.run(number)
    home.back_up()
    doomed = home.dataset("late", b"late")
    home.records.put(msgspec.structs.replace(home.records.get(Run, "r150"), name="another name"))
    second = home.back_up()
    assert second.digest == ""  # not all rows were read
    assert home.check() == []
    done = restore(home.vault(), tmp_path / "new")
    restored = open_records(tmp_path / "new/records.db")
    changed, kept = restored.get(Run, "r150"), restored.get(Run, "r151")
    restored.close()
    assert (changed.name, kept.name) == ("another name", "run 151")
    assert LocalBlobs(tmp_path / "new/blobs").read(doomed) == b"late"
    blobs = {one.digest for one in home.services.blobs.list()}
    assert {one.digest for one in LocalBlobs(tmp_path / "new/blobs").list()} == blobs  # of unread steps, too
    full = home.back_up(is_full=True)
    assert full.digest != ""
    assert full.read_bytes > 2 * second.read_bytes
    assert full.new_objects <= 4
    assert done.rows == second.manifest.rows


def test_a_backup_is_of_one_moment_whatever_is_written_meanwhile(home: Home, tmp_path: Path) -> None:
    home.records.seal()
    before = records_digest(home.records)
    stop = threading.Event()

    def write() -> None:
        number = 1000
        while not stop.is_set():
            home.run(number)
            home.records.seal()
            number += 1

    writer = threading.Thread(target=write)

    def between(what: str) -> None:
        if what == "rows":  # the snapshot is taken, nothing is read
            writer.start()
        if what == "blobs":
            home.run(999)

    made = make_backup(home.services, home.vault(), Options(), between)
    stop.set()
    writer.join()
    assert made.digest == before
    assert home.records.get(Run, "r999") is not None
    assert restore(home.vault(), tmp_path / "new").digest == before
    home.records.seal()
    after = records_digest(home.records)
    assert home.back_up(is_full=True).digest == after


def test_nothing_that_the_snapshot_names_is_collected_meanwhile(home: Home, tmp_path: Path) -> None:
    digest = home.dataset("doomed", b"doomed")
    stop = threading.Event()
    outcomes: list[str] = []

    def collect() -> None:
        while not stop.is_set():
            try:
                home.dispatcher.call("system.gc", {"apply": True, "now": True})
                outcomes.append("collected")
            except ConflictError:
                outcomes.append("refused")
            stop.wait(0.005)

    collector = threading.Thread(target=collect)

    def between(what: str) -> None:
        if what == "rows":
            with home.records.transaction() as transaction:
                transaction.delete(DatasetVersion, "doomed/1")
            collector.start()
        elif what == "blobs":
            while "refused" not in outcomes:
                threading.Event().wait(0.005)
        assert home.services.blobs.exists(digest)

    make_backup(home.services, home.vault(), Options(), between)
    while outcomes[-1] != "collected":
        threading.Event().wait(0.005)
    stop.set()
    collector.join()
    assert not home.services.blobs.exists(digest)
    restore(home.vault(), tmp_path / "new")
    assert LocalBlobs(tmp_path / "new/blobs").read(digest) == b"doomed"


def test_a_backup_waits_for_a_collection_but_not_for_ever(home: Home) -> None:
    home.services.clock = FakeClock(1.0)
    lease = acquire(home.records, "gc", home.services.clock, 1e9)
    assert lease is not None
    with pytest.raises(ConflictError, match="garbage is being collected"):
        home.back_up()
    assert home.vault().manifests() == []
    release(home.records, lease)
    assert home.back_up().manifest.rows > 0


def test_a_collection_between_snapshot_and_lease_is_noticed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    true_acquire, calls = acquire, []

    def late(records: Any, name: str, clock: Any, ttl_s: float) -> Any:
        if not calls:  # somebody collects between our look and our lease
            other = true_acquire(records, name, clock, ttl_s)
            assert other is not None
            release(records, other)
        calls.append(name)
        return true_acquire(records, name, clock, ttl_s)

    monkeypatch.setattr(backup_making, "acquire", late)
    home.back_up()
    assert calls == ["gc", "gc"]


def test_keys_settings_and_logs_come_along_as_asked(home: Home, tmp_path: Path) -> None:
    (home.folder / "settings.yaml").write_text("records_url: ''\ngc_keep_runs: 7\n")
    (home.folder / "logs").mkdir(exist_ok=True)
    (home.folder / "logs/run.log").write_text("printed")
    signing = home.services.signer.sign("sha256:" + "0" * 64) and (home.folder / "keys/signing.key").read_bytes()
    with pytest.raises(InputError, match="not encrypted"):
        home.back_up(include_keys=True)
    assert not home.to.exists()
    home.back_up(KEY, include_keys=True, include_logs=True)
    assert home.check(KEY) == []
    assert not any(signing[30:60] in path.read_bytes() for path in home.objects("blobs"))
    restore(home.vault(KEY), tmp_path / "new")
    assert (tmp_path / "new/keys/signing.key").read_bytes() == signing
    assert (tmp_path / "new/keys/signing.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new/keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new/logs/run.log").read_text() == "printed"
    assert (tmp_path / "new/settings.yaml").read_text() == "gc_keep_runs: 7\n"
    plain = home.back_up(KEY)
    assert [file.path for file in plain.manifest.files] == ["settings.yaml"]


def test_a_blob_that_the_home_has_lost_is_told_and_keeps_nothing_back(home: Home, tmp_path: Path) -> None:
    lost, damaged = home.dataset("lost", b"lost"), home.dataset("hurt", b"hurt")
    home.services.blobs.delete(lost)
    place = home.services.blobs.path(damaged)
    place.chmod(0o600)
    place.write_bytes(b"HURT")
    made = home.back_up()
    assert made.manifest.missing == sorted([lost, damaged])
    assert made.damaged == [damaged]
    assert home.check() == []  # the backup is whole: it says what it never had
    assert restore(home.vault(), tmp_path / "new").blobs == made.manifest.blob_count


# --------------------------------------------------------------------------- what is wrong is found


def flip(path: Path, where: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("kind", ["chunks", "blobs"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "empty", "longer", "swapped"])
def test_any_damage_to_any_object_is_found_and_never_restored(
    home: Home, tmp_path: Path, key: str | None, kind: str, how: str
) -> None:
    home.back_up(key)
    victim, other = home.objects(kind)[3], home.objects(kind)[4]
    if how == "flipped":
        flip(victim)
    elif how == "cut":
        victim.write_bytes(victim.read_bytes()[:-7])
    elif how == "gone":
        victim.unlink()
    elif how == "empty":
        victim.write_bytes(b"")
    elif how == "longer":
        victim.write_bytes(victim.read_bytes() + b"more")
    else:
        shutil.copyfile(other, victim)
    problems = home.check(key)
    assert problems, how
    with pytest.raises((CorruptError, NotFoundError)):
        restore(home.vault(key), tmp_path / "new")
    assert backup_marker.read(tmp_path / "new") is not None
    with pytest.raises(ConflictError, match="being restored"):
        _ = open_services(str(tmp_path / "new")).records


def test_a_damaged_blob_is_written_again_when_it_is_found(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.back_up()
    monkeypatch.setattr(backup_making, "SAMPLE", 10_000)
    monkeypatch.setattr(backup_making, "SAMPLE_BYTES", 1 << 30)
    digest = home.services.blobs.put(b"weights 7 " * 3000).digest
    flip(home.object_of(digest))
    assert home.check() != []
    assert home.back_up().repaired == [digest]
    assert home.check() == []


def test_a_truncated_blob_is_written_again(home: Home) -> None:
    home.back_up()
    digest = home.services.blobs.put(b"weights 7 " * 3000).digest
    home.object_of(digest).write_bytes(b"weights")
    home.back_up()
    assert home.check() == []


def test_a_manifest_that_was_changed_is_refused(home: Home) -> None:
    made = home.back_up()
    path = home.to / "manifests" / made.manifest.id
    whole = path.read_bytes()
    flip(path, 20)
    with pytest.raises((CorruptError, UntrustedError)):
        home.check()
    path.write_bytes(whole[:-20])
    with pytest.raises(CorruptError):
        home.check()
    path.write_bytes(whole)
    shutil.copyfile(path, path.with_name("f" * 32))  # an old backup passed off as the newest
    with pytest.raises(CorruptError, match="is that of"):
        home.check()


def rewrite(home: Home, by: HomeSigner | None = None, **changes: Any) -> Vault:
    """The newest manifest with changes, signed by somebody."""
    vault = home.vault()
    manifest = msgspec.structs.replace(manifest_of(vault), **changes)
    vault.put_manifest(manifest, (by or HomeSigner(home.folder)).sign)
    return vault


def test_a_manifest_signed_by_a_stranger_is_not_trusted(home: Home, tmp_path: Path) -> None:
    home.back_up()
    stranger = HomeSigner(tmp_path / "stranger")
    rewrite(home, stranger, signer=stranger.public_key().decode())
    problems = home.check()
    assert len(problems) == 1
    assert stranger.key_id in problems[0]
    other = open_dispatcher(str(tmp_path / "other"))
    with pytest.raises(UntrustedError, match=stranger.key_id):
        other.call("system.restore", {"source": str(home.to)})
    with pytest.raises(UntrustedError, match=stranger.key_id):
        other.call("system.restore", {"source": str(home.to), "signer": HomeSigner(home.folder).key_id})
    other.close()
    pem = HomeSigner(home.folder).public_key().decode()
    vault = rewrite(home, stranger, signer=pem)  # says that the home's key has signed it
    with pytest.raises(UntrustedError):
        check_backup(vault, chosen(vault, None), home.services.signer)


def test_a_newer_format_and_another_schema_are_refused(home: Home, tmp_path: Path) -> None:
    home.back_up()
    vault = rewrite(home, schema="0001")
    with pytest.raises(SchemaVersionError, match="0001") as caught:
        restore(vault, tmp_path / "new")
    assert "restore it with Millrace" in caught.value.hint
    assert not (tmp_path / "new/records.db").exists()
    rewrite(home, format=2)
    with pytest.raises(SchemaVersionError, match="format 2"):
        home.check()
    with pytest.raises(SchemaVersionError, match="format 2"):
        prune_backups(home.services, home.vault(), 1, 1)
    (home.to / "format.json").write_text('{"format": 9, "later": true}')
    with pytest.raises(SchemaVersionError, match="format 9"):
        home.back_up()
    (home.to / "format.json").write_text("{")
    with pytest.raises(CorruptError):
        home.back_up()


@pytest.mark.parametrize(
    "path", ["../escaped", "keys/../../escaped", "/tmp/escaped", "records.db", "keys", "a\\b", "keys/\n"]
)
def test_files_with_paths_that_lead_elsewhere_are_refused(home: Home, tmp_path: Path, path: str) -> None:
    home.back_up()
    blob = home.services.blobs.put(b"dataset")
    bad = backup_vault.FilePart(path=path, digest=blob.digest, size_bytes=blob.size_bytes)
    vault = rewrite(home, files=[bad])
    assert any("no file of a home" in problem for problem in home.check())
    with pytest.raises(CorruptError, match="which no home has"):
        restore(vault, tmp_path / "new")
    assert not (tmp_path / "escaped").exists()


def test_a_tree_whose_paths_lead_elsewhere_is_found(home: Home, tmp_path: Path) -> None:
    listing = trees.encode([TreeEntry(path="../../evil", digest="sha256:" + "1" * 64, size_bytes=1)])
    stored = home.services.blobs.put(listing, "application/vnd.millrace.tree+json")
    home.records.put(DatasetVersion(id="evil/1", name="evil", number=1, artifact=stored))
    home.back_up()
    assert any("path that is not allowed" in problem for problem in home.check())


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "", "sha256:" + "A" * 64, "md5:00"])
def test_digests_that_are_none_are_refused(home: Home, tmp_path: Path, digest: str) -> None:
    home.back_up()
    vault = rewrite(home, blobs=[backup_vault.Ref(digest, 5, 1)])
    with pytest.raises(CorruptError, match="not a digest"):
        restore(vault, tmp_path / "new")


def test_a_bomb_is_not_unpacked(home: Home, tmp_path: Path) -> None:
    home.back_up()
    vault = home.vault()
    ref = manifest_of(vault).tables[0].chunks[:1] or manifest_of(vault).blobs[:1]
    path = home.to / vault.name("chunks", ref[0].digest)
    path.write_bytes(b"".join(backup_vault._packed([bytes(1 << 20)] * 200)))
    sizes: list[int] = []
    with pytest.raises(CorruptError, match="is damaged"):
        sizes.extend(map(len, vault.stream("chunks", ref[0])))
    assert sum(sizes) <= ref[0].size_bytes


def test_links_in_the_destination_are_refused(home: Home, tmp_path: Path) -> None:
    home.back_up()
    victim = home.objects("blobs")[0]
    shutil.move(victim, tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    assert any("symbolic link" in problem for problem in home.check())
    with pytest.raises(CorruptError, match="symbolic link"):
        home.back_up()


def test_the_chain_is_checked(home: Home, tmp_path: Path) -> None:
    home.records.seal()
    with home.records.writing() as connection:
        connection.execute("UPDATE events SET actor = 'somebody else' WHERE seq = 5")
    home.back_up()
    assert any("event 5" in problem and "altered" in problem for problem in home.check())
    assert "event 5" in restore(home.vault(), tmp_path / "new").chain_problem


# --------------------------------------------------------------------------- encryption


@given(size=st.sampled_from([0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]))
def test_what_is_sealed_opens_and_has_the_size_that_is_foretold(size: int) -> None:
    key, data = BackupKey(bytes(32)), os.urandom(size)
    sealed = b"".join(key.seal("blobs/aa/bb", [data[:7], data[7:]]))
    assert len(sealed) == key.sealed_size(size)
    assert key.plain_size(len(sealed)) == size
    assert key.open("blobs/aa/bb", io.BytesIO(sealed), size).read() == data


def test_segments_cannot_be_moved_dropped_or_renamed() -> None:
    key, size = BackupKey(bytes(32)), 3 * CHUNK_BYTES
    sealed = b"".join(key.seal("blobs/aa/bb", [os.urandom(size)]))
    part = CHUNK_BYTES + 16
    head = sealed[: len(sealed) - 3 * part]
    one, two, three = (sealed[len(head) + n * part :][:part] for n in range(3))

    def opened(data: bytes, name: str = "blobs/aa/bb", secret: bytes = bytes(32)) -> None:
        other = BackupKey(secret)
        for said in (size, max(0, other.plain_size(len(data)))):
            with pytest.raises(CorruptError):
                other.open(name, io.BytesIO(data), said).read()

    for changed in (head + two + one + three, head + one + two, head + one + two + three + three, head, b"", head[:9]):
        opened(changed)
    opened(sealed, name="blobs/aa/cc")
    opened(sealed, secret=b"1" * 32)
    assert repr(key) == "BackupKey(…)"


def test_what_another_version_has_sealed_is_refused() -> None:
    key = BackupKey(bytes(32))
    sealed = b"".join(key.seal("blobs/aa/bb", [b"x"]))
    for version in (b"1", b"3"):
        with pytest.raises(SchemaVersionError, match="does not know"):
            key.open("blobs/aa/bb", io.BytesIO(b"MRB" + version + sealed[4:]), 1)


def test_neither_names_nor_bytes_say_what_is_in_it(home: Home) -> None:
    canary = home.dataset("canary", b"the canary sings " * 100)
    home.back_up(KEY)
    for path in home.to.rglob("*"):
        assert canary[9:] not in path.name
        assert not path.is_file() or b"canary" not in path.read_bytes()


def test_the_wrong_key_none_and_a_downgrade_are_refused(home: Home) -> None:
    home.back_up(KEY)
    with pytest.raises(InputError, match="another key"):
        home.back_up("22" * 32)
    with pytest.raises(InputError, match="is encrypted"):
        home.back_up()
    (home.to / "format.json").write_text('{"format": 1}')  # by whoever can write there
    with pytest.raises(InputError, match="is not encrypted"):
        home.back_up(KEY)
    with pytest.raises(CorruptError):
        home.check()


def test_keys_are_read_from_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytes(range(32))
    check = BackupKey(raw).check
    for data in (raw, raw.hex().encode() + b"\n", b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="):
        (tmp_path / "key").write_bytes(data)
        (tmp_path / "key").chmod(0o600)
        assert read_key(f"file:{tmp_path}/key").check == check
    monkeypatch.setenv("A_KEY", raw.hex())
    assert read_key("env:A_KEY").check == check
    (tmp_path / "key").write_bytes(b"hunter2 is not a key")
    for text in (f"file:{tmp_path}/key", f"file:{tmp_path}/none", "env:NO_SUCH", "hunter2", "pass:hunter2"):
        with pytest.raises(InputError) as caught:
            read_key(text)
        assert "hunter2 is not" not in caught.value.message


# --------------------------------------------------------------------------- restoring


def test_a_home_that_has_something_is_refused(home: Home, tmp_path: Path) -> None:
    home.back_up()
    used = open_records(tmp_path / "used/records.db")
    used.put(Run(id="r"))
    used.close()
    before = digest_of(tmp_path / "used")
    with pytest.raises(ConflictError, match="it has records"):
        restore(home.vault(), tmp_path / "used")
    assert digest_of(tmp_path / "used") == before
    LocalBlobs(tmp_path / "stored/blobs").put(b"something")
    with pytest.raises(ConflictError, match="it has blobs"):
        restore(home.vault(), tmp_path / "stored")
    backup_marker.write(tmp_path, backup_marker.Restoring(source="x", backup="another"))
    with pytest.raises(ConflictError, match="another backup"):
        restore(home.vault(), tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from millrace.control.backup_checking import chosen
from millrace.control.backup_making import Options, make_backup
from millrace.control.backup_restoring import Target, restore_backup
from millrace.store.backup_vault import Vault
from millrace.store.backup_place import FolderPlace
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records
from millrace.wiring import open_services

what, home, to, stage, count = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
seen = 0

def between(now):
    global seen
    seen += now.startswith(stage)
    if seen == count:
        os.kill(os.getpid(), signal.SIGKILL)

vault, services = Vault(FolderPlace(to), None), open_services(str(home))
if what == "backup":
    make_backup(services, vault, Options(), between)
else:
    target = Target(home, lambda: open_records(home / "records.db"), LocalBlobs(home / "blobs"))
    restore_backup(vault, vault.manifest(chosen(vault, None))[0], target, services.clock, between)
"""


def kill(what: str, home: Path, to: Path, stage: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, what, str(home), str(to), stage, str(count)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(("stage", "count"), [("rows", 1), ("blobs", 1), ("sha256", 20), ("manifest", 1)])
def test_a_killed_backup_does_not_count_and_the_next_one_uses_what_it_left(
    home: Home, tmp_path: Path, stage: str, count: int
) -> None:
    kill("backup", home.folder, home.to, stage, count)
    assert home.vault().manifests() == []
    with pytest.raises(NotFoundError, match="has no backup"):
        home.check()
    left = {path: path.stat().st_mtime_ns for path in home.objects("blobs")}
    assert bool(left) == (stage in ("sha256", "manifest"))
    made = home.back_up()
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert home.check() == []
    assert restore(home.vault(), tmp_path / "new").digest == made.digest


@pytest.mark.parametrize(
    ("stage", "count"),
    [("blobs", 1), ("sha256", 15), ("records", 1), ("table runs", 1), ("table steps", 1), ("commit", 1), ("end", 1)],
)
def test_a_killed_restore_is_not_believed_and_goes_on(home: Home, tmp_path: Path, stage: str, count: int) -> None:
    made = home.back_up()
    new = tmp_path / "new"
    kill("restore", new, home.to, stage, count)
    with pytest.raises(ConflictError, match="is being restored") as caught:
        _ = open_services(str(new)).records
    assert str(home.to) in caught.value.hint
    left = {one.digest: LocalBlobs(new / "blobs").modified_at(one.digest) for one in LocalBlobs(new / "blobs").list()}
    done = restore(home.vault(), new)
    assert done.digest == made.digest == digest_of(new)
    assert all(LocalBlobs(new / "blobs").modified_at(digest) == at for digest, at in left.items())
    assert stage not in ("sha256", "commit", "end") or len(left) >= count
    opened = open_services(str(new))
    assert opened.records.get(Run, "r1") is not None
    opened.close()


def test_a_restore_that_goes_on_believes_no_blob_that_a_power_cut_has_left(home: Home, tmp_path: Path) -> None:
    made = home.back_up()
    new = tmp_path / "new"
    kill("restore", new, home.to, "sha256", 15)
    for digest in [one.digest for one in LocalBlobs(new / "blobs").list()][:3]:
        path = new / "blobs/sha256" / digest[7:9] / digest[9:]
        path.chmod(0o600)
        path.write_bytes(bytes(path.stat().st_size))  # the size is there, the bytes are not
    (new / "records.db").write_bytes(b"half a page")
    assert restore(home.vault(), new).digest == made.digest == digest_of(new)
    assert {one.digest for one in LocalBlobs(new / "blobs").list()} == {
        one.digest for one in home.services.blobs.list()
    }
    assert all(LocalBlobs(new / "blobs").read(one.digest) for one in home.services.blobs.list())


def test_records_that_read_back_differently_are_not_kept(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.back_up()
    monkeypatch.setattr(backup_restoring, "SAMPLE_OF", 1)
    true_insert = backup_filling.insert

    def bad_memory(into: Any, name: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        true_insert(into, name, columns, [(*row[:-1], row[-1] + " ") for row in rows] if name == "steps" else rows)

    monkeypatch.setattr(backup_filling, "insert", bad_memory)
    with pytest.raises(CorruptError, match="read back differently"):
        restore(home.vault(), tmp_path / "new")
    monkeypatch.undo()
    assert restore(home.vault(), tmp_path / "new").digest == digest_of(tmp_path / "new")


def test_a_killed_restore_of_something_else_is_not_continued(home: Home, tmp_path: Path) -> None:
    home.back_up()
    kill("restore", tmp_path / "new", home.to, "records", 1)
    home.run(500)
    home.back_up()
    with pytest.raises(ConflictError, match="another backup"):
        restore(home.vault(), tmp_path / "new")


def test_a_restore_is_an_event_of_the_restored_home(home: Home, tmp_path: Path) -> None:
    made = home.dispatcher.call("system.backup", {"to": str(home.to)})
    other = open_dispatcher(str(tmp_path / "new"))
    done = other.call("system.restore", {"source": str(home.to), "signer": made.signed_by})
    assert (done.digest, done.rows, done.problems) == (made.digest, made.rows, [])
    other.services.records.seal()
    last = other.services.records.events()[-1]
    assert (last.verb, last.detail["digest"]) == ("system.restore", made.digest)
    with pytest.raises(ConflictError, match="not empty"):
        other.call("system.restore", {"source": str(home.to), "signer": made.signed_by})
    again = other.call("system.backup", {"to": str(home.to)})  # the restored home goes on there
    assert again.rows > made.rows
    other.close()


# --------------------------------------------------------------------------- drill


def test_a_drill_restores_compares_and_leaves_nothing(home: Home) -> None:
    with home.records.transaction() as transaction:
        transaction.delete(ModelVersion, "m/1")
    made = home.dispatcher.call("system.backup", {"to": str(home.to)})
    done = home.dispatcher.call("system.drill", {"source": str(home.to)})
    assert (done.digest, done.rows, done.problems, done.model) == (made.digest, made.rows, [], "there is none")
    assert done.took_s >= done.blobs_s
    assert list((home.folder / "scratch").iterdir()) == []


def test_a_drill_says_that_a_model_does_not_open(home: Home) -> None:
    home.back_up()
    done = home.dispatcher.call("system.drill", {"source": str(home.to)})
    assert done.model == "m v1"
    assert any("m v1 does not open" in problem for problem in done.problems)
    flip(home.objects("blobs")[0])
    with pytest.raises(CorruptError):
        home.dispatcher.call("system.drill", {"source": str(home.to)})
    assert list((home.folder / "scratch").iterdir()) == []


# --------------------------------------------------------------------------- keeping

DAY_US = 86_400_000_000
IDS = st.lists(st.integers(19_000 * DAY_US, 19_100 * DAY_US), unique=True, max_size=60).map(
    lambda found: [f"{at:014x}{'0' * 18}" for at in found]
)


@given(ids=IDS, daily=st.integers(0, 10), weekly=st.integers(0, 10))
def test_the_newest_and_the_newest_of_days_and_weeks_are_kept(ids: list[str], daily: int, weekly: int) -> None:
    stay = kept(ids, daily, weekly)
    assert stay <= set(ids)
    assert not ids or max(ids) in stay
    assert len(stay) <= max(daily, 1) + weekly
    days = {int(made_at(id) // 86_400) for id in ids}
    newest_of = {day: max(id for id in ids if int(made_at(id) // 86_400) == day) for day in days}
    assert {newest_of[day] for day in sorted(days, reverse=True)[:daily]} <= stay
    assert kept(stay, daily, weekly) == stay  # pruning again removes nothing more


def test_pruning_removes_what_no_kept_backup_needs_and_nothing_else(home: Home, tmp_path: Path) -> None:
    home.dataset("old", b"only in the first")
    first = home.back_up()
    with home.records.transaction() as transaction:
        transaction.delete(DatasetVersion, "old/1")
    home.run(200)
    second = home.back_up()
    orphan = home.to / "blobs/ab"
    orphan.mkdir(exist_ok=True)
    (orphan / ("c" * 62)).write_bytes(b"of a killed backup")
    done = prune_backups(home.services, home.vault(), daily=1, weekly=0)
    assert (done.kept, done.removed) == ([second.manifest.id], [first.manifest.id])
    assert done.objects >= 3
    assert home.check() == []
    assert not home.object_of(home.services.blobs.put(b"only in the first").digest).exists()
    assert not (orphan / ("c" * 62)).exists()
    assert restore(home.vault(), tmp_path / "new").digest == digest_of(tmp_path / "new")
    assert prune_backups(home.services, home.vault(), daily=1, weekly=0).objects == 0


def test_pruning_and_a_backup_take_turns(home: Home) -> None:
    home.back_up()
    home.run(300)
    waited: list[bool] = []

    def prune() -> None:
        prune_backups(home.services, home.vault(), daily=1, weekly=0)
        waited.append(True)

    pruner = threading.Thread(target=prune)

    def between(what: str) -> None:
        if what == "rows":
            pruner.start()
        assert not waited

    make_backup(home.services, home.vault(), Options(), between)
    pruner.join()
    assert waited == [True]
    assert home.check() == []


def test_nothing_is_pruned_that_is_not_understood_or_not_ours(home: Home, tmp_path: Path) -> None:
    made = home.back_up()
    home.run(1)
    home.back_up()
    before = {path for path in home.to.rglob("*") if path.is_file()}
    flip(home.to / "manifests" / chosen(home.vault(), None), 30)
    with pytest.raises(CorruptError):
        prune_backups(home.services, home.vault(), daily=1, weekly=0)
    assert {path for path in home.to.rglob("*") if path.is_file()} == before
    other = Home(tmp_path / "other")
    other.run(1)
    other.records.seal()
    other.to = home.to
    with pytest.raises(ConflictError, match="another home"):
        prune_backups(other.services, other.vault(), daily=0, weekly=0)
    with pytest.raises(ConflictError, match="another home"):
        other.back_up()
    other.dispatcher.close()
    assert (home.to / "manifests" / made.manifest.id).is_file()


# --------------------------------------------------------------------------- the verbs


def test_who_does_not_own_the_home_names_no_paths(home: Home) -> None:
    principal = Principal(id="user:eve", grants=(Grant(role="maintainer"),))
    from_outside = Dispatcher(home.services)
    from_outside._principal = principal
    for operation, body in (
        ("system.backup", {"to": "/tmp/x"}),
        ("system.restore", {"source": "/tmp/x"}),
    ):
        with pytest.raises(DeniedError):
            from_outside.call(operation, body)
    assert not home.to.exists()


def test_a_destination_is_wanted_and_listed(home: Home, tmp_path: Path) -> None:
    for operation in ("system.backup", "system.backups", "system.verify", "system.drill", "system.prune"):
        with pytest.raises(InputError, match="want a destination"):
            home.dispatcher.call(operation, {})
    assert home.dispatcher.call("system.backups", {"to": str(home.to)}) == []
    made = home.back_up()
    home.back_up()
    flip(home.to / "manifests" / made.manifest.id, 25)
    newest, damaged = home.dispatcher.call("system.backups", {"to": str(home.to)})
    assert newest.problem == ""
    assert damaged.id == made.manifest.id
    assert damaged.problem != ""
    assert abs(damaged.created_at - made.manifest.created_at) < 5
    with pytest.raises(InputError, match="2 backups begin"):
        chosen(home.vault(), "0")
    with pytest.raises(NotFoundError, match="no home"):
        open_dispatcher(str(tmp_path / "none")).call("system.backup", {"to": str(home.to)})


def test_a_folder_of_something_else_is_no_destination(home: Home) -> None:
    home.to.mkdir()
    (home.to / "photo.jpg").write_bytes(b"x")
    for to in (str(home.to), "/", str(home.folder)):
        with pytest.raises(ConflictError, match="other files"):
            home.dispatcher.call("system.backup", {"to": to})
    assert [one.name for one in home.to.iterdir()] == ["photo.jpg"]
    (home.to / "photo.jpg").unlink()
    assert home.back_up().manifest.rows > 0


# --------------------------------------------------------------------------- by the clock


def scheduled(home: Home, **changes: Any) -> ScheduledBackups:
    values = {"backup_to": str(home.to), "backup_every_s": 3600.0, **changes}
    home.services.settings = {
        name: msgspec.structs.replace(value, value=values.get(name, value.value))
        for name, value in home.services.settings.items()
    }
    return ScheduledBackups(home.services)


def wait_for(part: ScheduledBackups, lease: Any) -> None:
    assert part._process is not None
    part._process.wait(60)
    part(lease)


def test_the_leader_makes_backups_when_they_are_due(home: Home) -> None:
    clock = home.services.clock = FakeClock(1e9)
    lease = take_lead(home.services)
    assert lease is not None
    off = scheduled(home, backup_every_s=0.0)
    off(lease)
    assert off._process is None
    part = scheduled(home)
    part(lease)
    wait_for(part, lease)
    assert len(home.vault().manifests()) == 1
    home.records.seal()
    made = [event for event in home.records.events() if event.verb == "system.backup"]
    assert [(event.subject, event.detail["outcome"]) for event in made] == [(f"backup:{home.to}", "ok")]
    part(lease)
    assert part._process is None
    clock.sleep(3601)
    part(lease)
    wait_for(part, lease)
    assert len(home.vault().manifests()) == 1  # of one day the newest is kept
    assert home.records.find(Alert) == []
    home.records.seal()
    last = max(event.at for event in home.records.events() if event.verb == "system.backup")
    again = scheduled(home)  # another leader knows from the events when the last one was
    assert abs(again._last() - last) < 1e-6


def test_a_failed_backup_is_an_alert_until_one_succeeds(home: Home) -> None:
    clock = home.services.clock = FakeClock(1e9)
    lease = take_lead(home.services)
    assert lease is not None
    home.to.write_text("a file is in the way")
    part = scheduled(home)
    part(lease)
    wait_for(part, lease)
    (alert,) = home.records.find(Alert)
    assert (alert.state, alert.signal, alert.facts["to"]) == ("open", "backup", str(home.to))
    assert str(home.to) in alert.title
    assert home.dispatcher.call("system.status", {}).open_alerts == 1
    home.records.seal()
    failed = [event for event in home.records.events() if event.verb == "system.backup"]
    assert failed[-1].detail["outcome"] != "ok"
    part(lease)
    assert part._process is None
    clock.sleep(RETRY_S + 1)
    part(lease)
    assert part._process is not None
    os.kill(part._process.pid, signal.SIGKILL)
    wait_for(part, lease)
    home.records.seal()
    assert home.records.events()[-1].detail == {"outcome": "killed", "signal": 9}
    home.to.unlink()
    clock.sleep(RETRY_S + 1)
    part(lease)
    wait_for(part, lease)
    assert [alert.state for alert in home.records.find(Alert)] == ["resolved"]


def test_stopping_the_loop_ends_the_command(home: Home) -> None:
    home.services.clock = FakeClock(1e9)
    lease = take_lead(home.services)
    assert lease is not None
    part = scheduled(home)
    part(lease)
    process = part._process
    assert process is not None
    part.close()
    assert process.poll() is not None
    part.close()


# --------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_leaves_nothing_half(home: Home, disk: Path, tmp_path: Path) -> None:
    home.to = disk / "to"
    with pytest.raises(DiskFullError):
        home.back_up()  # a model of three megabytes is in the way
    assert home.vault().manifests() == []
    assert not [path for path in home.to.rglob("*") if path.name.startswith(".writing")]
    with home.records.transaction() as transaction:
        transaction.delete(ModelVersion, "m/1")
    home.back_up()
    assert home.check() == []
    home.to = tmp_path / "large"
    home.dataset("big", os.urandom(3_000_000))
    home.back_up()
    with pytest.raises(DiskFullError):
        restore(home.vault(), disk / "new")
    assert backup_marker.read(disk / "new") is not None
    with pytest.raises(MillraceError, match="being restored"):
        _ = open_services(str(disk / "new")).records
