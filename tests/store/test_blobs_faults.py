"""RemoteBlobs before an S3 that errs, stalls, breaks off and lies: tried again, then said; never silent."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest

from millrace.core.errors import CorruptError, DeniedError, DiskFullError, MillraceError, UnavailableError
from millrace.core.ids import new_id
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.object_store import RemoteOptions
from millrace.testing.moto_server import MotoServer

BUCKET = "blobs"
SMALL = b"some bytes" * 1000
STALL_S = 2.0  # longer than one impatient try may take
QUICK = {"request_timeout_s": 10.0, "deadline_s": 5.0, "max_retries": 3}
IMPATIENT = {"request_timeout_s": 0.5, "deadline_s": 1.0, "max_retries": 3}


class FaultyS3(ThreadingHTTPServer):
    """Passes requests on to a real S3 and spoils those that `fault` names.

    Faults: a status code; `cut` (no answer, not passed on), `lost` (passed on, no answer), `stall`,
    `truncate` (breaks off in the middle), `short` (half a body that says it is whole), `flip` (another byte).
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlsplit(target).netloc
        self.fault: Callable[[str, str], str] = lambda _method, _path: ""
        self.seen: list[str] = []

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def spoil(self, fault: str, methods: str, times: int) -> None:
        """Spoil the next so many requests by any of these methods."""
        left = [times]

        def choose(method: str, _path: str) -> str:
            if method in methods and left[0] > 0:
                left[0] -= 1
                return fault
            return ""

        self.fault = choose


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        """Pass on, spoiled or not."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        self.server.seen.append(f"{self.command} {fault}".strip())
        if fault.isdigit():
            return self.answer(int(fault), b"<Error><Code>SlowDown</Code></Error>", {})
        if fault == "cut":
            return self.break_off()
        if fault == "stall":
            time.sleep(STALL_S)
            return self.break_off()
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        upstream.close()
        if fault == "lost":
            return self.break_off()
        if fault in ("short", "flip") and data:
            data = data[: len(data) // 2] if fault == "short" else bytes([data[0] ^ 1]) + data[1:]
            headers["Content-Length"] = str(len(data))
        return self.answer(answer.status, data, headers, fault == "truncate" and bool(data))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def answer(self, status: int, data: bytes, headers: dict[str, str], is_truncated: bool = False) -> None:
        """Send it, or half of it."""
        self.send_response_only(status)
        skipped = ("connection", "transfer-encoding", "content-length")
        for name, value in headers.items():
            if name.lower() not in skipped:
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_truncated else data)
        if is_truncated:
            self.break_off()

    def break_off(self) -> None:
        """Close the connection."""
        self.close_connection = True
        self.connection.shutdown(2)


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """The S3 behind."""
    server = MotoServer(tmp_path_factory.mktemp("moto")).start()
    boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id="any",
        aws_secret_access_key="any",
    ).create_bucket(Bucket=BUCKET)
    yield server
    server.stop()


@pytest.fixture
def faulty(moto: MotoServer) -> Iterator[FaultyS3]:
    """The S3 before it."""
    server = FaultyS3(moto.endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def blobs(faulty: FaultyS3, tmp_path: Path) -> RemoteBlobs:
    """Empty blobs behind the faulty one."""
    config = {"endpoint": faulty.endpoint, "access_key_id": "KEYID", "secret_access_key": "hush-hush", "region": "r"}
    return RemoteBlobs(f"s3://{BUCKET}/{new_id()}", tmp_path / "cache", RemoteOptions(config=config, **QUICK))


def impatient(blobs: RemoteBlobs, place: Path) -> RemoteBlobs:
    """The same blobs, given up on sooner."""
    config = blobs._options.config
    return RemoteBlobs(blobs.url, place / "cache", RemoteOptions(config=config, **IMPATIENT))


def files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [one for one in folder.rglob("*") if one.is_file()]


def refused(error: type[MillraceError], says: str, ask: Callable[[], object]) -> None:
    """The refusal has this class and text, and shows no secret anywhere."""
    with pytest.raises(error, match=says) as caught:
        ask()
    shown = "".join(traceback.format_exception(caught.value))
    assert "hush-hush" not in shown
    assert "KEYID" not in shown


@pytest.mark.parametrize("fault", ["500", "503", "cut", "truncate", "stall"])
def test_two_bad_answers_are_tried_again(blobs: RemoteBlobs, faulty: FaultyS3, tmp_path: Path, fault: str) -> None:
    digest = blobs.put(SMALL).digest
    if fault == "stall":
        blobs = impatient(blobs, tmp_path)
    faulty.spoil(fault, "GET", times=1 if fault == "stall" else 2)
    assert blobs.read(digest) == SMALL
    faulty.spoil(fault, "GET", times=1)
    assert blobs.path(digest).read_bytes() == SMALL
    if fault != "truncate":  # what is not read is not truncated
        faulty.spoil(fault, "HEAD", times=1)
        assert blobs.exists(digest)
        faulty.spoil(fault, "PUT", times=1)
        assert blobs.read(blobs.put(b"other").digest) == b"other"


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("fault", ["500", "503", "cut", "lost"])
def test_parts_are_sent_again(blobs: RemoteBlobs, faulty: FaultyS3, tmp_path: Path, fault: str, method: str) -> None:
    (tmp_path / "file").write_bytes(os.urandom(10 << 20))
    faulty.spoil(fault, method, times=2)
    digest = blobs.put(tmp_path / "file").digest
    assert f"{method} {fault}" in faulty.seen
    assert blobs.read(digest) == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("fault", ["500", "503", "cut", "stall"])
def test_a_store_that_keeps_failing_is_unavailable(
    blobs: RemoteBlobs, faulty: FaultyS3, tmp_path: Path, fault: str
) -> None:
    digest = blobs.put(SMALL).digest
    absent = "sha256:" + hashlib.sha256(b"never stored").hexdigest()
    patient, blobs = blobs, impatient(blobs, tmp_path)
    faulty.spoil(fault, "GETPUTPOSTHEADDELETE", times=10**6)
    says = fault if fault.isdigit() else "the store "
    for ask in (
        lambda: blobs.put(b"never stored"),
        lambda: blobs.read(digest),
        lambda: blobs.path(digest),
        lambda: list(blobs.list()),
        lambda: blobs.delete(digest),
    ):
        refused(UnavailableError, says, ask)
    faulty.spoil("", "", times=0)
    assert files(tmp_path / "cache") == []
    assert (patient.exists(absent), patient.read(digest)) == (False, SMALL)


def test_a_stream_that_cannot_be_stored_leaves_nothing(blobs: RemoteBlobs, faulty: FaultyS3, tmp_path: Path) -> None:
    faulty.spoil("503", "PUTPOST", times=10**6)
    refused(UnavailableError, "503", lambda: blobs.put(io.BytesIO(os.urandom(9 << 20))))
    faulty.spoil("", "", times=0)
    assert files(tmp_path / "cache") == []
    assert list(blobs.list()) == []


@pytest.mark.parametrize(
    ("fault", "error"), [("truncate", UnavailableError), ("short", UnavailableError), ("flip", CorruptError)]
)
def test_a_body_that_is_never_whole(
    blobs: RemoteBlobs, faulty: FaultyS3, tmp_path: Path, fault: str, error: type[MillraceError]
) -> None:
    digest = blobs.put(SMALL).digest
    faulty.spoil(fault, "GET", times=10**6)
    for ask in (lambda: blobs.read(digest), lambda: blobs.path(digest), lambda: blobs.open(digest).read()):
        refused(error, ".", ask)
    assert files(tmp_path / "cache") == []


def test_a_put_whose_answer_was_lost_is_stored(blobs: RemoteBlobs, faulty: FaultyS3) -> None:
    """The second try finds the object of the first: equal bytes, so it counts."""
    faulty.spoil("lost", "PUT", times=1)
    digest = blobs.put(SMALL).digest
    assert [one for one in faulty.seen if one.startswith("PUT")][:2] == ["PUT lost", "PUT"]
    assert blobs.read(digest) == SMALL


def test_a_large_put_whose_last_answer_was_lost_is_stored(blobs: RemoteBlobs, faulty: FaultyS3, tmp_path: Path) -> None:
    """The parts became one object; asking to complete them again finds no upload."""
    (tmp_path / "file").write_bytes(os.urandom(10 << 20))
    faulty.fault = lambda method, path: "lost" if method == "POST" and "uploadId=" in path else ""
    digest = blobs.put(tmp_path / "file").digest
    assert "POST lost" in faulty.seen
    assert blobs.read(digest) == (tmp_path / "file").read_bytes()


def test_a_refusal_is_not_tried_again(blobs: RemoteBlobs, faulty: FaultyS3) -> None:
    faulty.spoil("403", "GETPUTPOSTHEADDELETE", times=10**6)
    refused(DeniedError, "refuses these credentials", lambda: blobs.put(SMALL))
    assert faulty.seen == ["PUT 403"]


def test_nobody_there(tmp_path: Path) -> None:
    config = {"endpoint": "http://127.0.0.1:9", "access_key_id": "KEYID", "secret_access_key": "hush-hush"}
    blobs = RemoteBlobs("s3://b/p", tmp_path / "cache", RemoteOptions(config=config, **QUICK))
    refused(UnavailableError, "cannot be reached", lambda: blobs.put(SMALL))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_of_the_cache(blobs: RemoteBlobs, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr}")
    try:
        small = RemoteBlobs(blobs.url, place / "cache", blobs._options)
        data = os.urandom(9 << 20)
        refused(DiskFullError, "full", lambda: small.put(io.BytesIO(data)))
        digest = blobs.put(data).digest
        refused(DiskFullError, "full", lambda: small.path(digest))
        assert files(place) == []
        assert small.path(small.put(b"fits").digest).read_bytes() == b"fits"
        assert small.read(digest) == data
        small.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
