"""gRPC on the bytes themselves, in process: how calls end, what repeats, streams, traces and the access log."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from millrace.serve.access_log import AccessLog
from millrace.serve.admission import Admission
from millrace.serve.grpc import frames
from millrace.serve.grpc.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    RST_STREAM,
    WINDOW_UPDATE,
    Code,
    frame,
)  # fmt: skip
from millrace.serve.grpc.service import NAME
from millrace.serve.service import HttpLimits
from millrace.testing.http2 import (
    EXHAUSTED,
    EXPIRED,
    INFER,
    INTERNAL,
    INVALID,
    NOT_FOUND,
    OK,
    STREAM,
    UNIMPLEMENTED,
    Client,
    Request,
    Response,
    Site,
    led,
    number,
    slow_site,
    tensor_request,
)  # fmt: skip


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "data", "status"),
    [
        ({}, led(tensor_request([1, 2])), OK),
        ({}, b"", INVALID),
        ({}, b"\0\0", INVALID),
        ({}, led(b"abc") + b"d", INVALID),
        ({}, led(b"abc")[:-1], INVALID),
        ({}, led(b"\xff\xff"), INVALID),
        ({}, led(tensor_request([1, 2], model_version="9")), NOT_FOUND),
        ({}, led(tensor_request([1, 2]), 1), INTERNAL),
        ({}, led(tensor_request([1, 2]), 2), INTERNAL),
        ({}, b"\0" + number(1 << 21), EXHAUSTED),
        ({"grpc_encoding": "gzip"}, led(gzip.compress(tensor_request([1, 2])), 1), OK),
        ({"grpc_encoding": "gzip"}, led(tensor_request([1, 2])), OK),
        ({"grpc_encoding": "gzip"}, led(b"abc", 1), INVALID),
        ({"grpc_encoding": "gzip"}, led(gzip.compress(tensor_request([1, 2]))[:-9], 1), INVALID),
        ({"grpc_encoding": "gzip"}, led(gzip.compress(bytes(8 << 20)), 1), EXHAUSTED),
        ({"grpc_encoding": "br"}, led(b""), UNIMPLEMENTED),
        ({"path": f"/{NAME}/Nothing"}, led(b""), UNIMPLEMENTED),
        ({"grpc_timeout": "1h"}, led(b""), INVALID),
        ({"grpc_timeout": "1n"}, led(tensor_request([1, 2])), EXPIRED),
        ({"path": f"/{NAME}/ModelReady"}, led(b"\x0a\x01m"), OK),
    ],
)
def test_how_calls_end(extra: dict[str, str], data: bytes, status: int) -> None:
    async def main() -> None:
        client = Client(Site(limits=HttpLimits(max_body_bytes=1 << 20)))
        client.send(frame(HEADERS, END_HEADERS, 1, client.block(**extra)), frame(DATA, END_STREAM, 1, data))
        answer = (await client.settle()).answers[1]
        assert answer.is_whole
        assert (answer.blocks[0][":status"], answer.blocks[0]["content-type"]) == ("200", "application/grpc")
        assert answer.status == status
        assert ("grpc-message" in answer.blocks[-1]) is (status != OK)
        assert ("grpc-accept-encoding" in answer.blocks[0]) is (status == UNIMPLEMENTED)
        assert client.connection.held_bytes == 0
        assert client.end is None

    run(main)


@pytest.mark.parametrize(
    ("extra", "status"), [({"__method": "GET"}, "405"), ({"content_type": "application/json"}, "415")]
)
def test_what_is_not_grpc_gets_a_status_of_http(extra: dict[str, str], status: str) -> None:
    async def main() -> None:
        client = Client(Site())
        fields = {":method": "POST", ":scheme": "http", ":path": INFER, "content-type": "application/grpc"}
        fields |= {":method": "GET"} if "__method" in extra else {"content-type": extra["content_type"]}
        block = client.encoder.encode(list(fields.items()))
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
        answer = (await client.settle()).answers[1]
        assert answer.is_whole
        assert answer.blocks == [{":status": status}]

    run(main)


def test_a_message_is_percent_encoded() -> None:
    async def main() -> None:
        client = Client(Site())
        client.send(client.call(1, Request(model_name="ä%\n").SerializeToString()))
        told = (await client.settle()).answers[1].blocks[-1]["grpc-message"]
        assert "%C3%A4%25" in told
        assert told.isascii()
        assert "\n" not in told

    run(main)


def test_messages_that_repeat_are_answered_each_with_its_own() -> None:
    async def main() -> None:
        site = Site()
        client = Client(site)
        for index in range(8):
            client.send(client.call(4 * index + 1, tensor_request([index, 1])))
            client.send(client.call(4 * index + 3, tensor_request([index, 2], id="7")))
            await client.settle()
        for index in range(8):
            plain, named = client.answers[4 * index + 1], client.answers[4 * index + 3]
            assert (plain.values, named.values) == ([2.0 * index + 2], [2.0 * index + 4])
            assert (Response.FromString(plain.data[5:]).id, Response.FromString(named.data[5:]).id) == ("", "7")
        wrong = tensor_request([1, 2]).replace(b"FP32", b"FP64")
        client.send(client.call(99, wrong))
        assert (await client.settle()).answers[99].status == INVALID
        site.server.directory.remove("m")
        client.send(client.call(101, tensor_request([1, 2])))
        assert (await client.settle()).answers[101].status == NOT_FOUND

    run(main)


def test_a_field_that_only_looks_like_the_tensor_is_not_taken_for_it() -> None:
    """The last bytes are a field's that nobody knows, and the same as the tensor's."""

    async def main() -> None:
        client = Client(Site())
        first = np.array([1, 2], np.float32).tobytes()
        fake = b"\x3a\x08" + first
        message = tensor_request([1, 2]) + b"\xfa\x07" + bytes([len(fake)]) + fake
        for index in range(4):
            client.send(client.call(2 * index + 1, message))
        client.send(client.call(99, message[:-8] + np.array([5, 5], np.float32).tobytes()))
        await client.settle()
        assert [answer.values for answer in client.answers.values()] == [[6.0]] * 5

    run(main)


def test_a_large_message_is_refused_by_its_beginning() -> None:
    async def main() -> None:
        site = slow_site(admission=Admission(limit=1, hold_s=0.001))
        client = Client(site)
        client.send(client.call(1, tensor_request([1, 2])))
        client.send(frame(HEADERS, END_HEADERS, 3, client.block()))
        client.send(frame(DATA, 0, 3, led(tensor_request([1.0] * 50_000))[:100]))
        for _ in range(20):
            await asyncio.sleep(0.001)
        client.read()
        assert client.answers[3].status == EXHAUSTED
        assert client.answers[3].reset == Code.NO_ERROR
        client.send(frame(DATA, END_STREAM, 3, bytes(1000)))  # was on its way
        assert (await client.settle()).answers[1].values == [6.0]
        assert site.server.plane.metrics.requests["infer", 429] == 1

    run(main)


def test_a_stream_waits_for_a_client_that_reads_nothing() -> None:
    async def main() -> None:
        site = Site()
        client = Client(site, PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
        client.send(frame(HEADERS, END_HEADERS, 1, client.block(STREAM)))
        for _ in range(30):
            client.send(frame(DATA, 0, 1, led(tensor_request([1, 2])) * 10))
            await client.settle()
        assert site.runtime.rows <= 2 * 64 + 10
        client.send(frame(DATA, END_STREAM, 1))
        for _ in range(30):
            client.send(frame(WINDOW_UPDATE, 0, 1, number(2000)))
            await client.settle()
        assert site.runtime.rows == 300
        assert client.answers[1].is_whole
        assert client.answers[1].status == OK

    run(main)


def test_traces_and_the_access_log(tmp_path: Path) -> None:
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def main() -> None:
        site = Site()
        site.server.service.access_log = AccessLog(str(tmp_path / "log"))
        client = Client(site)
        client.send(client.call(1, tensor_request([1, 2]), traceparent=given), client.call(3, b"\xff"))
        client.send(frame(HEADERS, END_HEADERS, 5, client.block()), frame(RST_STREAM, 0, 5, number(8)))
        client.send(frame(HEADERS, END_HEADERS, 7, client.block(STREAM)))
        client.send(frame(DATA, END_STREAM, 7, led(tensor_request([1, 2])) + led(tensor_request([1, 2, 3]))))
        await client.settle()
        assert client.answers[1].values == [6.0]
        assert client.answers[1].blocks[0]["traceparent"][:36] == given[:36]
        assert client.answers[1].blocks[0]["traceparent"] != given
        site.server.service.access_log.close()

    run(main)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted((one["path"], one["status"], one["grpc_status"]) for one in lines) == [
        (INFER, 200, OK), (INFER, 400, INVALID), (INFER, 499, 1), (STREAM, 200, OK), (STREAM, 400, INVALID),
    ]  # fmt: skip
    (first,) = [one for one in lines if one["path"] == INFER and one["status"] == 200]
    assert (first["model"], first["version"], first["route"], first["rows"]) == ("m", "1", "infer", 1)
    assert (first["trace_id"], first["parent_id"]) == (given[3:35], given[36:52])
    assert first["received_bytes"] == len(tensor_request([1, 2]))
