"""The Open Inference Protocol over real sockets: metadata, JSON and binary tensors in both directions."""

from __future__ import annotations

import gzip
import http.client
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import InputError
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.oip import Codec

pytestmark = pytest.mark.usefixtures("digits")


def infer_body(pixels: np.ndarray, **extra: Any) -> dict[str, Any]:
    """A V2 JSON request."""
    tensor = {"name": "pixels", "shape": list(pixels.shape), "datatype": "FP32", "data": pixels.reshape(-1).tolist()}
    return {"inputs": [tensor], **extra}


def post_raw(port: int, path: str, body: bytes, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response, data


@pytest.fixture(scope="module")
def offline(digits_bundle: Path) -> Any:
    session = open_session(digits_bundle / "model.onnx")
    return lambda pixels: session.run({"pixels": pixels})["probabilities"]


def pixels_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 17, (rows, 64)).astype(np.float32)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/digits/ready", {"name": "digits", "ready": True}),
        ("/v2/models/digits/versions/3/ready", {"name": "digits", "ready": True}),
        ("/v2/models/digits/?x=1", None),
        ("/v1/models", {"models": ["digits"]}),
        ("/v1/models/digits", {"name": "digits", "version": "3", "variant": "fp32", "ready": True}),
    ],
)
def test_documents(digits: Any, path: str, wanted: Any) -> None:
    status, value = digits.call("GET", path)
    assert status == 200
    assert wanted is None or value == wanted


def test_metadata(digits: Any) -> None:
    status, server = digits.call("GET", "/v2")
    assert (status, server["name"]) == (200, "millrace")
    assert "binary_tensor_data" in server["extensions"]
    for path in ("/v2/models/digits", "/v2/models/digits/versions/3"):
        _, model = digits.call("GET", path)
        assert model["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 64]}]
        assert model["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]
        assert model["versions"] == ["3"]
    _, index = digits.call("POST", "/v2/repository/index", {})
    assert index == [{"name": "digits", "version": "3", "state": "READY", "reason": ""}]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v3", 404),
        ("GET", "/v2/models/digit", 404),
        ("GET", "/v2/models/digits/versions/4", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/digits/versions/9/infer", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/digits:explain", 404),
        ("GET", "/v2/models/digits/infer", 405),
        ("DELETE", "/v2/models/digits", 405),
        ("POST", "/v2/health/live", 405),
        ("GET", "/v2/models/digits/a/b/c", 404),
        ("GET", "/v2/models/%00%ff", 404),
    ],
)
def test_what_is_not_there(digits: Any, method: str, path: str, status: int) -> None:
    got, value = digits.call(method, path, {} if method == "POST" else None)
    assert got == status
    assert set(value) == {"error"}
    assert value["error"]


def test_statistics_say_how_the_breaker_stands(digits: Any) -> None:
    (model,) = digits.call("GET", "/v2/models/digits/stats")[1]["model_stats"]
    assert model["millrace"]["breaker"] == {"is_open": False, "failures": 0, "opened": 0}


def test_head_has_no_body(digits: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", digits.port, timeout=20)
    for _ in range(2):  # the connection stays usable
        connection.request("HEAD", "/v2/health/live")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        assert response.headers["Date"]
    connection.close()


@pytest.mark.parametrize("rows", [1, 2, 63, 200])
def test_json_both_ways(digits: Any, offline: Any, rows: int) -> None:
    pixels = pixels_of(rows)
    status, answer = digits.call("POST", "/v2/models/digits/infer", infer_body(pixels, id="r-1"))
    assert status == 200
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("digits", "3", "r-1")
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("probabilities", "FP32", [rows, 10])
    np.testing.assert_allclose(np.reshape(output["data"], (rows, 10)), offline(pixels), rtol=1e-5, atol=1e-7)


def test_a_missing_content_type_is_json(digits: Any) -> None:
    body = json.dumps(infer_body(pixels_of(1))).encode()
    response, _ = post_raw(digits.port, "/v2/models/digits/infer", body, {})
    assert response.status == 200


def test_nested_json_data(digits: Any, offline: Any) -> None:
    pixels = pixels_of(3)
    body = {"inputs": [{"name": "pixels", "shape": [3, 64], "datatype": "FP32", "data": pixels.tolist()}]}
    _, answer = digits.call("POST", "/v2/models/digits/infer", body)
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (3, 10)), offline(pixels), rtol=1e-5, atol=1e-7)


def test_a_large_json_tensor(digits: Any, offline: Any) -> None:
    pixels = pixels_of(1000)
    _, answer = digits.call("POST", "/v2/models/digits/infer", infer_body(pixels))
    data = np.reshape(answer["outputs"][0]["data"], (1000, 10))
    np.testing.assert_allclose(data, offline(pixels), rtol=1e-5, atol=1e-7)


def binary_request(pixels: np.ndarray, **extra: Any) -> tuple[bytes, dict[str, str]]:
    tensor = {
        "name": "pixels", "shape": list(pixels.shape), "datatype": "FP32",
        "parameters": {"binary_data_size": pixels.nbytes},
    }  # fmt: skip
    head = json.dumps({"inputs": [tensor], **extra}).encode()
    return head + pixels.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_binary_both_ways(digits: Any, offline: Any, rows: int) -> None:
    pixels = pixels_of(rows)
    body, headers = binary_request(pixels, parameters={"binary_data_output": True})
    for path in ("/v2/models/digits/infer", "/v2/models/digits/versions/3/infer"):
        response, data = post_raw(digits.port, path, body, headers)
        length = int(response.headers["Inference-Header-Content-Length"])
        answer = json.loads(data[:length])
        assert answer["outputs"][0]["parameters"]["binary_data_size"] == rows * 40
        values = np.frombuffer(data[length:], np.float32).reshape(rows, 10)
        np.testing.assert_allclose(values, offline(pixels), rtol=1e-5, atol=1e-7)


def test_no_rows_are_answered_with_none_and_the_model_is_not_asked(digits: Any) -> None:
    def executions() -> int:
        return digits.call("GET", "/v2/models/digits/stats")[1]["model_stats"][0]["execution_count"]

    before = executions()
    for _ in range(2):  # the second time its head is known
        assert digits.call("POST", "/v2/models/digits/infer", infer_body(pixels_of(0)))[1]["outputs"] == [
            {"name": "probabilities", "datatype": "FP32", "shape": [0, 10], "data": []}
        ]
        body, headers = binary_request(pixels_of(0), parameters={"binary_data_output": True})
        response, data = post_raw(digits.port, "/v2/models/digits/infer", body, headers)
        assert (response.status, response.headers["Inference-Header-Content-Length"]) == (200, str(len(data)))
        assert json.loads(data)["outputs"][0]["shape"] == [0, 10]
    assert executions() == before


def test_binary_in_json_out_and_the_reverse(digits: Any, offline: Any) -> None:
    pixels = pixels_of(2)
    body, headers = binary_request(pixels, outputs=[{"name": "probabilities"}])
    _, data = post_raw(digits.port, "/v2/models/digits/infer", body, headers)
    values = np.reshape(json.loads(data)["outputs"][0]["data"], (2, 10))
    np.testing.assert_allclose(values, offline(pixels), rtol=1e-5, atol=1e-7)
    request = infer_body(pixels, id="7", outputs=[{"name": "probabilities", "parameters": {"binary_data": True}}])
    response, data = post_raw(digits.port, "/v2/models/digits/infer", json.dumps(request).encode(), {})
    length = int(response.headers["Inference-Header-Content-Length"])
    assert json.loads(data[:length])["id"] == "7"
    np.testing.assert_allclose(np.frombuffer(data[length:], np.float32).reshape(2, 10), offline(pixels), atol=1e-6)


def test_raw_binary(digits: Any, offline: Any) -> None:
    pixels = pixels_of(2)
    headers = {"Inference-Header-Content-Length": "0"}
    response, data = post_raw(digits.port, "/v2/models/digits/infer", pixels.tobytes(), headers)
    length = int(response.headers["Inference-Header-Content-Length"])
    np.testing.assert_allclose(np.frombuffer(data[length:], np.float32).reshape(2, 10), offline(pixels), atol=1e-6)


def test_a_compressed_body(digits: Any) -> None:
    body = gzip.compress(json.dumps(infer_body(pixels_of(1))).encode())
    assert digits.call("POST", "/v2/models/digits/infer", body, {"Content-Encoding": "gzip"})[0] == 200
    bomb = gzip.compress(b" " * (8 << 20))
    status, value = digits.call("POST", "/v2/models/digits/infer", bomb, {"Content-Encoding": "gzip"})
    assert status == 400
    assert "after decompression" in value["error"]
    for damaged in (body[:-9], b"no gzip"):
        assert digits.call("POST", "/v2/models/digits/infer", damaged, {"Content-Encoding": "gzip"})[0] == 400
    assert digits.call("POST", "/v2/models/digits/infer", body, {"Content-Encoding": "br"})[0] == 400


def test_a_chunked_body(digits: Any) -> None:
    body = json.dumps(infer_body(pixels_of(4))).encode()
    connection = http.client.HTTPConnection("127.0.0.1", digits.port, timeout=20)
    chunks = (body[start : start + 97] for start in range(0, len(body), 97))
    connection.request("POST", "/v2/models/digits/infer", chunks, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["outputs"][0]["shape"] == [4, 10]
    connection.close()


def test_texts_and_missing_numbers(table: Any) -> None:
    path = "/v2/models/prices/infer"
    body = {
        "inputs": [
            {"name": "numbers", "shape": [2, 2], "datatype": "FP32", "data": [1.5, None, 3, 4]},
            {"name": "categories", "shape": [2, 1], "datatype": "BYTES", "data": ["a", ""]},
        ]
    }
    status, answer = table.call("POST", path, body)
    assert (status, answer["outputs"][0]["data"]) == (200, [11.5, 7.0])
    texts = b"".join(struct.pack("<I", len(text)) + text for text in (b"a", "é".encode()))
    numbers = np.array([[1, 2], [np.nan, 5]], np.float32)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "categories",
                    "shape": [2, 1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(texts)},
                },
                {"name": "numbers", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
            ]
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    _, data = post_raw(table.port, path, head + texts + numbers.tobytes(), headers)
    assert json.loads(data)["outputs"][0]["data"] == [13.0, 5.0]


@pytest.mark.parametrize(
    ("spec", "body", "found"),
    [
        (TensorSpec(name="x", dtype="string", shape=[-1, 1]), "grüß".encode(), [["grüß"]]),
        (TensorSpec(name="x", dtype="string", shape=[-1]), b"", [""]),
        (TensorSpec(name="x", dtype="string", shape=[-1, 2]), b"ab", "a raw binary request has one text"),
        (TensorSpec(name="x", dtype="float32", shape=[-1, -1]), b"abcd", "cannot be told from 4 bytes alone"),
        (TensorSpec(name="x", dtype="float32", shape=[-1, 2]), b"abcd", "want a multiple of 8 bytes, got 4"),
    ],
)
def test_what_a_body_without_json_means(spec: TensorSpec, body: bytes, found: Any) -> None:
    value = TensorSpec(name="y", dtype="float32", shape=[-1, 1])
    codec = Codec("m", "1", Signature(task="regression", inputs=[spec], outputs=[value], label="y"))
    if isinstance(found, str):
        with pytest.raises(InputError, match=found):
            codec.decode(body, 0)
    else:
        tensors = codec.decode(body, 0).tensors
        assert tensors is not None
        assert tensors["x"].tolist() == found


def test_lists_may_be_nested_deeply_but_not_without_end() -> None:
    spec = TensorSpec(name="x", dtype="int64", shape=[-1, 1])
    codec = Codec("m", "1", Signature(task="regression", inputs=[spec], outputs=[spec], label="y"))

    def nested(depth: int) -> bytes:
        data = "[" * depth + "7" + "]" * depth
        return b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"INT64","data":%s}]}' % data.encode()

    tensors = codec.decode(nested(50), None).tensors
    assert tensors is not None
    assert tensors["x"].tolist() == [[7]]
    for depth in (120, 5000):  # the second: a JSON parser's own limit
        with pytest.raises(InputError, match=r"nested more than 100 deep|not JSON"):
            codec.decode(nested(depth), None)


def test_an_output_is_asked_for_once(digits: Any) -> None:
    twice = infer_body(pixels_of(1), outputs=[{"name": "probabilities"}, {"name": "probabilities"}])
    status, value = digits.call("POST", "/v2/models/digits/infer", twice)
    assert (status, value["error"]) == (400, "output 'probabilities': asked for twice")
