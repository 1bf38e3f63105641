"""Clients that others wrote, unmodified, against one server: what each of them gets is what the model says.

KServe's and MLServer's pin packages that ours do not bear: `MILLRACE_TEST_KSERVE` and `MILLRACE_TEST_MLSERVER` name
the Python of an environment that has them; without, those tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.formats.session import open_session

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tritonclient.grpc as triton_grpc
    import tritonclient.http as triton_http
    import tritonclient.http.aio as triton_http_aio

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def live(kit: Any, digits_bundle: Path) -> Iterator[Any]:
    live = kit.Live(kit.child_config(digits_bundle, grpc_port=0))
    yield live
    assert live.process.stop() == 0


@pytest.fixture(scope="module")
def pixels(kit: Any) -> np.ndarray:
    return kit.make_pixels(40, seed=3)


@pytest.fixture(scope="module")
def expected(digits_bundle: Path, pixels: np.ndarray) -> np.ndarray:
    return open_session(digits_bundle / "model.onnx").run({"pixels": pixels})["probabilities"]


def triton_input(kind: Any, pixels: np.ndarray, **options: Any) -> Any:
    tensor = kind.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels, **options)
    return tensor


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_tritonclient_http(
    live: Any, pixels: np.ndarray, expected: np.ndarray, is_binary: bool, encoding: str | None
) -> None:
    with triton_http.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
        result = client.infer(
            "digits", [triton_input(triton_http, pixels, binary_data=is_binary)],
            outputs=[triton_http.InferRequestedOutput("probabilities", binary_data=is_binary)],
            request_compression_algorithm=encoding, response_compression_algorithm=encoding,
        )  # fmt: skip
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-6)


@pytest.mark.parametrize("is_binary", [True, False])
def test_tritonclient_http_aio(live: Any, pixels: np.ndarray, expected: np.ndarray, is_binary: bool) -> None:
    async def ask() -> Any:
        async with triton_http_aio.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
            assert await client.is_model_ready("digits")
            return await client.infer("digits", [triton_input(triton_http_aio, pixels, binary_data=is_binary)])

    np.testing.assert_allclose(asyncio.run(ask()).as_numpy("probabilities"), expected, atol=1e-6)


def test_tritonclient_grpc(live: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{live.process.grpc_port}") as client:
        for encoding in (None, "gzip", "deflate"):
            result = client.infer("digits", [triton_input(triton_grpc, pixels)], compression_algorithm=encoding)
            np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-6)


def test_curl(live: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = {"inputs": [{"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": pixels[0].tolist()}]}
    for options in (["--json", "@-"], ["--compressed", "--data-binary", "@-"]):
        done = subprocess.run(
            ["curl", "-sS", "--fail-with-body", *options, f"http://127.0.0.1:{live.port}/v2/models/digits/infer"],
            input=json.dumps(body).encode(), capture_output=True, timeout=20,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(json.loads(done.stdout)["outputs"][0]["data"], expected[0], atol=1e-6)


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main():
    order = json.load(sys.stdin)
    pixels = np.array(order["pixels"], np.float32)
    base = f"http://127.0.0.1:{order['port']}"
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await rest.is_server_live(base) and await rest.is_server_ready(base)
    assert await rest.is_model_ready(base, "digits")
    grpc = InferenceGRPCClient(f"127.0.0.1:{order['grpc_port']}")
    assert await grpc.is_server_live() and await grpc.is_server_ready() and await grpc.is_model_ready("digits")
    answers = []
    for is_binary in (False, True):
        tensor = InferInput("pixels", list(pixels.shape), "FP32")
        tensor.set_data_from_numpy(pixels, binary_data=is_binary)
        request = InferRequest(model_name="digits", infer_inputs=[tensor])
        answers.append((await rest.infer(base, request, model_name="digits")).outputs[0].as_numpy().tolist())
        answers.append((await grpc.infer(request)).outputs[0].as_numpy().tolist())
    await rest.close()
    await grpc.close()
    print(json.dumps(answers))

asyncio.run(main())
"""


def test_kserve(live: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    python = os.environ.get("MILLRACE_TEST_KSERVE")
    if not python:
        pytest.skip("MILLRACE_TEST_KSERVE names no Python with kserve")
    order = {"pixels": pixels.tolist(), "port": live.port, "grpc_port": live.process.grpc_port}
    done = subprocess.run(
        [python, "-c", KSERVE], input=json.dumps(order).encode(), capture_output=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == 4
    for answer in answers:
        np.testing.assert_allclose(answer, expected, atol=1e-6)


def test_mlserver_infer(live: Any, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    python = os.environ.get("MILLRACE_TEST_MLSERVER")
    if not python:
        pytest.skip("MILLRACE_TEST_MLSERVER names no Python with mlserver")
    rows = [
        {"inputs": [{"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": row.tolist()}]} for row in pixels
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    done = subprocess.run(
        [Path(python).with_name("mlserver"), "infer", "-u", f"127.0.0.1:{live.port}", "-m", "digits",
         "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-w", "1"],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == len(rows)
    by_row = {answer.get("parameters", {}).get("batch_index", index): answer for index, answer in enumerate(answers)}
    for index, answer in by_row.items():
        np.testing.assert_allclose(answer["outputs"][0]["data"], expected[int(index)], atol=1e-6)
