"""Clients that take compressed answers: small ones come as they are, byte for byte as to everybody else."""

from __future__ import annotations

import asyncio
import gzip
import json

import numpy as np
import pytest

from millrace.testing.serving import INFER, Doubler, InProcessServer, request, responses

GZIP = b"Accept-Encoding: gzip, deflate\r\n"


def infer(rows: int, is_binary: bool, accept: bytes = b"") -> bytes:
    values = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "parameters": {"binary_data_size": values.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": is_binary}}).encode()
    length = b"Inference-Header-Content-Length: %d\r\n" % len(head)
    return request(INFER, head + values.tobytes(), length + accept)


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("rows", [1, 20, 150, 190, 240, 3000])
def test_small_answers_are_not_compressed(is_binary: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[int] = []

    async def main() -> None:
        server = InProcessServer(Doubler())
        ((_, _, plain),) = await server.ask(infer(rows, is_binary))
        connection, transport = server.connect()
        codec = server.catalog._models[server.plane].inference.codec
        encode = codec.encode
        monkeypatch.setattr(codec, "encode", lambda wanted, job: described.append(job.rows) or encode(wanted, job))
        for _ in range(2):  # the second time its head is known
            connection.data_received(infer(rows, is_binary, GZIP))
            await server.settle()
        for status, headers, body in responses(transport.data):
            is_packed = headers.get(b"Content-Encoding") == b"gzip"
            assert (status, is_packed) == (200, len(plain) >= 1024)
            assert (gzip.decompress(body) if is_packed else body) == plain
        assert not (described and len(plain) < 800), "it is put together from parts that were rendered before"

    asyncio.run(main())
