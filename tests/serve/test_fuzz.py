"""Bytes that nobody means: mutated requests, smuggling forms, shapes that lie, slow clients.

Nothing escapes, a client's fault is never a 5xx, and whoever else asks gets the right answer. The cases run through
the real protocol and data plane in process; MILLRACE_FUZZ_CASES says how many (100000 take some minutes).
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import socket
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.admission import Admission
from millrace.serve.service import HttpLimits
from millrace.testing.serving import INFER, PREDICT, Doubler, InProcessServer, request, responses

CASES = int(os.environ.get("MILLRACE_FUZZ_CASES", "6000"))
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIMITS = HttpLimits(max_body_bytes=1 << 16, max_head_bytes=4096)


def binary(*values: float, headers: bytes = b"", shape: Any = None, **extra: Any) -> bytes:
    data = np.array(values, np.float32).tobytes()
    tensor = {"name": "x", "shape": shape or [len(values) // 2, 2], "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [tensor], **extra}).encode()
    return request(INFER, head + data, b"Inference-Header-Content-Length: %d\r\n" % len(head) + headers)


def as_json(*values: float, headers: bytes = b"", **extra: Any) -> bytes:
    tensor = {"name": "x", "shape": [len(values) // 2, 2], "datatype": "FP32", "data": list(values)}
    return request(INFER, json.dumps({"inputs": [tensor], **extra}).encode(), headers)


def rows(*values: float, headers: bytes = b"") -> bytes:
    return request(PREDICT, json.dumps({"instances": [{"a": value, "b": 1} for value in values]}).encode(), headers)


def chunked(target: bytes, body: bytes, size: int = 17) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return b"POST " + target + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + data


SEEDS = [
    binary(1, 2), binary(1, 2, 3, 4, id="a"), binary(5, 6, parameters={"binary_data_output": True}),
    as_json(1, 2), as_json(1, 2, outputs=[{"name": "value"}], parameters={"timeout": 10**10}), rows(1), rows(1, 2, 3),
    request(INFER, b"\0\0\x80?\0\0\0@", b"Inference-Header-Content-Length: 0\r\n"),
    request(PREDICT, gzip.compress(b'{"instances": [{"a": 1, "b": 2}]}', mtime=0), b"Content-Encoding: gzip\r\n"),
    request(PREDICT, zlib.compress(b'{"instances": [[1, 2]]}'), b"Content-Encoding: deflate\r\n"),
    chunked(PREDICT, b'{"instances": [{"a": 1, "b": 2}]}'), LIVE, rows(1, headers=b"X-Request-Timeout-Ms: 90000\r\n"),
    b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /v2/models/m HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v2/models/m/config HTTP/1.1\r\nHost: localhost\r\n\r\n", request(b"/v2/repository/index", b"{}"),
    rows(1, headers=b"Expect: 100-continue\r\n"), LIVE + rows(2) + LIVE,
]  # fmt: skip
TOKENS = [
    b"-1", b"0", b"9223372036854775808", b"18446744073709551616", b"1e999", b"NaN", b"null", b"[]", b"{", b'"', b"\\u",
    b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\r\n\r\n", b"HTTP/1.0", b"HTTP/2.0",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Content-Length: 0\r\n", b"Content-Length: 9\r\n",
    b"Connection: close\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n", b"Content-Encoding: gzip\r\n", b"Host: evil\r\n",
    b"Expect: 100-continue\r\n", b"X-Request-Timeout-Ms: 0\r\n", b"BYTES", b"FP64", b"INT64", b"BOOL", b"a" * 5000,
    b"[" * 300, b"ffffffffffffffff\r\n", b"%00", b"%2e%2e/", b"?", b"//",
]  # fmt: skip


def mutate(dice: random.Random, data: bytes) -> bytes:
    """A few changes of bytes, tokens, order or length."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 6))):
        at = dice.randrange(len(changed) + 1)
        end = min(len(changed), at + dice.choice((1, 2, 4, 16, 64)))
        kind = dice.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at:end] = b""
        elif kind == 2:
            changed[at:at] = dice.choice(TOKENS)
        elif kind == 3:
            changed[at:end] = dice.choice(TOKENS)
        elif kind == 4:
            changed[at:at] = changed[at:end]
        elif kind == 5:
            del changed[at:]
        else:
            other = dice.choice(SEEDS)
            changed[at:] = other[dice.randrange(len(other)) :]
    return bytes(changed)


def pieces(dice: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((0, 0, 1, 3))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if end > start]


def test_mutated_requests_disturb_nobody() -> None:
    """Before each a right request on the same connection, after it one on another: both get their own answer."""
    seen: dict[int, int] = {}

    async def main() -> None:
        escaped: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
        dice = random.Random(int(os.environ.get("MILLRACE_FUZZ_SEED", "20")))
        server = InProcessServer(Doubler(), limits=LIMITS, admission=Admission(hold_s=0.0))
        witness, told = server.connect()
        for number in range(CASES):
            case = mutate(dice, dice.choice(SEEDS))
            first, other = float(number % 9973), float(number % 9941)
            connection, transport = server.connect()
            for piece in pieces(dice, binary(first, 1) + case):
                connection.data_received(piece)
            if dice.random() < 0.3:
                connection.eof_received()
            told.data = b""
            witness.data_received(rows(other) if number % 2 else binary(other, 1))
            await server.settle()
            answers = responses(transport.data)
            assert value_of(answers[0]) == 2 * (first + 1), case
            assert value_of(responses(told.data)[0]) == 2 * (other + 1), case
            for status, _, answer in answers:
                seen[status] = seen.get(status, 0) + 1
                assert status < 500, (case, answer)
                assert status < 400 or json.loads(answer)["error"], case
            connection.connection_lost(None)
            assert not escaped, (case, escaped)
            assert not server.plane.admission.waiting, case
        assert server.plane.admission.rows == server.plane.admission.waiting_bytes == 0
        assert len(server.service.connections) == 1

    asyncio.run(main())
    assert {200, 400} <= set(seen)


def value_of(answer: tuple[int, dict[bytes, bytes], bytes]) -> float:
    document = json.loads(answer[2])
    return document["predictions"][0]["value"] if "predictions" in document else document["outputs"][0]["data"][0]


GOOD = b'{"instances":[{"a":1,"b":2}]}'
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)


def raw(lines: bytes, body: bytes, version: bytes = b"HTTP/1.1", end: bytes = b"\r\n") -> bytes:
    return b"POST " + PREDICT + b" " + version + end + b"Host: localhost" + end + lines + end + end + body


SMUGGLED = {
    "both lengths": raw(b"Content-Length: 4\r\nTransfer-Encoding: chunked", CHUNK),
    "both lengths, turned": raw(b"Transfer-Encoding: chunked\r\nContent-Length: 4", CHUNK),
    "two lengths": raw(b"Content-Length: 29\r\nContent-Length: 30", GOOD),
    "the same length twice": raw(b"Content-Length: 29\r\nContent-Length: 29", GOOD),
    "a list of lengths": raw(b"Content-Length: 29, 29", GOOD),
    "a sign": raw(b"Content-Length: +29", GOOD),
    "a negative length": raw(b"Content-Length: -1", GOOD),
    "hexadecimal": raw(b"Content-Length: 0x1d", GOOD),
    "2^64": raw(b"Content-Length: 18446744073709551645", GOOD),
    "no length": raw(b"Content-Length: ", GOOD),
    "a space in the length": raw(b"Content-Length: 2 9", GOOD),
    **{
        f"coding {coding!r}": raw(b"Transfer-Encoding:" + coding, CHUNK)
        for coding in (
            b" xchunked", b" identity", b" chunked, identity", b" gzip, chunked", b" \x0bchunked", b' "chunked"',
            b" chunked;q=1", b" chunked\0", b"\r\n chunked", b" chunked\r\nTransfer-Encoding: chunked",
            b" identity\r\nTransfer-Encoding: chunked", b" chunked\r\nTransfer-Encoding: identity",
        )
    },
    "a space before the colon": raw(b"Transfer-Encoding : chunked", CHUNK),
    "in an old version": raw(b"Transfer-Encoding: chunked", CHUNK, b"HTTP/1.0"),
    "bare LF": raw(b"Content-Length: 29", GOOD, end=b"\n"),
    "bare LF in a header": raw(b"X: a\nContent-Length: 29", GOOD),
    "bare CR": raw(b"X: a\rContent-Length: 29", GOOD),
    "a folded header": raw(b"X: a\r\n b\r\nContent-Length: 29", GOOD),
    "LF between chunks": raw(b"Transfer-Encoding: chunked", CHUNK.replace(b"\r\n", b"\n")),
    "LF in an extension": raw(b"Transfer-Encoding: chunked", b"1d;a\nb\r\n" + CHUNK[4:]),
    "a space after the size": raw(b"Transfer-Encoding: chunked", b"1d \r\n" + CHUNK[4:]),
    "0x before the size": raw(b"Transfer-Encoding: chunked", b"0x1d\r\n" + CHUNK[4:]),
    "a negative size": raw(b"Transfer-Encoding: chunked", b"-1\r\n" + CHUNK[4:]),
    "a size beyond 2^64": raw(b"Transfer-Encoding: chunked", b"1000000000000001d\r\n" + CHUNK[4:]),
    "more than the size": raw(b"Transfer-Encoding: chunked", b"1d\r\n" + GOOD + b"XX0\r\n\r\n"),
    "a length in the trailer": raw(b"Transfer-Encoding: chunked", CHUNK[:-2] + b"Content-Length: 5\r\n\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("form", SMUGGLED)
def test_what_two_parsers_could_read_differently_is_refused(form: str) -> None:
    """One 400 for it, then nothing more on this connection: what follows might be part of it."""

    async def main() -> None:
        for cut in (None, 1, 60):
            server = InProcessServer(Doubler())
            connection, transport = server.connect()
            data = rows(7) + SMUGGLED[form] + LIVE
            for piece in (data,) if cut is None else (data[:-cut], data[-cut:]):
                connection.data_received(piece)
            await server.settle()
            statuses = [status for status, _, _ in responses(transport.data)]
            assert statuses == [200, 400]
            connection.data_received(LIVE)
            assert len(responses(transport.data)) == 2

    asyncio.run(main())


ALL_TYPES = Signature(
    task="regression",
    inputs=[
        TensorSpec(name="x", dtype="float32", shape=[-1, 2]), TensorSpec(name="n", dtype="int64", shape=[-1, -1]),
        TensorSpec(name="t", dtype="string", shape=[-1, 1]), TensorSpec(name="b", dtype="bool", shape=[-1]),
    ],
    outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])],
    label="y",
)  # fmt: skip
SIZE = st.one_of(st.integers(-3, 4), st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**30]))
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "n", "t", "b", "y", ""]),
        "shape": st.lists(SIZE, max_size=3),
        "datatype": st.sampled_from(["FP32", "INT64", "BYTES", "BOOL", "FP64", "", None]),
    },
    optional={
        "data": st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=4), max_leaves=8,
        ),
        "parameters": st.dictionaries(st.just("binary_data_size"), SIZE),
    },
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.lists(TENSOR, max_size=5), st.binary(max_size=40), st.none() | st.integers(-5, 400) | SIZE)
def test_shapes_types_and_sizes_that_lie(inputs: list[Any], rest: bytes, length: int | None) -> None:
    async def main() -> None:
        server = InProcessServer(Doubler(), ALL_TYPES)
        head = json.dumps({"inputs": inputs}).encode()
        line = b"Inference-Header-Content-Length: %d\r\n" % (len(head) if length is None else length)
        for data in (request(INFER, head + rest, line), request(INFER, head)):
            ((status, _, answer),) = await server.ask(data)
            assert status in (200, 400), answer

    asyncio.run(main())


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_not_unpacked(encoding: str) -> None:
    """Sixty kilobytes that would be sixty megabytes."""

    async def main() -> None:
        server = InProcessServer(Doubler(), limits=LIMITS)
        pack = gzip.compress if encoding == "gzip" else zlib.compress
        bomb = pack(b"[" + b"0," * (30 << 20))
        assert len(bomb) < LIMITS.max_body_bytes
        ((status, _, answer),) = await server.ask(
            request(PREDICT, bomb, b"Content-Encoding: %s\r\n" % encoding.encode())
        )
        assert status == 400
        assert "after decompression" in json.loads(answer)["error"]

    asyncio.run(main())


def test_slow_clients_hold_nobody_up_and_are_told(digits: Any) -> None:
    """A hundred that dribble a byte now and then; the others are served meanwhile."""
    dribblers = [socket.create_connection(("127.0.0.1", digits.port), timeout=10) for _ in range(100)]
    try:
        end_s = time.monotonic() + 1.3
        number = 0
        while time.monotonic() < end_s:
            for one in dribblers:
                try:
                    one.sendall(b"POST /v2/models/digits/infer HTTP/1.1\r\nX-Slow: "[number % 40 : number % 40 + 1])
                except OSError:
                    continue
            start_s = time.monotonic()
            assert digits.call("GET", "/v2/health/ready") == (200, {"ready": True})
            assert time.monotonic() - start_s < 1.0
            number += 1
            time.sleep(0.1)
        answers = [one.recv(4096) for one in dribblers]
        assert all(answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 400")) for answer in answers)
    finally:
        for one in dribblers:
            one.close()


def test_mutated_requests_over_real_sockets(digits: Any) -> None:
    dice = random.Random(4)
    for _ in range(150):
        case = mutate(dice, dice.choice(SEEDS).replace(b"/m", b"/digits"))
        with socket.create_connection(("127.0.0.1", digits.port), timeout=10) as client:
            answer = b""
            try:
                client.sendall(case)
                client.shutdown(socket.SHUT_WR)
                while chunk := client.recv(1 << 16):
                    answer += chunk
            except OSError:
                continue  # cut off: it was refused before everything was sent
        for status, _, body in responses(answer):
            assert status < 500, (case, body)
    assert digits.call("GET", "/v2/health/ready") == (200, {"ready": True})
