"""gRPC on a small MLP: calls per second of ours, and of KServe's where `MILLRACE_TEST_KSERVE` names its Python.

`python benchmarks/serving_grpc.py`. The server has one core, whoever asks another: `h2load` where it is installed
(`apt-get install nghttp2-client`), which costs less than the servers do, else grpcio's asyncio client, which is then
the limit. Both servers are asked in turns by the same; medians of the rounds are told.

`python benchmarks/serving_grpc.py --model text` (or `cnn`): the models of `serving_heavy.py` on all cores, against the
best of onnxruntime alone in the same run. Needs `h2load`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serve"))
import serving_heavy

import conftest
from millrace.serve.grpc.messages import message_type
from millrace.serve.process import ServerProcess

CONNECTIONS, STREAMS, ROUNDS, SECONDS, KSERVE_PORT = 4, 16, 3, 4.0, 18081
METHOD = "/inference.GRPCInferenceService/ModelInfer"
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


def request_of(name: str, tensor: str, datatype: str, row: np.ndarray) -> bytes:
    """One row."""
    message = message_type("ModelInferRequest")(model_name=name)
    message.inputs.add(name=tensor, datatype=datatype, shape=row.shape)
    message.raw_input_contents.append(row.tobytes())
    return message.SerializeToString()


DIGIT = request_of("digits", "pixels", "FP32", np.zeros((1, conftest.PIXELS), np.float32))


def with_h2load(port: int, calls: int, data: bytes, answer_bytes: int, folder: Path) -> float:
    """Calls per second of a native client; every one of them must be answered in full."""
    body = folder / "body"
    body.write_bytes(b"\0" + len(data).to_bytes(4, "big") + data)
    done = subprocess.run(
        ["h2load", "-n", str(calls), "-c", str(CONNECTIONS), "-m", str(STREAMS), "-d", str(body),
         "--header", "content-type: application/grpc", "--header", "te: trailers", f"http://127.0.0.1:{port}{METHOD}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (got_bytes,) = re.findall(r"\((\d+)\) data", done.stdout)
    if f"{calls} succeeded" not in done.stdout or int(got_bytes) != calls * (5 + answer_bytes):
        raise SystemExit(f"h2load was not answered:\n{done.stdout}")
    return float(re.findall(r", ([\d.]+) req/s", done.stdout)[0])


async def with_grpcio(port: int) -> float:
    """Closed loop over a few connections."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(CONNECTIONS)]
    call_of = [channel.unary_unary(METHOD) for channel in channels]
    until = time.perf_counter() + SECONDS

    async def ask(index: int) -> int:
        count = 0
        while time.perf_counter() < until:
            await call_of[index % CONNECTIONS](DIGIT)
            count += 1
        return count

    counts = await asyncio.gather(*[ask(index) for index in range(CONNECTIONS * STREAMS)])
    for channel in channels:
        await channel.close()
    return sum(counts) / SECONDS


def answer_bytes(port: int, data: bytes) -> int:
    """How long an answer is, once there is one, and it is right."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = channel.unary_unary(METHOD)(data, wait_for_ready=True, timeout=60)
    (output,) = message_type("ModelInferResponse").FromString(answer).outputs
    if list(output.shape) != [1, conftest.CLASSES]:
        raise SystemExit(f"port {port} answers something else: {output}")
    return len(answer)


def cpu_s(pid: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def measure(servers: dict[str, tuple[int, int]], folder: Path) -> None:
    """Ask in turns and print; `servers` are process and port by name."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    costs: dict[str, list[float]] = {name: [] for name in servers}
    sizes = {name: answer_bytes(port, DIGIT) for name, (_, port) in servers.items()}
    has_h2load = shutil.which("h2load") is not None
    calls = {name: 1000 for name in servers}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, (pid, port) in servers.items():
            before_s = cpu_s(pid)
            if has_h2load:
                rate = with_h2load(port, calls[name], DIGIT, sizes[name], folder)
            else:
                rate = asyncio.run(with_grpcio(port))
            asked = calls[name] if has_h2load else rate * SECONDS
            calls[name] = max(1000, int(rate * SECONDS))
            if turn:
                rates[name].append(rate)
                costs[name].append((cpu_s(pid) - before_s) / asked * 1e6)
    client = "h2load" if has_h2load else "grpcio"
    for name in servers:
        shown = ", ".join(f"{rate:.0f}" for rate in rates[name])
        print(
            f"{name}, {CONNECTIONS} connections with {STREAMS} calls each by {client}, one core each: "
            f"{statistics.median(rates[name]):.0f}/s ({shown}), {statistics.median(costs[name]):.0f} us of server each"
        )
    if len(servers) > 1:
        ours, theirs = (statistics.median(values) for values in rates.values())
        print(f"ratio {ours / theirs:.2f}")


def measure_small() -> None:
    """Start what is asked, and measure."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "digits"
        conftest.make_bundle(place, conftest.dense_graph(), conftest.DIGITS, {"pixels": conftest.make_pixels(300)})
        os.sched_setaffinity(0, {cores[0]})  # what is started now stays there
        server = ServerProcess(conftest.child_config(place / "bundle", grpc_port=0))
        server.wait_ready()
        servers = {"millrace": (server.pid, server.grpc_port)}
        python, peer = os.environ.get("MILLRACE_TEST_KSERVE"), None
        if python:
            peer = subprocess.Popen(
                [python, "-c", KSERVE, str(place / "base.onnx"), str(KSERVE_PORT)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            servers["KServe"] = (peer.pid, KSERVE_PORT)
        os.sched_setaffinity(0, {cores[-1]})
        try:
            measure(servers, Path(name))
        finally:
            server.stop()
            if peer is not None:
                peer.terminate()
                peer.wait()


def measure_heavy(case: serving_heavy.Case, seconds: float) -> None:
    """A model that is slow by itself, on all cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = serving_heavy.bundle_of(case, folder)
        data = request_of(case.name, case.spec.name, case.datatype, case.row)
        raws = [serving_heavy.raw_best(case, seconds)]
        process = ServerProcess(
            conftest.child_config(
                bundle, name=case.name, grpc_port=0, queue_s=30.0, calibrations=str(folder / "calibrations")
            )
        )
        try:
            port = process.wait_ready()
            source = serving_heavy.wait_for(port, case.name, {"idle"})["source"]
            size, path = answer_bytes(process.grpc_port, data), f"/v2/models/{case.name}/infer"
            environment = serving_heavy.bodies(case, folder)["binary"]
            many = max(128, int(raws[0].rows_per_s * seconds))
            with_h2load(process.grpc_port, 128, data, size, folder)  # warm-up
            found, http = [], []
            for _ in range(2):
                found.append(with_h2load(process.grpc_port, many, data, size, folder))
                http.append(serving_heavy.wrk(port, path, environment, CONNECTIONS * STREAMS, seconds)["rps"])
                serving_heavy.settle(port, case.name)
        finally:
            process.stop()
        raws.append(serving_heavy.raw_best(case, seconds))
    best = max(raw.rows_per_s for raw in raws)
    both = " and ".join(f"{raw.rows_per_s:.1f}" for raw in raws)
    print(
        f"{case.name}: gRPC c=64 {max(found):.1f}/s = {max(found) / best:.3f} of raw best ({both} rows/s before and "
        f"after), {statistics.mean(found) / statistics.mean(http):.3f} of HTTP in turns ({max(http):.1f}/s); "
        f"calibration: {source}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["small", "text", "cnn"], default="small")
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    if arguments.model == "small":
        measure_small()
        return
    (case,) = [one for one in serving_heavy.cases() if one.name == arguments.model]
    measure_heavy(case, arguments.seconds)


if __name__ == "__main__":
    main()
