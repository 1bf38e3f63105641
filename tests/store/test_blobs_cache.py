"""The cache of remote blobs (bounded, shared, never loses what is in use) and the reader of ranges."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import CorruptError, UnavailableError
from millrace.store import range_reader
from millrace.store.blobs_cache import PINS, BlobCache
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.object_store import RemoteOptions
from millrace.store.range_reader import RangeReader
from millrace.store.upload import Chained, ChangedError, expected_etag, parts_of

SIZE = 1000
HOLDER = """
import sys, io
from pathlib import Path
from millrace.store.blobs_cache import BlobCache
cache = BlobCache(Path(sys.argv[1]), 10 * 1000, grace_s=0)
digest = cache.add(io.BytesIO(b"held" * 250)).digest
print(cache.path(digest), flush=True)
sys.stdin.read()
"""
FILLER = """
import sys, io, os
from pathlib import Path
from millrace.store.blobs_cache import BlobCache
cache = BlobCache(Path(sys.argv[1]), 100_000, grace_s=0)
for _ in range(300):
    data = os.urandom(1000)
    path = cache.fetched(cache.add(io.BytesIO(data)).digest, lambda: cache.add(io.BytesIO(data)))
    assert path.read_bytes() == data
    cache.close()
print("done")
"""


def stored_bytes(folder: Path) -> int:
    """Of every file below a folder."""
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())


def fill(cache: BlobCache, count: int) -> list[str]:
    """Add random blobs of SIZE bytes, used one after another."""
    found = []
    for _ in range(count):
        found.append(cache.add(io.BytesIO(os.urandom(SIZE))).digest)
        time.sleep(0.002)  # so that the last uses differ
    return found


# ---------------------------------------------------------------- eviction


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10 * SIZE, grace_s=0)
    digests = fill(cache, 10)
    assert cache.path(digests[0]) is not None
    cache.close()  # unpinned, but used last
    time.sleep(0.002)
    newer = fill(cache, 3)
    here = [cache.path(digest) is not None for digest in digests]
    assert here == [True, False, False, False, *[True] * 6]
    assert all(cache.path(digest) for digest in newer)
    assert stored_bytes(tmp_path) <= 10 * SIZE


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 3000), max_size=30),
    limit=st.integers(3000, 20_000),
    used=st.lists(st.integers(0, 29), max_size=10),
)
def test_it_never_holds_more_than_its_bound(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, used: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = BlobCache(folder, limit, grace_s=0)
    digests = []
    for number, size in enumerate(sizes):
        data = random.Random(number).randbytes(size)
        digests.append(cache.add(io.BytesIO(data), size).digest)
        for index in used:
            if index < len(digests):
                path = cache.path(digests[index])
                assert path is None or hashlib.sha256(path.read_bytes()).hexdigest() == digests[index][7:]
        cache.close()
        assert stored_bytes(folder) <= limit + limit // 16
    cache.close()


def test_a_path_that_was_handed_out_stays(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 5 * SIZE, grace_s=0)
    first = fill(cache, 1)[0]
    path = cache.path(first)
    assert path is not None
    fill(cache, 20)
    assert path.exists()
    cache.close()
    fill(cache, 20)
    assert not path.exists()


def test_a_path_held_by_another_process_stays_until_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    cache = BlobCache(tmp_path, 5 * SIZE, grace_s=0)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        fill(cache, 20)
        assert held.read_bytes() == b"held" * 250
        holder.kill()
    fill(cache, 20)
    assert not held.exists()


def test_what_is_open_can_be_read_to_its_end(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 5 * SIZE, grace_s=0)
    path = cache.path(fill(cache, 1)[0])
    assert path is not None
    with path.open("rb") as file:
        cache.close()
        fill(cache, 20)
        assert not path.exists()
        assert len(file.read()) == SIZE


def test_what_was_used_just_now_is_spared(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 5 * SIZE, grace_s=60)
    digests = fill(cache, 8)
    assert all(cache.path(digest) for digest in digests)


def test_pins_are_bounded(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10**9)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for number in range(PINS + 20):
        assert cache.path(cache.add(io.BytesIO(str(number).encode())).digest) is not None
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= PINS + 5
    cache.close()


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    """Each reads what it was given, whatever the others evict; the bound holds for all together."""
    command = [sys.executable, "-c", FILLER, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        out, _ = worker.communicate(timeout=120)
        assert (out.strip(), worker.returncode) == ("done", 0)
    assert stored_bytes(tmp_path) <= 100_000 + 3 * (100_000 // 16 + SIZE)


def test_a_cache_that_loses_everything_is_said(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10 * SIZE)
    with pytest.raises(UnavailableError, match="loses sha256:000"):
        cache.fetched("sha256:" + "0" * 64, lambda: None)


def test_threads_materialize_from_a_small_cache(tmp_path: Path) -> None:
    """Trees larger than the cache come out whole while their files evict one another."""
    blobs = RemoteBlobs("memory:///", tmp_path / "cache", RemoteOptions(cache_bytes=20_000))
    blobs._cache._grace_s = 0
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.bin").write_bytes(os.urandom(1500))
    tree = blobs.put_tree(folder)
    wanted = {one.name: one.read_bytes() for one in folder.iterdir()}
    found: list[dict[str, bytes]] = []

    def out(number: int) -> None:
        made = blobs.materialize(tree.digest, tmp_path / f"out{number}")
        found.append({one.name: one.read_bytes() for one in made.iterdir()})

    threads = [threading.Thread(target=out, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 3
    blobs.close()


# ---------------------------------------------------------------- the reader


@settings(deadline=None)
@given(
    data=st.binary(max_size=300),
    steps=st.lists(st.tuples(st.sampled_from(["read", "seek"]), st.integers(0, 320)), max_size=20),
    largest=st.integers(1, 100),
    is_ahead=st.booleans(),
)
def test_a_reader_gives_what_a_file_gives(
    data: bytes, steps: list[tuple[str, int]], largest: int, is_ahead: bool
) -> None:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    plain = io.BytesIO(data)
    with ThreadPoolExecutor(1) as executor:
        reader = RangeReader(
            lambda start, end: data[start:end], len(data), digest, largest, executor if is_ahead else None
        )
        with io.BufferedReader(reader, 16) as file:
            for action, number in steps:
                if action == "seek":
                    assert file.seek(number) == plain.seek(number)
                else:
                    assert file.read(number) == plain.read(number)
                assert file.tell() == plain.tell()
            assert file.read() == plain.read()


@settings(deadline=None)
@given(data=st.binary(min_size=1, max_size=300), place=st.integers(0, 299), sizes=st.lists(st.integers(1, 90)))
def test_a_damaged_blob_never_comes_out_whole(data: bytes, place: int, sizes: list[int]) -> None:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    bad = bytearray(data)
    bad[place % len(data)] ^= 1
    reader = RangeReader(lambda start, end: bytes(bad[start:end]), len(bad), digest, 64)
    out = bytearray()

    def read_all() -> None:
        for size in sizes:
            out.extend(reader.read(size) or b"")
        out.extend(reader.read())

    with pytest.raises(CorruptError, match=digest):
        read_all()
    assert len(out) < len(data)


def test_ranges_grow_while_reading_on_and_shrink_after_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_reader, "FIRST_BYTES", 10)
    asked: list[int] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append(end - start)
        return bytes(end - start)

    reader = RangeReader(fetch, 1000, "", 80)
    while reader.read(7) and reader.tell() < 300:
        continue
    reader.seek(900)
    reader.read(1)
    assert asked[:5] == [10, 20, 40, 80, 80]
    assert asked[-1] == 10


# ---------------------------------------------------------------- uploads


@settings(deadline=None)
@given(data=st.binary(max_size=200), part=st.integers(1, 60))
def test_parts_are_the_file(data: bytes, part: int) -> None:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    parts = list(parts_of(io.BytesIO(data), digest, part))
    assert b"".join(parts) == data
    assert all(len(one) == part for one in parts[:-1])
    with pytest.raises(ChangedError):
        list(parts_of(io.BytesIO(data + b"x"), digest, part))


@settings(deadline=None)
@given(head=st.binary(max_size=50), rest=st.binary(max_size=50), size=st.integers(1, 30))
def test_a_chain_is_its_pieces(head: bytes, rest: bytes, size: int) -> None:
    stream = Chained(head, io.BytesIO(rest))
    assert b"".join(iter(lambda: stream.read(size), b"")) == head + rest


def test_tags_of_another_form_are_not_foretold() -> None:
    for tag in ("", '"0"', '"inode-mtime-size"', '"0123-4"'):
        assert expected_etag(io.BytesIO(b"x"), tag, 10) == ""
