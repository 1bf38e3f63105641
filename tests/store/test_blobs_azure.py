"""RemoteBlobs on Azure's own emulator, Azurite: `npm install azurite`, and AZURITE names the program."""

from __future__ import annotations

import base64
import email.utils
import hmac
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from millrace.core.errors import DeniedError
from millrace.core.ids import digest_bytes, new_id
from millrace.core.ports import Blobs
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.object_store import RemoteOptions
from millrace.testing.blobs import BlobAgeConformance, BlobDiscardConformance, BlobsConformance
from millrace.testing.radosgw import free_port

AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob")
CONTAINER, ACCOUNT = "blobs", "millrace"
KEY = "bWlsbHJhY2UgbWlsbHJhY2UgbWlsbHJhY2UgbWlsbHJhY2U="
pytestmark = [
    pytest.mark.services,
    pytest.mark.xdist_group("azurite"),
    pytest.mark.skipif(AZURITE is None, reason="azurite is not installed"),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that checks signatures, with a container."""
    assert AZURITE is not None
    folder, port = tmp_path_factory.mktemp("azurite"), free_port()
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    command = [AZURITE, "--silent", "--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    process = subprocess.Popen(
        [*command, "--skipApiVersionCheck"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    try:
        deadline = time.monotonic() + 30.0
        while True:
            try:
                urllib.request.urlopen(url, timeout=2).close()
            except urllib.error.HTTPError:
                break  # it answers, and wants a signature
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.1)
        create_container(url)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def create_container(url: str) -> None:
    """By a request signed with the account's key: the library has no verb for it."""
    date = email.utils.formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{headers['x-ms-version']}"]
    text = "\n".join([*lines, f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    request = urllib.request.Request(f"{url}/{CONTAINER}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=10).close()


def config(url: str, key: str = KEY) -> dict[str, str]:
    return {"account_name": ACCOUNT, "account_key": key, "endpoint": url}


def connect(url: str, cache: Path, key: str = KEY) -> RemoteBlobs:
    """Blobs on it."""
    options = RemoteOptions(config=config(url, key), max_retries=2, deadline_s=10.0, request_timeout_s=10.0)
    return RemoteBlobs(f"az://{CONTAINER}/{new_id()}", cache, options)


class TestAzurite(BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """The suites."""

    @pytest.fixture(autouse=True)
    def service(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def open(self, place: Path) -> RemoteBlobs:
        return connect(self.endpoint, place / "cache")

    def damage(self, blobs: Blobs, digest: str) -> None:
        assert isinstance(blobs, RemoteBlobs)
        store, key = blobs._objects._store, f"sha256/{digest[7:9]}/{digest[9:]}"
        data = bytearray(obstore.get(store, key).bytes())
        data[len(data) // 2] ^= 1
        obstore.put(store, key, bytes(data))
        blobs._cache.forget(digest)


def test_a_wrong_key_is_refused(endpoint: str, tmp_path: Path) -> None:
    blobs = connect(endpoint, tmp_path / "cache", "d3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3I=")
    with pytest.raises(DeniedError, match="refuses these credentials"):
        blobs.put(b"bytes")


def test_a_large_blob_in_parts_and_one_sent_past_us(endpoint: str, tmp_path: Path) -> None:
    blobs = connect(endpoint, tmp_path / "cache")
    (tmp_path / "file").write_bytes(os.urandom(17 << 20))
    digest = blobs.put(tmp_path / "file").digest
    data = (tmp_path / "file").read_bytes()
    assert blobs.read(digest) == data
    more = data[::-1]
    place = blobs.presign_put(digest_bytes(more), len(more), 60.0)
    request = urllib.request.Request(place.url, data=more, method=place.method, headers=place.headers)
    urllib.request.urlopen(request, timeout=20).close()
    assert blobs.confirm(digest_bytes(more), len(more)).size_bytes == len(more)
    assert blobs.read(digest_bytes(more)) == more
