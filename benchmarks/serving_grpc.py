"""gRPC at 64 calls in flight on a small MLP: ours, and KServe's where `MILLRACE_TEST_KSERVE` names its Python.

`python benchmarks/serving_grpc.py`. The server has one core, the client (grpc.aio, the same for both) another.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serve"))
import conftest
from millrace.serve.grpc.messages import message_type
from millrace.serve.process import ServerProcess

CONCURRENCY, SECONDS, KSERVE_PORT = 64, 5.0, 18081
KSERVE = """
import sys
import onnxruntime
from kserve import InferOutput, InferResponse, Model, ModelServer
class Digits(Model):
    def __init__(self):
        super().__init__("digits")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options)
        self.ready = True
    def predict(self, payload, headers=None, response_headers=None):
        values = self.session.run(None, {"pixels": payload.inputs[0].as_numpy()})[0]
        output = InferOutput("probabilities", list(values.shape), "FP32")
        output.set_data_from_numpy(values)
        return InferResponse(payload.id or "", "digits", [output])
ModelServer(http_port=18080, grpc_port=int(sys.argv[2]), workers=1).start([Digits()])
"""


async def calls_per_second(port: int) -> float:
    """Closed loop over a few connections."""
    request = message_type("ModelInferRequest")(model_name="digits")
    request.inputs.add(name="pixels", datatype="FP32", shape=[1, 64])
    request.raw_input_contents.append(np.zeros((1, 64), np.float32).tobytes())
    data = request.SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(4)]
    call_of = [channel.unary_unary("/inference.GRPCInferenceService/ModelInfer") for channel in channels]
    await asyncio.gather(*[call(data, wait_for_ready=True, timeout=60) for call in call_of])
    until = time.perf_counter() + SECONDS

    async def ask(index: int) -> int:
        count = 0
        while time.perf_counter() < until:
            await call_of[index % 4](data)
            count += 1
        return count

    counts = await asyncio.gather(*[ask(index) for index in range(CONCURRENCY)])
    for channel in channels:
        await channel.close()
    return sum(counts) / SECONDS


def main() -> None:
    """Measure and print."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "digits"
        conftest.make_bundle(place, conftest.dense_graph(), conftest.DIGITS, {"pixels": conftest.make_pixels(300)})
        server = ServerProcess(conftest.child_config(place / "bundle", grpc_port=0))
        server.wait_ready()
        os.sched_setaffinity(server.pid, {cores[0]})
        os.sched_setaffinity(0, {cores[-1]})
        ours = asyncio.run(calls_per_second(server.grpc_port))
        server.stop()
        print(f"c={CONCURRENCY}, one core each: millrace {ours:.0f}/s")
        python = os.environ.get("MILLRACE_TEST_KSERVE")
        if python:
            peer = subprocess.Popen(
                ["taskset", "-c", str(cores[0]), python, "-c", KSERVE, str(place / "base.onnx"), str(KSERVE_PORT)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            theirs = asyncio.run(calls_per_second(KSERVE_PORT))
            peer.terminate()
            peer.wait()
            print(f"KServe {theirs:.0f}/s: ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
