"""Requests that repeat: what is looked up instead of parsed or rendered anew is judged and answered as exactly.

The real protocol, data plane and model on a real loop; packets are handed over in the pieces that a test wants.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.formats.session import Session, open_session
from millrace.serve.admission import Admission
from millrace.serve.batching import Batcher, Cost
from millrace.serve.catalog import Catalog
from millrace.serve.dataplane import CheckedInfer, DataPlane, ModelInfo
from millrace.serve.exchange import Exchange
from millrace.serve.http import Connection
from millrace.serve.revisions import Directory, Revision
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.service import HttpLimits, Service

INFER, PREDICT = b"/v2/models/digits/infer", b"/v1/models/digits:predict"
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Outputs = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class Recorder(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.data += data

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None:
        """The tests hand over what they want."""

    def resume_reading(self) -> None:
        """The inverse."""


class Server:
    """Everything of a server but its sockets; to be made inside a running loop."""

    def __init__(self, runtime: OnnxRuntime, outputs: Outputs | None = None) -> None:
        loop = asyncio.get_running_loop()
        signature = runtime.bundle.signature
        infer = outputs or CheckedInfer(runtime, signature)
        batcher = Batcher(infer, Cost(base_s=1e-6, per_row_s=1e-9), 16, loop.call_soon, loop.call_soon_threadsafe)
        info = ModelInfo(name="digits", version="1")
        self.plane = DataPlane(info, runtime, signature, Admission(), batcher)
        directory = Directory()
        self.catalog = Catalog(directory, "1", 1 << 20)
        self.service = self.catalog.service = Service(self.catalog.handle, HttpLimits())
        directory.put("digits", [Revision(self.plane)])
        self.endpoint = directory.find("digits")

    def connect(self) -> tuple[Connection, Recorder]:
        connection, transport = Connection(self.service), Recorder()
        connection.connection_made(transport)
        return connection, transport

    async def settle(self) -> None:
        while self.plane.admission.waiting or len(self.plane.batcher):
            await asyncio.sleep(0)


@pytest.fixture(scope="module")
def runtime(digits_bundle: Path) -> OnnxRuntime:
    made = OnnxRuntime(digits_bundle)
    made.load()
    return made


@pytest.fixture(scope="module")
def session(digits_bundle: Path) -> Session:
    return open_session(digits_bundle / "model.onnx")


def pixels(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 17, (rows, 64)).astype(np.float32)


def post(target: bytes, body: bytes, headers: bytes = b"") -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n"
    return head % (target, len(body), headers) + body


def binary(values: np.ndarray, headers: bytes = b"", declared: np.ndarray | None = None, **extra: Any) -> bytes:
    """A V2 request; `declared`: what its JSON speaks of."""
    about = values if declared is None else declared
    tensor = {"name": "pixels", "shape": about.shape, "datatype": "FP32"}
    document = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": about.nbytes}}],
            **({"parameters": {"binary_data_output": True}} | extra),
        }
    ).encode()
    length = b"Inference-Header-Content-Length: %d\r\n" % len(document)
    return post(INFER, document + values.tobytes(), length + headers)


def as_json(values: np.ndarray, **extra: Any) -> bytes:
    tensor = {"name": "pixels", "shape": values.shape, "datatype": "FP32", "data": values.reshape(-1).tolist()}
    return post(INFER, json.dumps({"inputs": [tensor], **extra}).encode())


def split(data: bytes) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """Status, headers and body of each response."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        headers = dict(one.split(b": ", 1) for one in lines)
        size = int(headers[b"Content-Length"])
        assert len(rest) >= size, "a response is cut off"
        found.append((int(line.split()[1]), headers, rest[:size]))
        data = rest[size:]
    return found


def values_of(headers: Mapping[bytes, bytes], body: bytes) -> np.ndarray:
    """The probabilities of a V2 answer, binary or JSON."""
    length = headers.get(b"Inference-Header-Content-Length")
    (output,) = json.loads(body if length is None else body[: int(length)])["outputs"]
    if length is None:
        return np.array(output["data"], np.float32).reshape(output["shape"])
    assert output["parameters"]["binary_data_size"] == len(body) - int(length)
    return np.frombuffer(body[int(length) :], np.float32).reshape(output["shape"])


def check(answer: tuple[int, dict[bytes, bytes], bytes], wanted: np.ndarray | int) -> None:
    """Right numbers, or the wanted status."""
    status, headers, body = answer
    if isinstance(wanted, int):
        assert status == wanted
    elif body.startswith(b'{"predictions"'):
        rows = [list(row["probabilities"].values()) for row in json.loads(body)["predictions"]]
        np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert status == 200
        np.testing.assert_allclose(values_of(headers, body), wanted, rtol=1e-5, atol=1e-6)


def test_a_request_cut_at_every_byte(runtime: OnnxRuntime, session: Session) -> None:
    """Known requests in one piece on either side of one that is cut: each gets the answer to its own row."""
    rows = [pixels(seed) for seed in range(3)]
    wanted = [session.run({"pixels": row})["probabilities"] for row in rows]
    first, cut, last = (binary(row) for row in rows)

    async def main() -> None:
        server = Server(runtime)
        for place in range(1, len(cut)):
            connection, transport = server.connect()
            for data in (first, cut[:place], cut[place:], last):
                connection.data_received(data)
            await server.settle()
            answers = split(transport.data)
            assert len(answers) == 3
            for answer, expected in zip(answers, wanted, strict=True):
                check(answer, expected)

    asyncio.run(main())


def grown(values: np.ndarray) -> np.ndarray:
    """One row more."""
    return np.concatenate([values, values[:1]])


def spoilt(values: np.ndarray) -> np.ndarray:
    return np.where(np.arange(64) == 7, np.float32(np.nan), values)


# how a request with these rows looks; the right answer's status
KINDS: dict[str, tuple[Callable[[np.ndarray], bytes], int]] = {
    "binary": (binary, 200),
    "other head": (lambda values: binary(values, b"X-Client: other\r\n"), 200),
    "id": (lambda values: binary(values, id=f"{int(values.sum()):05}"), 200),
    "binary in, json out": (lambda values: binary(values, parameters={"binary_data_output": False}), 200),
    "named output": (lambda values: binary(values, outputs=[{"name": "probabilities"}]), 200),
    "json": (as_json, 200),
    "json in, binary out": (lambda values: as_json(values, parameters={"binary_data_output": True}), 200),
    "rows": (lambda values: post(PREDICT, json.dumps({"instances": values.tolist()}).encode()), 200),
    "not finite": (lambda values: binary(spoilt(values)), 400),
    "wrong shape": (lambda values: binary(values.reshape(-1, 32)), 400),
    "too many bytes": (lambda values: binary(grown(values), declared=values), 400),
    "too few bytes": (lambda values: binary(values, declared=grown(values)), 400),
    "nothing": (lambda _: b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
}
REQUEST = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 999), st.integers(1, 3))


def pieces(stream: bytes, cuts: list[float]) -> list[bytes]:
    places = [0, *sorted(int(cut * len(stream)) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(places) if end > start]


async def in_turns(server: Server, opened: list[Any], asked: list[list[Any]], pauses: bool) -> None:
    """One request after the other, each in a packet of its own, by all connections in turn."""
    for turn in itertools.zip_longest(*asked):
        for (connection, _), request in zip(opened, turn, strict=True):
            if request is not None:
                connection.data_received(request[0])
        if pauses:
            await server.settle()


@PROPERTY
@given(
    clients=st.lists(st.lists(REQUEST, min_size=1, max_size=8), min_size=1, max_size=4),
    cuts=st.lists(st.floats(0, 1, exclude_max=True), max_size=6),
    pauses=st.booleans(),
)
def test_any_mixture_however_it_is_cut_and_pipelined(
    runtime: OnnxRuntime, session: Session, clients: list[list[tuple[str, int, int]]], cuts: list[float], pauses: bool
) -> None:
    """First each request in a packet of its own, then all in one stream that is cut anywhere."""

    def made(kind: str, seed: int, rows: int) -> tuple[bytes, np.ndarray | int]:
        build, status = KINDS[kind]
        values = pixels(seed, rows)
        return build(values), session.run({"pixels": values})["probabilities"] if status == 200 else status

    asked = [[made(*request) for request in requests] for requests in clients]

    async def main() -> None:
        server = Server(runtime)
        opened = [server.connect() for _ in asked]
        await in_turns(server, opened, asked, pauses)
        for (connection, _), requests in zip(opened, asked, strict=True):
            for piece in pieces(b"".join(request for request, _ in requests), cuts):
                connection.data_received(piece)
        await server.settle()
        assert (server.plane.admission.waiting, server.plane.admission.waiting_bytes) == (0, 0)
        for (_, transport), requests in zip(opened, asked, strict=True):
            for answer, (_, wanted) in zip(split(transport.data), [*requests, *requests], strict=True):
                check(answer, wanted)
        answered = sum(server.plane.metrics.requests.values()) + sum(server.catalog._answered.values())
        assert answered == 2 * sum(map(len, asked))

    asyncio.run(main())


def test_a_known_head_with_another_json_of_the_same_length_is_judged_anew(
    runtime: OnnxRuntime, session: Session
) -> None:
    values = pixels(1, 2)
    right = binary(values)
    wanted = session.run({"pixels": values})["probabilities"]

    async def main() -> None:
        server = Server(runtime)
        connection, transport = server.connect()
        for old, new in ((b"pixels", b"pixelz"), (b"[2, 64]", b"[4, 32]"), (b"FP32", b"FP64"), (b": 512", b": 508")):
            assert old in right
            for data in (right, right, right.replace(old, new), right):
                connection.data_received(data)
            await server.settle()
        for index, answer in enumerate(split(transport.data)):
            check(answer, 400 if index % 4 == 2 else wanted)

    asyncio.run(main())


def test_the_stores_of_heads_are_bounded(runtime: OnnxRuntime, session: Session) -> None:
    """More request heads and more JSON heads than are kept: the answers stay right."""
    values = pixels(3)
    wanted = session.run({"pixels": values})["probabilities"]

    async def main() -> None:
        server = Server(runtime)
        connection, transport = server.connect()
        codec = server.catalog._routes_of(server.plane, server.endpoint).inference.codec
        kept = set()
        for number in range(1100):
            connection.data_received(binary(values, b"X-Number: %d\r\n" % number, note=number))
            kept.add((len(server.service.heads), len(codec.known)))
            if number % 50 == 0:
                await server.settle()
        connection.data_received(binary(values, b"X-Number: 5\r\n", note=5))
        connection.data_received(binary(values, b"X-" + b"N" * 3000 + b": 1\r\n"))  # too long to be kept
        await server.settle()
        assert max(kept) == (1024, 1024)
        assert all(len(head) <= 2048 for head in server.service.heads)
        answers = split(transport.data)
        assert len(answers) == 1102
        for answer in answers:
            check(answer, wanted)

    asyncio.run(main())


def test_one_bad_request_of_a_batch_fails_alone(runtime: OnnxRuntime, session: Session) -> None:
    rows = [pixels(seed) for seed in range(8)]
    wanted: list[Any] = [session.run({"pixels": row})["probabilities"] for row in rows]
    rows[3][0, 5], wanted[3] = np.inf, 400

    async def main() -> None:
        server = Server(runtime)
        opened = [server.connect() for _ in rows]
        for _ in range(2):
            for (connection, _), row in zip(opened, rows, strict=True):
                connection.data_received(binary(row))
            await server.settle()
        for (_, transport), expected in zip(opened, wanted, strict=True):
            for answer in split(transport.data):
                check(answer, expected)
        assert server.plane.metrics.failures == 2
        assert server.plane.metrics.rows == 14
        assert server.plane.metrics.latency.total == 16

    asyncio.run(main())


@pytest.mark.parametrize("form", [binary, as_json])
def test_answers_follow_the_date_and_the_drain(
    runtime: OnnxRuntime, session: Session, form: Callable[[np.ndarray], bytes]
) -> None:
    values = pixels(4)
    wanted = session.run({"pixels": values})["probabilities"]

    async def main() -> None:
        server = Server(runtime)
        connection, transport = server.connect()

        async def ask() -> dict[bytes, bytes]:
            transport.data = b""
            connection.data_received(form(values))
            await server.settle()
            (answer,) = split(transport.data)
            check(answer, wanted)
            return answer[1]

        for date in (b"Thu, 01 Jan 1970 00:00:00 GMT", b"Thu, 01 Jan 1970 00:00:01 GMT"):
            server.service.date_line = b"Date: %s\r\n" % date
            for _ in range(2):
                headers = await ask()
                assert headers[b"Date"] == date
                assert b"Connection" not in headers
        server.service.is_draining = True
        assert (await ask())[b"Connection"] == b"close"
        assert transport.is_closed

    asyncio.run(main())


@pytest.mark.parametrize("form", [binary, as_json])
@pytest.mark.parametrize("cast", [lambda found: found.astype(np.float64), lambda found: found[:, :3]])
def test_outputs_that_are_not_the_signatures_are_described_as_they_are(
    runtime: OnnxRuntime, form: Callable[[np.ndarray], bytes], cast: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Never a header that speaks of other bytes than those that follow."""

    def infer(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"probabilities": cast(runtime.infer(tensors)["probabilities"])}

    async def main() -> None:
        server = Server(runtime, infer)
        connection, transport = server.connect()
        values = pixels(5)
        for _ in range(3):
            connection.data_received(form(values))
            await server.settle()
        expected = infer({"pixels": values})["probabilities"]
        for status, headers, body in split(transport.data):
            assert status == 200
            length = headers.get(b"Inference-Header-Content-Length")
            (output,) = json.loads(body if length is None else body[: int(length)])["outputs"]
            assert output["shape"] == list(expected.shape)
            if length is None:
                np.testing.assert_allclose(output["data"], expected.reshape(-1), rtol=1e-6)
            else:
                assert output["parameters"]["binary_data_size"] == len(body) - int(length) == expected.nbytes

    asyncio.run(main())


def test_who_goes_away_is_not_counted_and_holds_nothing(runtime: OnnxRuntime, session: Session) -> None:
    values = pixels(6)
    wanted = session.run({"pixels": values})["probabilities"]

    async def main() -> None:
        server = Server(runtime)
        (leaver, left), (stayer, stayed) = server.connect(), server.connect()
        for _ in range(2):  # the second time both are known
            for connection in (leaver, stayer):
                connection.data_received(binary(values))
            await server.settle()
        for connection in (leaver, stayer):
            connection.data_received(binary(values))
        assert server.plane.admission.waiting == 2
        leaver.connection_lost(None)
        assert server.plane.admission.waiting == 1
        await server.settle()
        assert len(split(left.data)) == 2
        for answer in split(stayed.data):
            check(answer, wanted)
        assert len(split(stayed.data)) == 3
        assert server.plane.metrics.rows == 5

    asyncio.run(main())


@pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # of torch, where another test has loaded it: all objects are looked at
def test_an_answered_request_is_freed_at_once(runtime: OnnxRuntime) -> None:
    """A cycle per request would leave its memory to the garbage collector."""

    async def main() -> None:
        server = Server(runtime)
        connection, _ = server.connect()
        gc.collect()
        gc.disable()
        try:
            for data in (binary(pixels(7)), as_json(pixels(7)), binary(pixels(7).reshape(2, 32))) * 5:
                connection.data_received(data)
                await server.settle()
            left = [one for one in gc.get_objects() if isinstance(one, Exchange)]
        finally:
            gc.enable()
        assert left == []

    asyncio.run(main())
