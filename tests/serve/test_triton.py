"""NVIDIA's client, unmodified."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.formats.session import open_session

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # gevent and geventhttpclient warn at import
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def client(digits: Any) -> Any:
    client = triton.InferenceServerClient(f"127.0.0.1:{digits.port}")
    yield client
    client.close()


def pixels_input(rows: int, binary: bool) -> tuple[np.ndarray, Any]:
    pixels = np.random.default_rng(rows).integers(0, 17, (rows, 64)).astype(np.float32)
    tensor = triton.InferInput("pixels", [rows, 64], "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return pixels, tensor


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "3")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "millrace"
    assert client.get_model_metadata("digits")["inputs"][0]["shape"] == [-1, 64]
    assert client.get_model_repository_index()[0]["state"] == "READY"
    config = client.get_model_config("digits")
    assert (config["input"][0]["dims"], config["input"][0]["data_type"]) == ([64], "TYPE_FP32")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("rows", [1, 7])
def test_infer(client: Any, digits_bundle: Path, binary_in: bool, binary_out: bool | None, rows: int) -> None:
    pixels, tensor = pixels_input(rows, binary_in)
    outputs = None if binary_out is None else [triton.InferRequestedOutput("probabilities", binary_data=binary_out)]
    result = client.infer("digits", [tensor], outputs=outputs, request_id="abc")
    expected = open_session(digits_bundle / "model.onnx").run({"pixels": pixels})["probabilities"]
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, rtol=1e-5, atol=1e-7)
    assert result.get_response()["id"] == "abc"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed(client: Any, algorithm: str) -> None:
    _, tensor = pixels_input(3, True)
    result = client.infer("digits", [tensor], request_compression_algorithm=algorithm)
    assert result.as_numpy("probabilities").shape == (3, 10)


def test_statistics_count(client: Any) -> None:
    def rows() -> int:
        return client.get_inference_statistics("digits")["model_stats"][0]["inference_count"]

    before = rows()
    _, tensor = pixels_input(5, True)
    client.infer("digits", [tensor])
    assert rows() == before + 5
    stats = client.get_inference_statistics()["model_stats"][0]
    assert sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in stats["batch_stats"]) == rows()


def test_errors_reach_the_client(client: Any) -> None:
    _, tensor = pixels_input(1, True)
    with pytest.raises(InferenceServerException, match="model 'nobody' is not served here"):
        client.infer("nobody", [tensor])
    wrong = triton.InferInput("pixels", [1, 63], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 63), np.float32))
    with pytest.raises(InferenceServerException, match=r"input 'pixels': want shape \[-1, 64\]"):
        client.infer("digits", [wrong])


def test_texts(table: Any) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{table.port}")
    for binary in (True, False):
        numbers = triton.InferInput("numbers", [2, 2], "FP32")
        numbers.set_data_from_numpy(np.array([[1, 2], [3, 4]], np.float32), binary_data=binary)
        categories = triton.InferInput("categories", [2, 1], "BYTES")
        categories.set_data_from_numpy(np.array([["a"], ["b"]], dtype=object), binary_data=binary)
        result = client.infer("prices", [numbers, categories])
        assert result.as_numpy("value").tolist() == [[13.0], [7.0]]
    client.close()
