"""HTTP/2 on the bytes themselves: the real protocol and data plane, in process, with frames made by hand."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable

import hpack
import pytest

from millrace.serve.admission import Admission
from millrace.serve.batching import Cost
from millrace.serve.grpc import frames
from millrace.serve.grpc.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Code,
    HeaderReader,
    frame,
)  # fmt: skip
from millrace.serve.grpc.http2 import MAX_STREAMS
from millrace.serve.service import HttpLimits
from millrace.testing.http2 import (
    EXPIRED,
    GREETING,
    INVALID,
    STREAM,
    UNAVAILABLE,
    Client,
    Site,
    led,
    number,
    slow_site,
    tensor_request,
)  # fmt: skip

CASES = 300 * int(os.environ.get("MILLRACE_FUZZ_CASES", "1"))


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def conversation(client: Client) -> bytes:
    """Everything that is allowed: settings and frames that nobody knows, padding, priority, parts of a block."""
    block = client.block(grpc_timeout="5S")
    message = led(tensor_request([1, 2, 3, 4]))
    padded = b"\x03" + number(0) + b"\x10" + block[:7] + bytes(3)
    return b"".join([
        PREFACE, frames.settings({frames.MAX_CONCURRENT_STREAMS: 9, 0x77: 5, frames.HEADER_TABLE_SIZE: 0}),
        frame(SETTINGS, ACK, 0), frame(0xFA, 0xFF, 0, b"unknown"), frame(PING, 0, 0, b"12345678"),
        frame(HEADERS, PADDED | HAS_PRIORITY, 1, padded), frame(CONTINUATION, 0, 1, block[7:9]),
        frame(CONTINUATION, END_HEADERS, 1, block[9:]), frame(PRIORITY, 0, 1, bytes(5)),
        frame(DATA, 0, 1, message[:3]), frame(DATA, PADDED, 1, b"\x02" + message[3:20] + bytes(2)),
        frame(DATA, 0, 1, message[20:]), frame(WINDOW_UPDATE, 0, 1, number(9)), frame(DATA, END_STREAM, 1),
    ])  # fmt: skip


def test_frames_may_be_cut_at_every_byte() -> None:
    async def main() -> None:
        site = Site()
        size = len(conversation(Client(site, b"")))
        for at in range(1, size):
            client = Client(site, b"")
            data = conversation(client)
            client.send(data[:at])
            client.send(data[at:])
            await client.settle()
            assert client.answers[1].values == [6.0, 14.0], at
            assert client.end is None
            assert client.of(PING) == [b"12345678"]
        drops = Client(site, b"")
        for byte in conversation(drops):
            drops.send(bytes([byte]))
        assert (await drops.settle()).answers[1].values == [6.0, 14.0]

    run(main)


def many(kind: int, flags: int, stream: int, payload: bytes, count: int = 1100) -> bytes:
    return frame(kind, flags, stream, payload) * count


BROKEN = {
    "no preface": (lambda c: b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", Code.PROTOCOL_ERROR),
    "no settings": (lambda c: PREFACE + frame(PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
    "too large a frame": (lambda c: GREETING + b"\xff\xff\xff\x00\x00" + number(1), Code.FRAME_SIZE_ERROR),
    "settings cut off": (lambda c: GREETING + frame(SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
    "settings of a stream": (lambda c: GREETING + frame(SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "an acknowledgement that says something": (lambda c: GREETING + frame(SETTINGS, ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "too large a window": (lambda c: GREETING + frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31}), Code.FLOW_CONTROL_ERROR),
    "too small frames": (lambda c: GREETING + frames.settings({frames.MAX_FRAME_SIZE: 100}), Code.PROTOCOL_ERROR),
    "pushes": (lambda c: GREETING + frames.settings({frames.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
    "a push": (lambda c: GREETING + frame(PUSH_PROMISE, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "a short ping": (lambda c: GREETING + frame(PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "a ping of a stream": (lambda c: GREETING + frame(PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a short reset": (lambda c: GREETING + frame(RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "a reset of nothing": (lambda c: GREETING + frame(RST_STREAM, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "a short update": (lambda c: GREETING + frame(WINDOW_UPDATE, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
    "an update by nothing": (lambda c: GREETING + frame(WINDOW_UPDATE, 0, 0, bytes(4)), Code.PROTOCOL_ERROR),
    "an update too far": (lambda c: GREETING + frame(WINDOW_UPDATE, 0, 0, number(frames.MAX_WINDOW)), Code.FLOW_CONTROL_ERROR),
    "an update of an idle stream": (lambda c: GREETING + frame(WINDOW_UPDATE, 0, 5, number(1)), Code.PROTOCOL_ERROR),
    "data of an idle stream": (lambda c: GREETING + frame(DATA, 0, 1, b"a"), Code.PROTOCOL_ERROR),
    "data after the end": (lambda c: GREETING + c.call(1, tensor_request([1, 2])) + frame(DATA, 0, 1, b"a"), Code.STREAM_CLOSED),
    "headers after the end": (lambda c: GREETING + c.call(1, tensor_request([1, 2])) + frame(HEADERS, END_HEADERS, 1, c.block()), Code.STREAM_CLOSED),
    "an even stream": (lambda c: GREETING + c.call(2, b""), Code.PROTOCOL_ERROR),
    "stream 0": (lambda c: GREETING + c.call(0, b""), Code.PROTOCOL_ERROR),
    "a lower stream": (lambda c: GREETING + c.call(5, b"") + c.call(3, b""), Code.PROTOCOL_ERROR),
    "padding without end": (lambda c: GREETING + frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + c.block()), Code.PROTOCOL_ERROR),
    "no length of the padding": (lambda c: GREETING + frame(HEADERS, END_HEADERS | PADDED, 1), Code.FRAME_SIZE_ERROR),
    "a block in parts and something else": (lambda c: GREETING + frame(HEADERS, 0, 1, c.block()) + frame(PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
    "parts of another block": (lambda c: GREETING + frame(HEADERS, 0, 1, c.block()) + frame(CONTINUATION, END_HEADERS, 3), Code.PROTOCOL_ERROR),
    "parts of no block": (lambda c: GREETING + frame(CONTINUATION, END_HEADERS, 1), Code.PROTOCOL_ERROR),
    "a block that is none": (lambda c: GREETING + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "too many headers": (lambda c: GREETING + frame(HEADERS, END_HEADERS, 1, frames.literal(b"a", bytes(20_000))), Code.ENHANCE_YOUR_CALM),
    "the same header again and again": (lambda c: GREETING + frame(HEADERS, END_HEADERS, 1, c.encoder.encode([("a", "b" * 3000)]) + b"\xbe" * 5000), Code.ENHANCE_YOUR_CALM),
    "a table resized too late": (lambda c: GREETING + frame(HEADERS, END_HEADERS, 1, b"\x83\x20"), Code.COMPRESSION_ERROR),
    "no such entry": (lambda c: GREETING + frame(HEADERS, END_HEADERS, 1, b"\xf0"), Code.COMPRESSION_ERROR),
    "parts without end": (lambda c: GREETING + frame(HEADERS, 0, 1) + many(CONTINUATION, 0, 1, b""), Code.ENHANCE_YOUR_CALM),
    "large parts": (lambda c: GREETING + frame(HEADERS, 0, 1) + many(CONTINUATION, 0, 1, bytes(16_000), 3), Code.ENHANCE_YOUR_CALM),
    "pings": (lambda c: GREETING + many(PING, 0, 0, bytes(8)), Code.ENHANCE_YOUR_CALM),
    "settings": (lambda c: GREETING + many(SETTINGS, 0, 0, b""), Code.ENHANCE_YOUR_CALM),
    "priorities": (lambda c: GREETING + many(PRIORITY, 0, 1, bytes(5)), Code.ENHANCE_YOUR_CALM),
    "empty data": (lambda c: GREETING + frame(HEADERS, END_HEADERS, 1, c.block()) + many(DATA, 0, 1, b""), Code.ENHANCE_YOUR_CALM),
    "rapid resets": (lambda c: GREETING + b"".join(frame(HEADERS, END_HEADERS, 2 * id + 1, c.block()) + frame(RST_STREAM, 0, 2 * id + 1, number(8)) for id in range(1100)), Code.ENHANCE_YOUR_CALM),
    "ever more calls": (lambda c: GREETING + b"".join(frame(HEADERS, END_HEADERS, 2 * id + 1, c.block()) for id in range(1400)), Code.ENHANCE_YOUR_CALM),
    "malformed calls": (lambda c: GREETING + b"".join(frame(HEADERS, END_HEADERS, 2 * id + 1, b"\x82") for id in range(1100)), Code.ENHANCE_YOUR_CALM),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_protocol_forbids_ends_the_connection_and_no_other(name: str) -> None:
    async def main() -> None:
        site = Site()
        other, client = Client(site), Client(site, b"")
        make, code = BROKEN[name]
        client.send(make(client))
        await client.settle()
        assert client.end is code
        assert client.wire.is_closed is (code is not None)
        assert client.connection.held_bytes == 0 or code is None
        other.send(other.call(1, tensor_request([1, 2])))
        assert (await other.settle()).answers[1].values == [6.0]
        assert not site.server.plane.admission.waiting

    run(main)


def test_header_blocks_are_read_as_hpack_reads_them() -> None:
    chance = random.Random(3)
    encoder, plain, reader = hpack.Encoder(), hpack.Decoder(), HeaderReader(1 << 16)
    names = [":path", ":method", "te", *[f"name-{index}" for index in range(8)]]
    for _ in range(300):
        fields = [(chance.choice(names), f"value{chance.randrange(6)}") for _ in range(chance.randint(1, 9))]
        if chance.random() < 0.1:
            encoder.header_table_size = chance.choice([0, 100, 4096])
        block = encoder.encode([(*field, chance.random() < 0.2) for field in fields], huffman=chance.random() < 0.5)
        expected = [(name.encode(), value.encode()) for name, value in fields]
        assert list(plain.decode(block, raw=True)) == expected
        assert reader.known.get(block, expected) == expected
        assert reader.read(block) == expected
        reader.keep(block, expected)


def test_one_call_that_is_wrong_ends_alone() -> None:
    async def main() -> None:
        client = Client(Site())
        send, block = client.send, client.block
        send(frame(HEADERS, END_HEADERS | END_STREAM, 1, client.encoder.encode([(":method", "POST")])))
        send(frame(HEADERS, END_HEADERS, 3, block(connection="close")), frame(DATA, END_STREAM, 3, b"abc"))
        send(frame(HEADERS, END_HEADERS, 5, client.encoder.encode([(":path", "/"), (":path", "/")])))
        send(frame(HEADERS, END_HEADERS, 7, block()), frame(PRIORITY, 0, 7, bytes(4)), frame(DATA, 0, 7, b"late"))
        send(frame(HEADERS, END_HEADERS, 9, block()), frame(WINDOW_UPDATE, 0, 9, number(0)))
        send(frame(HEADERS, END_HEADERS, 11, block()), frame(WINDOW_UPDATE, 0, 11, number(frames.MAX_WINDOW)))
        send(frame(HEADERS, END_HEADERS, 13, block()), frame(HEADERS, END_HEADERS, 13, block()))
        send(client.call(15, tensor_request([1, 2])))
        await client.settle()
        codes = {id: answer.reset for id, answer in client.answers.items()}
        broken, windows = Code.PROTOCOL_ERROR, Code.FLOW_CONTROL_ERROR
        assert codes == {
            1: broken, 3: broken, 5: broken, 7: Code.FRAME_SIZE_ERROR, 9: broken, 11: windows, 13: broken, 15: None,
        }  # fmt: skip
        assert client.answers[15].values == [6.0]
        assert client.end is None

    run(main)


# ---------------------------------------------------------------------- windows


def test_answers_wait_for_both_windows() -> None:
    async def main() -> None:
        client = Client(Site(), PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 10}))
        client.send(client.call(1, tensor_request([1.0] * 32)), client.call(3, tensor_request([2.0, 2.0])))
        await client.settle()
        assert [len(client.answers[id].data) for id in (1, 3)] == [10, 10]
        client.send(frame(WINDOW_UPDATE, 0, 3, number(1000)))
        assert (await client.settle()).answers[3].values == [8.0]
        assert not client.answers[1].is_whole
        client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 5}))  # its window is below nothing now
        client.send(frame(WINDOW_UPDATE, 0, 1, number(7)))
        assert len((await client.settle()).answers[1].data) == 12
        client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 4000}))
        assert (await client.settle()).answers[1].values == [4.0] * 16
        large = tensor_request([1.0] * 60_000)
        client.send(client.call(5, large))
        client.send(frame(WINDOW_UPDATE, 0, 5, number(1 << 20)))
        sent = sum(len(answer.data) for answer in (await client.settle()).answers.values())
        assert sent == frames.FIRST_WINDOW  # the connection's
        client.send(frame(WINDOW_UPDATE, 0, 0, number(1 << 20)))
        assert len((await client.settle()).answers[5].values) == 30_000
        assert not client.connection.is_busy

    run(main)


def test_who_never_opens_a_window_is_cut_off() -> None:
    async def main() -> None:
        client = Client(Site(), PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
        client.send(client.call(1, tensor_request([1, 2])))
        await client.settle()
        client.connection.check_time(time.monotonic() + 1)
        assert not client.wire.is_closed
        client.connection.check_time(time.monotonic() + 100)
        assert client.wire.is_closed

    run(main)


def test_what_is_received_opens_the_windows_again() -> None:
    """A message of 20 MiB: more than either window; damaged, so that only its way here costs time."""

    async def main() -> None:
        client = Client(Site())
        message = led(b"\xff" * (20 << 20))
        client.send(frame(HEADERS, END_HEADERS, 1, client.block()))
        left = {0: 16 << 20, 1: 4 << 20}
        for at in range(0, len(message), 200_000):
            part = message[at : at + 200_000]
            left = {id: size - len(part) for id, size in left.items()}
            assert min(left.values()) >= 0
            client.send(frame(DATA, 0, 1, part))
            await asyncio.sleep(0)
            before = len(client.others)
            client.read()
            for kind, _, id, payload in client.others[before:]:
                if kind == WINDOW_UPDATE and at:
                    left[id] += int.from_bytes(payload, "big")
        client.send(frame(DATA, END_STREAM, 1))
        assert (await client.settle()).answers[1].status == INVALID
        assert client.connection.held_bytes == 0

    run(main)


@pytest.mark.parametrize(("is_shared", "end"), [(False, None), (True, Code.FLOW_CONTROL_ERROR)])
def test_more_than_a_window_is_refused(is_shared: bool, end: Code | None) -> None:
    """More than 4 MiB that a stream of messages cannot take yet; more than 16 MiB of them all."""

    async def main() -> None:
        site = Site(cost=Cost(base_s=0.0, per_row_s=10.0), admission=Admission(queue_s=1e9), limits=HttpLimits(max_body_bytes=1 << 30))  # fmt: skip
        site.runtime.before = lambda rows: time.sleep(0.3)
        client = Client(site)
        part = frame(DATA, 0, 1, bytes(200_000))
        client.send(frame(HEADERS, END_HEADERS, 1, client.block(STREAM)))
        client.send(frame(DATA, 0, 1, led(tensor_request([1, 2])) * 64), *[part] * 22)
        client.read()
        await asyncio.sleep(0)
        client.read()
        assert client.answers[1].reset == Code.FLOW_CONTROL_ERROR
        if is_shared:
            client.connection._left = 100_000
            client.send(part)
        await asyncio.sleep(0)
        client.read()
        assert client.end is end
        await client.settle()

    run(main)


# ---------------------------------------------------------------------- streams and their ends


def test_no_more_streams_than_allowed_at_once() -> None:
    async def main() -> None:
        client = Client(Site())
        for index in range(MAX_STREAMS + 1):
            client.send(frame(HEADERS, END_HEADERS, 2 * index + 1, client.block()))
        last = 2 * MAX_STREAMS + 1
        assert (await client.settle()).answers[last].reset == Code.REFUSED_STREAM
        client.send(frame(DATA, END_STREAM, last, led(b"")), frame(DATA, END_STREAM, 1, led(tensor_request([1, 2]))))
        assert (await client.settle()).answers[1].values == [6.0]
        client.send(client.call(last + 2, tensor_request([2, 2])))
        assert (await client.settle()).answers[last + 2].values == [8.0]

    run(main)


@pytest.mark.parametrize("how", ["reset", "lost", "stream"])
def test_who_is_gone_is_not_computed_for(how: str) -> None:
    async def main() -> None:
        site = slow_site()
        client = Client(site)
        if how == "stream":
            client.send(frame(HEADERS, END_HEADERS, 1, client.block(STREAM)))
            client.send(frame(DATA, 0, 1, led(tensor_request([1, 2])) * 10))
        else:
            client.send(*[client.call(2 * index + 1, tensor_request([1, 2])) for index in range(10)])
        await asyncio.sleep(0.005)
        assert site.server.plane.admission.waiting == 10
        if how == "lost":
            client.connection.connection_lost(None)
        else:
            client.send(*[frame(RST_STREAM, 0, id, number(8)) for id in ((1,) if how == "stream" else range(1, 21, 2))])
        assert site.server.plane.admission.waiting == 0
        await asyncio.sleep(0.06)
        assert site.runtime.rows <= 1  # the one that ran already
        assert not client.connection.is_busy
        other = Client(site)
        other.send(other.call(1, tensor_request([1, 2])))
        assert (await other.settle()).answers[1].values == [6.0]

    run(main)


def test_a_server_that_drains_answers_what_it_has_taken() -> None:
    async def main() -> None:
        site = slow_site()
        client, idle = Client(site), Client(site)
        client.send(client.call(1, tensor_request([1, 2])))
        client.send(frame(HEADERS, END_HEADERS, 3, client.block()))
        site.server.service.is_draining = True
        site.server.service.sweep()
        assert idle.wire.is_closed
        client.send(client.call(5, tensor_request([1, 2])))
        client.send(frame(DATA, END_STREAM, 3, led(tensor_request([2, 2]))))
        await client.settle()
        assert client.of(GOAWAY) == [number(3) + number(0)]
        assert client.answers[5].reset == Code.REFUSED_STREAM
        assert [client.answers[id].values for id in (1, 3)] == [[6.0], [8.0]]
        assert client.wire.is_closed

    run(main)


def test_a_stream_without_a_question_ends_when_the_server_stops() -> None:
    async def main() -> None:
        site = slow_site()
        client = Client(site)
        client.send(frame(HEADERS, END_HEADERS, 1, client.block(STREAM)))
        assert not client.connection.is_busy
        client.send(frame(DATA, 0, 1, led(tensor_request([1, 2]))))
        assert client.connection.is_busy
        site.server.service.is_draining = True
        site.server.service.sweep()
        assert not (await client.settle()).answers[1].is_whole
        assert client.answers[1].data
        site.server.service.sweep()
        await client.settle()
        assert client.answers[1].status == UNAVAILABLE
        assert client.wire.is_closed

    run(main)


def test_a_client_that_says_goodbye_gets_its_answers() -> None:
    async def main() -> None:
        client = Client(slow_site())
        client.send(client.call(1, tensor_request([1, 2])), frame(GOAWAY, 0, 0, bytes(8)))
        assert client.connection.eof_received()
        assert (await client.settle()).answers[1].values == [6.0]
        assert client.wire.is_closed

    run(main)


def test_what_takes_too_long_ends() -> None:
    async def main() -> None:
        site, now = Site(), time.monotonic()
        silent, idle, part, body = Client(site, b""), Client(site), Client(site), Client(site)
        part.send(frame(HEADERS, 0, 1, part.block()))
        body.send(frame(HEADERS, END_HEADERS, 1, body.block()), frame(DATA, 0, 1, b"\0\0\0\0\x09a"))
        for client in (silent, idle, part, body):
            client.connection.check_time(now + 1)
            assert not client.wire.is_closed
            client.connection.check_time(now + 200)
            await client.settle()
        assert [client.end for client in (silent, idle, part, body)] == [
            Code.SETTINGS_TIMEOUT, Code.NO_ERROR, Code.ENHANCE_YOUR_CALM, None,
        ]  # fmt: skip
        assert body.answers[1].status == EXPIRED
        assert body.connection.held_bytes == 0

    run(main)


def test_more_connections_than_allowed() -> None:
    async def main() -> None:
        site = Site(limits=HttpLimits(max_connections=1))
        first = Client(site)
        first.send(frame(HEADERS, END_HEADERS, 1, first.block()))
        refused = Client(site)
        assert (await refused.settle()).end is Code.ENHANCE_YOUR_CALM
        first.send(frame(RST_STREAM, 0, 1, number(8)))
        second = Client(site)  # in the place of the first, which is idle
        second.send(second.call(1, tensor_request([1, 2])))
        assert (await second.settle()).answers[1].values == [6.0]
        assert (await first.settle()).wire.is_closed

    run(main)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, doubled, cut out or moved."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(PREFACE) if chance.random() < 0.9 else 0, len(found) or 1)
        kind = chance.randrange(5)
        size = chance.randint(1, 30)
        if kind == 0:
            found[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            found[at:at] = found[at : at + size]
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = chance.randbytes(size)
        elif at < len(found):
            found[at] ^= 1 << chance.randrange(8)
    return bytes(found)


def test_a_mutator_of_bytes_breaks_nothing() -> None:
    async def main() -> None:
        chance = random.Random(20)
        site = Site()
        other, id = Client(site), 1
        for case in range(CASES):
            client = Client(site, b"")
            stream = frame(HEADERS, END_HEADERS, 3, client.block(STREAM)) + frame(
                DATA, END_STREAM, 3, led(tensor_request([1, 2]))
            )
            data = mutated(conversation(client) + stream + client.call(5, tensor_request([3, 4])), chance)
            cut = chance.randrange(len(data))
            client.send(data[:cut])
            client.send(data[cut:])
            if case % 10 == 0:
                other.send(other.call(id, tensor_request([case, 1])))
                assert (await other.settle()).answers[id].values == [2.0 * case + 2]
                id += 2
            await client.settle()
            client.connection.connection_lost(None)
            assert client.connection.held_bytes == 0, case
            assert not site.server.plane.admission.waiting

    run(main)
