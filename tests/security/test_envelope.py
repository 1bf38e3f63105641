"""Envelopes: what was put in comes out, and nothing else ever does."""

from __future__ import annotations

import hashlib
import io
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import CorruptError
from millrace.security.envelope import (
    CHUNK_BYTES,
    HEADER_BYTES,
    TAG_BYTES,
    DecryptingReader,
    EncryptingReader,
    new_key,
    sealed_size,
    unwrap,
    wrap,
)

SMALL = 6  # 64 bytes in a chunk: many chunks for few bytes


def seal(data: bytes, key: bytes) -> bytes:
    return EncryptingReader(io.BytesIO(data), key, SMALL).read()


def unseal(sealed: bytes, key: bytes, size: int) -> bytes:
    return DecryptingReader(io.BytesIO(sealed), key, size).readall()


def pieces(sealed: bytes) -> tuple[bytes, list[bytes]]:
    """Header and chunks."""
    step = (1 << SMALL) + TAG_BYTES
    body = sealed[HEADER_BYTES:]
    return sealed[:HEADER_BYTES], [body[at : at + step] for at in range(0, len(body), step)]


@given(st.binary(max_size=400), st.lists(st.integers(1, 90), max_size=30))
def test_what_was_put_in_comes_out_however_it_is_read(data: bytes, steps: list[int]) -> None:
    key = new_key()
    reader = EncryptingReader(io.BytesIO(data), key, SMALL)
    sealed = b"".join(reader.read(step) for step in steps) + reader.read()
    assert len(sealed) == sealed_size(len(data), SMALL)
    assert (reader.size, reader.digest) == (len(data), "sha256:" + hashlib.sha256(data).hexdigest())
    opened = DecryptingReader(io.BytesIO(sealed), key, len(data))
    assert b"".join(opened.read(step) for step in steps) + opened.readall() == data
    assert opened.read(1) == b""


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 640])
def test_sizes_around_whole_chunks(size: int) -> None:
    key, data = new_key(), os.urandom(size)
    sealed = seal(data, key)
    assert len(pieces(sealed)[1]) == max(1, -(-size // 64))
    assert unseal(sealed, key, size) == data
    assert bytes(io.BufferedReader(EncryptingReader(io.BytesIO(data), key, SMALL), 100).read()) == sealed


@given(st.binary(min_size=1, max_size=300), st.lists(st.tuples(st.integers(0, 320), st.integers(0, 150)), max_size=12))
def test_seeking(data: bytes, jumps: list[tuple[int, int]]) -> None:
    key = new_key()
    reader = DecryptingReader(io.BytesIO(seal(data, key)), key, len(data))
    for place, count in jumps:
        assert reader.seek(place) == place
        assert reader.read(count) == data[place : place + count]
    assert reader.seek(-1, io.SEEK_END) == len(data) - 1
    assert reader.read() == data[-1:]


@pytest.mark.parametrize("size", [0, 1, 64, 130])
def test_every_flipped_bit_is_refused(size: int) -> None:
    key = new_key()
    sealed = seal(bytes(size), key)
    for bit in range(len(sealed) * 8):
        altered = bytearray(sealed)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError, match="does not open"):
            unseal(bytes(altered), key, size)


@pytest.mark.parametrize("size", [0, 1, 64, 128, 200])
def test_every_cut_and_every_addition_is_refused(size: int) -> None:
    key = new_key()
    sealed = seal(bytes(size), key)
    for end in range(len(sealed)):
        with pytest.raises(CorruptError, match="does not open"):
            unseal(sealed[:end], key, size)
    header, chunks = pieces(sealed)
    for more in (b"\0", chunks[0], chunks[-1], header, sealed):
        with pytest.raises(CorruptError, match="does not open"):
            unseal(sealed + more, key, size)


@pytest.mark.parametrize("told", [0, 1, 63, 64, 65, 127, 129, 192, 256, 10_000])
def test_another_size_is_refused(told: int) -> None:
    """Whoever can write the record of a blob cannot make half of it pass for all."""
    key = new_key()
    sealed = seal(bytes(128), key)
    _, chunks = pieces(sealed)
    for forged in (sealed, sealed[: HEADER_BYTES + len(chunks[0])]):
        with pytest.raises(CorruptError, match="does not open"):
            unseal(forged, key, told)


@settings(max_examples=60)
@given(st.data())
def test_chunks_that_move_are_refused(draw: st.DataObject) -> None:
    key, other = new_key(), new_key()
    size = draw.draw(st.integers(65, 64 * 6))
    data = os.urandom(size)
    header, chunks = pieces(seal(data, key))
    foreign = pieces(seal(data, other))[1]
    order = draw.draw(st.lists(st.integers(0, 2 * len(chunks) - 1), min_size=1, max_size=len(chunks) + 1))
    forged = [(chunks + foreign)[number] for number in order]
    if forged == chunks:
        return
    with pytest.raises(CorruptError, match="does not open"):
        unseal(header + b"".join(forged), key, size)


def test_chunks_of_another_envelope_under_the_same_key_do_not_fit_its_end() -> None:
    key = new_key()
    header, longer = pieces(seal(bytes(200), key))
    _, shorter = pieces(seal(bytes(100), key))
    for forged, size in (([longer[0], shorter[1]], 200), ([*longer[:2], shorter[1]], 200), (longer[:2], 128)):
        with pytest.raises(CorruptError, match="does not open"):
            unseal(header + b"".join(forged), key, size)


def test_another_key_is_refused() -> None:
    with pytest.raises(CorruptError, match="the key is another one"):
        unseal(seal(b"x" * 100, new_key()), new_key(), 100)


def test_a_newer_version_is_named() -> None:
    key = new_key()
    sealed = bytearray(seal(b"x", key))
    sealed[3] = 2
    with pytest.raises(CorruptError, match="a way that this Millrace does not know"):
        unseal(bytes(sealed), key, 1)


def test_a_source_that_gives_little_at_a_time() -> None:
    class Dripping(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self._rest = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            return self._rest.read(min(size, 7))

    key, data = new_key(), os.urandom(300)
    sealed = EncryptingReader(Dripping(data), key, SMALL).read()  # type: ignore[arg-type]
    reader = DecryptingReader(Dripping(sealed), key, 300)  # type: ignore[arg-type]
    assert not reader.seekable()
    with pytest.raises(io.UnsupportedOperation):
        reader.seek(0)
    assert reader.readall() == data


@given(st.binary(max_size=64), st.text(max_size=10), st.text(max_size=10))
def test_wrapped_keys(secret: bytes, context: str, other: str) -> None:
    kek = new_key()
    wrapped = wrap(kek, secret, context)
    assert unwrap(kek, wrapped, context) == secret
    assert wrap(kek, secret, context) != wrapped
    refused = [(new_key(), wrapped, context), (kek, wrapped[:-1], context), (kek, b"", context)]
    refused += [(kek, wrapped, other)] if other != context else []
    refused += [(kek, wrapped[:place] + bytes([wrapped[place] ^ 1]) + wrapped[place + 1 :], context)
                for place in range(len(wrapped))]  # fmt: skip
    for arguments in refused:
        with pytest.raises(CorruptError, match="the key of"):
            unwrap(*arguments)


def test_memory_is_bounded_and_chunks_are_as_documented() -> None:
    assert CHUNK_BYTES == 256 << 10

    class Zeros(io.RawIOBase):
        left = 32 << 20

        def read(self, size: int = -1) -> bytes:
            count = min(size, self.left)
            self.left -= count
            return bytes(count)

    key = new_key()
    tracemalloc.start()
    reader = EncryptingReader(Zeros(), key)  # type: ignore[arg-type]
    count = 0
    while part := reader.read(1 << 20):
        count += len(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == sealed_size(32 << 20)
    assert peak < 8 << 20
