"""Rows in, labels and probabilities out."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.formats.session import open_session

PREDICT = "/v1/models/digits:predict"


def row_of(seed: int) -> list[float]:
    return np.random.default_rng(seed).integers(0, 17, 64).astype(float).tolist()


def test_an_image_as_its_tensor_as_columns_and_as_a_list(digits: Any, digits_bundle: Path) -> None:
    row = row_of(1)
    instances = [{"pixels": row}, {f"p{i}": value for i, value in enumerate(row)}, row]
    status, value = digits.call("POST", PREDICT, {"instances": instances})
    assert status == 200
    shares = open_session(digits_bundle / "model.onnx").run({"pixels": np.array([row], np.float32)})["probabilities"][0]
    for answer in value["predictions"]:
        assert answer["label"] == int(shares.argmax())  # the label column is of integers
        assert list(answer["probabilities"]) == [str(digit) for digit in range(10)]
        np.testing.assert_allclose(list(answer["probabilities"].values()), shares, atol=1e-6)


def test_curls_default_content_type(digits: Any) -> None:
    body = json.dumps({"instances": [{"pixels": row_of(2)}]}).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert digits.call("POST", PREDICT, body, headers)[0] == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_itself_with_a_body_that_waits_for_100_continue(digits: Any, tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_text(json.dumps({"instances": [{"pixels": row_of(seed)} for seed in range(1500)]}))
    url = f"http://127.0.0.1:{digits.port}{PREDICT}"
    command = ["curl", "-s", "--fail", "-H", "Expect: 100-continue", url, "-d", f"@{path}"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert len(json.loads(done.stdout)["predictions"]) == 1500


def test_a_table_by_column_with_missing_values(table: Any) -> None:
    instances = [
        {"age": 1, "income": 2.5, "plan": "a", "id": 7},  # other columns are ignored
        {"age": None, "income": 5, "plan": None},
        {"age": True, "income": 0, "plan": 3},
    ]
    status, value = table.call("POST", "/v1/models/prices:predict", {"instances": instances})
    assert (status, value) == (200, {"predictions": [{"value": 13.5}, {"value": 5.0}, {"value": 1.0}]})


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ([{"pixels": [1.0] * 63}], "instances[0].pixels: want 64 numbers, got 63"),
        ([{"pixels": [1.0] * 64}, {"pixels": ["a", *[1.0] * 63]}], "instances[1].pixels[0]: want a number, got 'a'"),
        ([{"pixels": [None] * 64}], "instances[0].pixels[0]: want a number, got null"),
        ([{"pixels": 5}], "instances[0].pixels: want 64 numbers, got 1"),
        ([{"pixels": [1e39] * 64}], "instances[0].pixels[0]: want a finite number that float32 can hold, got 1e+39"),
        ([[1.0] * 65], "instances[0]: want 64 numbers, got 65"),
        ([{"p0": 1}], "instances[0].p1: missing"),
        ([{"pixel": [1.0] * 64}], "instances[0].pixels: missing"),
        (["x"], "instances[0]: want an object with 'pixels', or with the columns, got 'x'"),
        ([], "instances: want at least one row, got none"),
        ({"pixels": []}, "instances: want a list of rows, got an object"),
        ("rows", "instances: want a list of rows, got 'rows'"),
    ],
)
def test_a_wrong_field_is_named(digits: Any, instances: Any, message: str) -> None:
    status, value = digits.call("POST", PREDICT, {"instances": instances})
    assert (status, value) == (400, {"error": message})


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"age": "old", "income": 1, "plan": "a"}, "instances[0].age: want a number, got 'old'"),
        ({"age": 1, "plan": "a"}, "instances[0].income: missing"),
        ({"age": 1, "income": 1, "plan": [1]}, "instances[0].plan: want a text, got [1]"),
        ({"age": 1, "income": 1, "plan": 1.5}, "instances[0].plan: want a text, got 1.5"),
        ({"age": {}, "income": 1, "plan": ""}, "instances[0].age: want a number, got an object"),
        (
            [1, 2, "a"],
            "instances[0]: want an object with 'numbers' and 'categories', or with the columns, got [1, 2, 'a']",
        ),
    ],
)
def test_a_wrong_cell_is_named(table: Any, instance: Any, message: str) -> None:
    status, value = table.call("POST", "/v1/models/prices:predict", {"instances": [instance]})
    assert (status, value) == (400, {"error": message})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"rows": []}', b"\xff\xfe", b'{"instances": [{"pixels": [NaN]}]}']
)
def test_a_body_that_is_no_request(digits: Any, body: bytes) -> None:
    status, value = digits.call("POST", PREDICT, body)
    assert status == 400
    assert "error" in value


def test_many_requests_on_one_connection(digits: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", digits.port, timeout=20)
    for seed in range(30):
        body = json.dumps({"instances": [{"pixels": row_of(seed)}] * (seed % 3 + 1)})
        connection.request("POST", PREDICT, body)
        response = connection.getresponse()
        assert len(json.loads(response.read())["predictions"]) == seed % 3 + 1
    connection.close()
