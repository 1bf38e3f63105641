"""Hostile and broken requests: always a 4xx with `{"error": …}`, and the server lives."""

from __future__ import annotations

import itertools
import json
import socket
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INFER = "/v2/models/digits/infer"
ZEROS = [0.0] * 64
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tensor(**changes: Any) -> dict[str, Any]:
    """A right tensor with changes; None removes a field."""
    value = {"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": ZEROS, **changes}
    return {key: item for key, item in value.items() if item is not None}


def binary(size: int, **changes: Any) -> dict[str, Any]:
    """A right binary tensor with changes."""
    return tensor(data=None, parameters={"binary_data_size": size}, **changes)


def exchange(port: int, data: bytes, half_close: bool = False, timeout_s: float = 10.0) -> bytes:
    """Everything that the server answers to raw bytes until it closes or falls silent for a moment."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        try:
            client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before everything was sent
        answer = b""
        try:
            while chunk := client.recv(1 << 16):
                answer += chunk
        except OSError:
            pass
        return answer


def status_and_error(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]


def is_alive(digits: Any) -> bool:
    return digits.call("GET", "/v2/health/ready") == (200, {"ready": True})


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ([tensor(name="pixel")], "input 'pixel': unknown; this model wants 'pixels'"),
        ([tensor(datatype="FP64")], "input 'pixels': want datatype FP32, got 'FP64'"),
        ([tensor(datatype=None)], "input 'pixels': want datatype FP32, got null"),
        ([tensor(shape=[1, 63])], "input 'pixels': want shape [-1, 64]"),
        ([tensor(shape=[64])], "input 'pixels': want shape [-1, 64]"),
        ([tensor(shape=[])], "input 'pixels': want shape [-1, 64]"),
        ([tensor(shape=None)], "input 'pixels': want shape [-1, 64]"),
        ([tensor(shape="1,64")], "input 'pixels': want shape"),
        ([tensor(shape=[1.0, 64])], "input 'pixels': want shape"),
        ([tensor(shape=[-1, 64])], "input 'pixels': want no row or some"),
        ([tensor(shape=[-1, -64])], "input 'pixels': want shape"),
        ([tensor(shape=[0, 64])], "input 'pixels': want 0 numbers for shape [0, 64], got 64"),
        ([tensor(shape=[2**63, 64])], "input 'pixels': shape"),
        ([tensor(shape=[2**62, 64])], "input 'pixels': shape"),
        ([tensor(shape=[2**70, 64])], "input 'pixels'"),
        ([tensor(shape=[True, 64])], "input 'pixels': want shape"),
        ([tensor(data=ZEROS[1:])], "input 'pixels': want 64 numbers for shape [1, 64], got 63"),
        ([tensor(data=["0"] * 64)], "input 'pixels': want numbers, got '0' at element 0"),
        ([tensor(data=[None] * 64)], "input 'pixels': want numbers, got null at element 0"),
        ([tensor(data=[[0.0] * 32, [0.0] * 31])], "input 'pixels': want 64 numbers"),
        ([tensor(data=[1e39, *ZEROS[1:]])], "input 'pixels': has a number that FP32 cannot hold"),
        ([tensor(data=None)], "input 'pixels': want data, a list, got null"),
        ([tensor(data={})], "input 'pixels': want data, a list"),
        ([tensor(), tensor()], "input 'pixels': given twice"),
        ([], "input 'pixels': missing"),
        ([5], "inputs[0].name"),
        ("pixels", "inputs: want a list of tensors"),
        (None, "inputs: want a list of tensors"),
        ([tensor(parameters=[])], "input 'pixels': parameters: want an object"),
        ([binary(256)], "input 'pixels': want 256 bytes of binary data, got 0"),
        ([binary(-4)], "input 'pixels': has neither data nor a binary_data_size"),
        ([tensor(parameters={"binary_data_size": 256})], "input 'pixels': has both"),
    ],
)
def test_wrong_tensors_are_named(digits: Any, inputs: Any, wanted: str) -> None:
    status, value = digits.call("POST", INFER, {"inputs": inputs})
    assert status == 400
    assert wanted in value["error"]


@pytest.mark.parametrize(
    "extra",
    [
        {"outputs": [{"name": "logits"}]},
        {"outputs": "all"},
        {"outputs": [{"name": "probabilities", "parameters": {"classification": 3}}]},
        {"id": 5},
        {"parameters": 3},
        {"parameters": {"binary_data_output": "yes"}},
    ],
)
def test_wrong_options(digits: Any, extra: Any) -> None:
    status, value = digits.call("POST", INFER, {"inputs": [tensor()], **extra})
    assert status == 400
    assert value["error"]


@pytest.mark.parametrize(
    ("head", "rest", "length", "wanted"),
    [
        ({"inputs": [binary(256)]}, b"\0" * 255, None, "want 256 bytes of binary data, got 255"),
        ({"inputs": [binary(256)]}, b"\0" * 257, None, "257 bytes after its JSON"),
        ({"inputs": [binary(252)]}, b"\0" * 252, None, "want 256 bytes for shape [1, 64], got 252"),
        ({"inputs": [binary(2**63)]}, b"\0" * 256, None, "bytes of binary data"),
        ({"inputs": [binary(256, shape=[2**63, 64])]}, b"\0" * 256, None, "shape"),
        ({"inputs": [binary(256, shape=[1, -64])]}, b"\0" * 256, None, "shape"),
        ({"inputs": [binary(256)]}, b"\0" * 256, "99999", "Inference-Header-Content-Length"),
        ({"inputs": [binary(256)]}, b"\0" * 256, "-1", "Inference-Header-Content-Length"),
        ({"inputs": [binary(256)]}, b"\0" * 256, "ten", "Inference-Header-Content-Length"),
        ({"inputs": [binary(256)]}, b"\0" * 256, "10", "not JSON"),
        ({}, b"\0" * 255, "0", "multiple of 256 bytes"),
        ({"inputs": [binary(256)]}, struct.pack("<f", float("nan")) * 64, None, "row 0 has nan"),
        ({"inputs": [binary(256)]}, struct.pack("<f", float("inf")) * 64, None, "row 0 has inf"),
    ],
)
def test_wrong_bytes(digits: Any, head: Any, rest: bytes, length: str | None, wanted: str) -> None:
    document = json.dumps(head).encode() if head else b""
    headers = {"Inference-Header-Content-Length": length or str(len(document))}
    status, value = digits.call("POST", INFER, document + rest, headers)
    assert status == 400
    assert wanted in value["error"]


def test_texts_whose_lengths_lie(table: Any) -> None:
    numbers = {"name": "numbers", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    for texts in (b"\xff\xff\xff\xffa", b"\x01\0\0", b"", b"\x02\0\0\0\xff\xfe", b"\0\0\0\0\0\0\0\0"):
        categories = {
            "name": "categories", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(texts)},
        }  # fmt: skip
        head = json.dumps({"inputs": [numbers, categories]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        status, value = table.call("POST", "/v2/models/prices/infer", head + texts, headers)
        assert status == 400
        assert "'categories'" in value["error"]
    infinite = {**numbers, "data": [1e39, 1]}
    categories = {"name": "categories", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
    assert table.call("POST", "/v2/models/prices/infer", {"inputs": [infinite, categories]})[0] == 400
    two = {**categories, "shape": [2, 1], "data": ["a", "b"]}
    status, value = table.call("POST", "/v2/models/prices/infer", {"inputs": [numbers, two]})
    assert (status, "same number of rows" in value["error"]) == (400, True)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'"' * 999, b"\x00\xff", b'{"inputs": [NaN]}', b'{"inputs":[{"name":"\xff"}]}']
)
def test_broken_json(digits: Any, body: bytes) -> None:
    status, value = digits.call("POST", INFER, body)
    assert status == 400
    assert value["error"]
    assert is_alive(digits)


HOST = b"Host: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /v2 HTTP/9.9\r\n" + HOST + b"\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 1048577\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (
            b"POST /v2 HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + (b"80000\r\n" + b"x" * 0x80000 + b"\r\n") * 3,
            413,
        ),
        (b"GET /v2 HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 300_000 + b"\r\n\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\n" + HOST + b"X-a: b\r\n" * 20_000, 431),
        (b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1.evil.example:80\r\n\r\n", 403),
        (b"GET /v2 HTTP/1.1\r\nHost:\r\n\r\n", 403),
        (b"GET /v2 HTTP/1.1\r\n" + HOST + b"Origin: http://evil.example\r\n\r\n", 403),
        (b"GET /v2 HTTP/1.1\r\n" + HOST + b"Origin: null\r\n\r\n", 403),
    ],
)
def test_malformed_http(digits: Any, data: bytes, status: int) -> None:
    got, error = status_and_error(exchange(digits.port, data))
    assert got == status
    assert error
    assert is_alive(digits)


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:8080", b"127.0.0.1:1", b"[::1]", b"[::1]:8080"])
def test_loopback_names_are_served(digits: Any, host: bytes) -> None:
    answer = exchange(digits.port, b"GET /v2/health/live HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_truncated_request(digits: Any) -> None:
    data = b"POST " + INFER.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 500\r\n\r\n" + b"x" * 100
    assert status_and_error(exchange(digits.port, data, half_close=True))[0] == 400
    with socket.create_connection(("127.0.0.1", digits.port)) as client:
        client.sendall(data)  # and gone
    assert is_alive(digits)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"Content-Length: 500\r\n\r\n" + b"x", "whole request"),
        (b"POST /v2 HTTP/1.1\r\n" + HOST + b"X-unfinis", "head"),
    ],
)
def test_a_slow_request_is_told_so(digits: Any, data: bytes, what: str) -> None:
    status, error = status_and_error(exchange(digits.port, data))  # the server's limit is one second here
    assert status == 408
    assert what in error


def test_http_1_0_without_a_host(digits: Any) -> None:
    answer = exchange(digits.port, b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b'{"live":true}')


def test_an_offered_upgrade_is_ignored(digits: Any) -> None:
    data = b"GET /v2/health/live HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert exchange(digits.port, data).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order(digits: Any) -> None:
    body = json.dumps({"inputs": [tensor()], "id": "first"}).encode()
    post = b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (INFER.encode(), HOST, len(body))
    get = b"GET /v2/health/live HTTP/1.1\r\n" + HOST
    answer = exchange(digits.port, (post + body + get + b"\r\n") * 40 + get + b"Connection: close\r\n\r\n")
    kinds = [b'"id":"first"' in part for part in answer.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert kinds == [True, False] * 40 + [False]
    broken = exchange(digits.port, post + body + b"BROKEN\r\n\r\n")
    assert broken.index(b'"id":"first"') < broken.index(b"HTTP/1.1 400")


@SLOW
@given(st.lists(st.integers(1, 900), max_size=6), st.integers(2, 4))
def test_repeated_requests_however_they_are_cut(digits: Any, cuts: list[int], repeats: int) -> None:
    """The second time a head is looked up instead of parsed: in one piece, in several, or several at once."""
    document = json.dumps({"inputs": [binary(256)], "id": "x"}).encode()
    request = (
        b"POST %s HTTP/1.1\r\n%sInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
        % (INFER.encode(), HOST, len(document), len(document) + 256)
        + document
        + bytes(256)
    )
    stream = request * repeats
    last = b"GET /v2/health/live HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    places = [0, *sorted(cut % len(stream) for cut in cuts), len(stream)]
    with socket.create_connection(("127.0.0.1", digits.port), timeout=20) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in itertools.pairwise(places):
            client.sendall(stream[start:end])
        client.sendall(last)
        answer = b""
        while chunk := client.recv(1 << 16):
            answer += chunk
    assert answer.count(b"HTTP/1.1 200 OK") == repeats + 1
    assert answer.count(b'"id":"x"') == repeats


def test_a_known_head_with_another_body_is_judged_anew(digits: Any) -> None:
    head = b"POST %s HTTP/1.1\r\n%sContent-Length: 2\r\n\r\n" % (INFER.encode(), HOST)
    with socket.create_connection(("127.0.0.1", digits.port), timeout=20) as client:
        for body in (b"{}", b"[]", b"{}"):
            client.sendall(head + body)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json")
        client.sendall(head + b"{}GARBAGE\r\n\r\n")
        answer = b""
        while chunk := client.recv(1 << 16):
            answer += chunk
    assert answer.count(b"HTTP/1.1 400") == 2
    assert b"malformed HTTP" in answer


@SLOW
@given(st.binary(max_size=400))
def test_any_bytes(digits: Any, data: bytes) -> None:
    answer = exchange(digits.port, data, half_close=True)
    if answer:
        status, error = status_and_error(answer)
        assert 400 <= status < 500
        assert error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@SLOW
@given(
    fields=st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON, min_size=1),
    extra=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), JSON),
)
def test_any_json_in_any_field(digits: Any, fields: dict[str, Any], extra: dict[str, Any]) -> None:
    body = {"inputs": [{**tensor(), **fields}], **extra}
    status, value = digits.call("POST", INFER, body)
    assert status in (200, 400)
    assert (status == 200) == ("outputs" in value)


@SLOW
@given(data=st.data())
def test_a_right_request_with_bytes_changed(digits: Any, data: Any) -> None:
    pixels = np.zeros((1, 64), np.float32)
    document = json.dumps({"inputs": [binary(256)]}).encode()
    request = bytearray(
        b"POST %s HTTP/1.1\r\n%sConnection: close\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
        % (INFER.encode(), HOST, len(document), len(document) + 256)
        + document
        + pixels.tobytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        request[data.draw(st.integers(0, len(request) - 1))] = data.draw(st.integers(0, 255))
    answer = exchange(digits.port, bytes(request), half_close=True)
    if answer:
        status = int(answer.split(b" ")[1])
        assert status == 200 or 400 <= status < 500


@SLOW
@given(JSON)
def test_any_instances(digits: Any, instances: Any) -> None:
    status, value = digits.call("POST", "/v1/models/digits:predict", {"instances": instances})
    assert status == 400
    assert value["error"]


def test_the_server_is_still_there(digits: Any) -> None:
    assert digits.process.exit_code is None
    assert is_alive(digits)
