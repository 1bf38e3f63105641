"""A hundred thousand different requests at once over many connections: does each get its own answer?

Run: `python benchmarks/serving_answers.py [--requests 100000]`; about a minute. The model adds up two numbers, so that
an answer tells whose it is. 64 connections, eight requests on the way on each; of every four requests one is JSON, one
binary, one a row for `:predict`, one wrong: it must get a 400 and must not disturb the others of its batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plain_bundles import plain_bundle, saved
from storming import binary_body

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig

CONNECTIONS, ON_THE_WAY = 64, 8
JSON, BINARY, ROW, WRONG = range(4)


def sum_bundle(folder: Path) -> Path:
    """x[0] + x[1]."""
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    nodes = [helper.make_node("ReduceSum", ["x", "axis"], ["value"], keepdims=1)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])]
    outputs = [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows", 1])]
    graph = helper.make_graph(nodes, "sum", inputs, outputs, [axis])
    path = saved(graph, folder / "sum.onnx")
    signature = Signature(
        task="regression", label="y",
        inputs=[TensorSpec(name="x", dtype="float32", shape=[-1, 2], semantic="number", columns=["a", "b"])],
        outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1], semantic="value")],
    )  # fmt: skip
    tensors = {"x": np.ones((2, 2), np.float32)}
    return plain_bundle(folder / "bundle", path, signature, tensors)


def kind_of(number: int) -> int:
    """Of a request: each connection sends all kinds."""
    return number // CONNECTIONS % 4


def request_of(number: int) -> bytes:
    """The request whose answer is its number plus a half."""
    kind, json_bytes, path = kind_of(number), 0, "/v2/models/sum/infer"
    if kind == BINARY:
        body, json_bytes = binary_body("x", "FP32", np.array([[number, 0.5]], np.float32))
    elif kind == ROW:
        path = "/v1/models/sum:predict"
        body = json.dumps({"instances": [{"a": number, "b": 0.5}]}).encode()
    else:
        values = [number, 0.5] if kind == JSON else [number, 0.5, 1.0]
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": values}]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    if json_bytes:
        head += f"Inference-Header-Content-Length: {json_bytes}\r\n"
    return head.encode() + b"\r\n" + body


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Status, length of the JSON before binary data (0: there is none), body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
    body = await reader.readexactly(int(fields["content-length"]))
    return int(head[0].split()[1]), int(fields.get("inference-header-content-length", 0)), body


def verdict(number: int, status: int, json_bytes: int, body: bytes) -> str:
    """What is to be said of an answer."""
    kind = kind_of(number)
    if kind == WRONG:
        return "refused as it should be" if status == 400 else f"a wrong request got {status}"
    if status != 200:
        return f"a right request got {status}"
    if kind == BINARY:
        value = float(np.frombuffer(body[json_bytes:], np.float32)[0])
    else:
        found = json.loads(body)
        value = found["predictions"][0]["value"] if kind == ROW else found["outputs"][0]["data"][0]
    return "its own answer" if value == number + 0.5 else "SOMEBODY ELSE'S ANSWER"


async def ask(port: int, numbers: range, found: Counter[str]) -> None:
    """One connection's requests, some on the way at a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    room = asyncio.Semaphore(ON_THE_WAY)

    async def send() -> None:
        for number in numbers:
            await room.acquire()
            writer.write(request_of(number))

    sending = asyncio.create_task(send())
    for number in numbers:
        found[verdict(number, *await answer_of(reader))] += 1
        room.release()
    await sending
    writer.close()


async def ask_all(port: int, requests: int) -> Counter[str]:
    """All connections at once."""
    found: Counter[str] = Counter()
    await asyncio.gather(*[ask(port, range(first, requests, CONNECTIONS), found) for first in range(CONNECTIONS)])
    return found


def main() -> None:
    """Ask and print what the answers were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        config = ServerConfig(name="sum", version="1", port=0)
        process = ServerProcess(ChildConfig(bundle_dir=str(sum_bundle(Path(name))), server=config))
        try:
            found = asyncio.run(ask_all(process.wait_ready(), arguments.requests))
        finally:
            process.stop()
    print(f"{sum(found.values()):,} requests: " + ", ".join(f"{count:,} {what}" for what, count in found.most_common()))
    if set(found) != {"its own answer", "refused as it should be"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
