"""A backup taken on SQLite under load restores on Postgres and S3 and verifies; and back again. As people do it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from typing_by_hand import command, environment, run_millrace

from millrace.client.http import HttpTransport
from millrace.core.types import MetricPoint
from millrace.security import chain
from millrace.store import postgres
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.records_sql import open_records
from millrace.store.transfer import records_digest
from millrace.testing.moto_server import MotoServer
from millrace.testing.postgres import new_records_url
from millrace.testing.radosgw import Radosgw, missing_programs
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.xdist_group("postgres")
KEY = "5e" * 32


def variables(server: Any) -> dict[str, str]:
    """How the store is reached, with the bucket `millrace` made in it."""
    found = {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key, "AWS_REGION": server.region,
    }  # fmt: skip
    boto3.client(
        "s3", endpoint_url=server.endpoint, aws_access_key_id=server.access_key, region_name=server.region,
        aws_secret_access_key=server.secret_key,
    ).create_bucket(Bucket="millrace")  # fmt: skip
    return found


@pytest.fixture(params=["moto", pytest.param("radosgw", marks=pytest.mark.services)])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    if request.param == "moto":
        server = MotoServer(tmp_path / "moto").start()
        yield variables(server)
        server.stop()
        return
    if missing_programs():
        pytest.skip("radosgw, ceph-mon and ceph-osd are not installed")
    with tempfile.TemporaryDirectory(prefix="rgw") as folder:
        gateway = Radosgw(Path(folder)).start()
        try:
            yield variables(gateway)
        finally:
            gateway.stop()


class Writers:
    """Several clients of a server that track runs, with metrics and files, until told to stop."""

    def __init__(self, url: str, folder: Path, count: int = 3) -> None:
        self._url, self._folder = url, folder
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(count)]
        self.written: list[str] = []  # acknowledged

    def _write(self, number: int) -> None:
        transport = HttpTransport(self._url)
        round = 0
        while not self._stop.is_set():
            round += 1
            run = transport.call("run.track", {"name": f"w{number}-{round}", "params": {"lr": 0.1}})
            points = [MetricPoint(run.id, "loss", step, 1.0 / (step + 1), 1.0) for step in range(50)]
            transport.call("run.log", {"run": run.id, "points": points, "tags": {"a": "b"}})
            path = self._folder / f"w{number}"
            path.write_bytes(f"{number} {round} ".encode() * 2000)
            transport.call("run.artifact", {"run": run.id, "name": "w", "path": str(path)})
            transport.call("run.end", {"run": run.id})
            self.written.append(run.id)
        transport.close()

    def wait_for(self, count: int) -> None:
        while len(self.written) < count:
            self._stop.wait(0.01)

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def millrace(*arguments: str, code: int = 0, **variables: str) -> Any:
    """The answer of a command as JSON."""
    done = subprocess.run(
        command(*arguments, "--json"), env={**environment(), **variables}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if code == 0 else done.stdout


@pytest.mark.rotating(1, "backups")
def test_under_load_from_sqlite_to_postgres_and_s3_and_back(tmp_path: Path, store: dict[str, str]) -> None:
    home, to = str(tmp_path / "home"), "s3://millrace/backups"
    keyed = {**store, "BACKUP_KEY": KEY}
    flags = ("--encrypt-key", "env:BACKUP_KEY")
    with RunningServer(Path(home)) as server, Writers(server.url, tmp_path) as writers:
        writers.wait_for(6)
        first = millrace("--home", home, "system", "backup", to, *flags, **keyed)
        acknowledged = list(writers.written)
        writers.wait_for(len(acknowledged) + 6)
        last = millrace("--home", home, "system", "backup", to, *flags, "--include-keys", **keyed)
        writers.wait_for(len(acknowledged) + 9)  # they never had to stop
    assert first["missing"] == last["missing"] == []
    assert last["rows"] > first["rows"]
    assert len(millrace("--home", home, "system", "backups", to, *flags, **keyed)) == 2
    assert millrace("--home", home, "system", "verify", to, *flags, **keyed)["problems"] == []

    there = {**keyed, "MILLRACE_RECORDS_URL": new_records_url(), "MILLRACE_BLOBS_URL": "s3://millrace/blobs"}
    new = str(tmp_path / "new")
    restored = millrace("--home", new, "system", "restore", to, *flags, "--backup", last["id"], **there)
    assert (restored["rows"], restored["blobs"], restored["problems"]) == (last["rows"], last["blobs"], [])
    assert last["digest"] in ("", restored["digest"])
    runs = {run["id"] for run in millrace("--home", new, "runs", "--limit", "10000", **there)}
    assert set(acknowledged) <= runs
    with pytest.MonkeyPatch.context() as patch:
        for name, value in there.items():
            patch.setenv(name, value)
        records = postgres.open_records(there["MILLRACE_RECORDS_URL"])
        records.seal()
        assert chain.verify(records.links(limit=10**6), head=records.head()).broken is None
        blobs = RemoteBlobs("s3://millrace/blobs", tmp_path / "cache")
        assert len(list(blobs.list())) == last["blobs"]
        for artifact in blobs.list():
            blobs.read(artifact.digest)
        blobs.close()
        records.close()
    millrace("--home", new, "system", "restore", to, *flags, code=4, **there)  # not empty any more

    back = millrace("--home", new, "system", "backup", str(tmp_path / "back"), **there)
    assert back["missing"] == []
    local = millrace(
        "--home", str(tmp_path / "local"), "system", "restore", str(tmp_path / "back"), "--signer", back["signed_by"]
    )
    assert local["digest"] == back["digest"]
    assert local["blobs"] == last["blobs"]


def test_the_same_digests_on_every_kind_of_store(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    with RunningServer(Path(home)) as server, Writers(server.url, tmp_path) as writers:
        writers.wait_for(5)
    records = open_records(tmp_path / "home/records.db")
    records.seal()
    digest = records_digest(records)
    records.close()
    made = millrace("--home", home, "system", "backup", str(tmp_path / "to"))
    assert made["digest"] == digest
    url = new_records_url()
    done = millrace(
        "--home", str(tmp_path / "new"), "system", "restore", str(tmp_path / "to"), "--signer", made["signed_by"],
        MILLRACE_RECORDS_URL=url, MILLRACE_BLOBS_URL=f"file://{tmp_path}/bucket",
    )  # fmt: skip
    assert done["digest"] == digest


@pytest.mark.rotating(1, "backups")
def test_a_server_backs_up_by_the_clock_and_says_when_it_fails(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "to").write_text("a file is in the way")
    (home / "settings.yaml").write_text(f"backup_to: {tmp_path / 'to'}\nbackup_every_s: 1\n")
    with RunningServer(home) as server:
        alerts: list[Any] = []
        while not alerts:
            alerts = millrace("--home", str(home), "alerts")
        assert str(tmp_path / "to") in alerts[0]["title"]
        assert millrace("--home", str(home), "status")["open_alerts"] == 1
        os.unlink(tmp_path / "to")
        while millrace("--home", str(home), "status")["open_alerts"]:
            pass
        found = millrace("--home", str(home), "system", "backups")  # by the server, from its own settings
        assert found[0]["problem"] == ""
        assert server.pid
    assert millrace("--home", str(home), "system", "verify")["problems"] == []


def test_what_is_broken_is_said_with_exit_code_8(tmp_path: Path) -> None:
    home, to = str(tmp_path / "home"), tmp_path / "to"
    with RunningServer(Path(home)) as server, Writers(server.url, tmp_path) as writers:
        writers.wait_for(3)
    millrace("--home", home, "system", "backup", str(to))
    victim = next(path for path in (to / "blobs").rglob("*") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    assert "is damaged" in millrace("--home", home, "system", "verify", str(to), code=8)
    stranger = run_millrace(tmp_path, "--home", "other", "system", "restore", "to", code=8)
    assert "--signer ed25519:" in stranger.stderr


@pytest.mark.slow
@pytest.mark.rotating(1, "backups")
def test_a_drill_opens_a_real_model(small: Path) -> None:
    run_millrace(small, "run")
    made = json.loads(run_millrace(small, "system", "backup", "to", "--json").stdout)
    drilled = json.loads(run_millrace(small, "system", "drill", "to", "--json").stdout)
    assert (drilled["model"], drilled["problems"]) == ("cancer v1", [])
    assert drilled["digest"] == made["digest"]
    run_millrace(small, "--home", "new", "system", "restore", "to", "--signer", made["signed_by"])
    assert "succeeded" in run_millrace(small, "--home", "new", "runs").stdout
