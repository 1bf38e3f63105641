"""Predictions for people: CSV bodies, uploaded pictures, texts that the graph itself reads."""

from __future__ import annotations

import http.client
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from millrace.core.errors import InputError
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.forms import kind_of, read_form

DIGITS, PRICES = "/v1/models/digits:predict", "/v1/models/prices:predict"


def call(live: Any, path: str, body: bytes, kind: str, accept: str = "*/*") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    connection.request("POST", path, body, {"Content-Type": kind, "Accept": accept})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers["Content-Type"], data


def picture(size: tuple[int, int] = (8, 8), kind: str = "PNG", mode: str = "L") -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0])).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def form_of(*files: tuple[str, bytes]) -> tuple[str, bytes]:
    parts = [b"--cut\r\nContent-Disposition: form-data; name=note\r\n\r\nhello\r\n"]
    for kind, data in files:
        head = f'--cut\r\nContent-Disposition: form-data; name="file"; filename="x"\r\nContent-Type: {kind}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return "multipart/form-data; boundary=cut", b"".join(parts) + b"--cut--\r\n"


# ---------------------------------------------------------------------- CSV


def test_a_csv_is_answered_as_json_and_as_csv(table: Any) -> None:
    body = "\ufeffid,plan,income,age\r\n7,a,2.5,1\r\n\r\n8,NA,5,\r\n".encode()
    status, kind, data = call(table, PRICES, body, "text/csv; charset=utf-8")
    assert (status, kind, json.loads(data)) == (
        200,
        "application/json",
        {"predictions": [{"value": 13.5}, {"value": 5.0}]},
    )
    status, kind, data = call(table, PRICES, body, "text/csv", "text/csv")
    assert (status, kind, data) == (200, "text/csv; charset=utf-8", b"value\r\n13.5\r\n5.0\r\n")


def test_json_rows_are_answered_as_csv_where_that_is_wanted(digits: Any) -> None:
    body = json.dumps({"instances": [[1.0] * 64] * 2}).encode()
    status, _, data = call(digits, DIGITS, body, "application/json", "text/csv")
    lines = data.decode().splitlines()
    assert status == 200
    assert lines[0] == "label," + ",".join(f"probability_{digit}" for digit in range(10))
    assert len(lines) == 3
    assert lines[1] == lines[2]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the CSV is empty: want a first line with the names of the columns"),
        (b"age,income,plan\r\n", "the CSV has a header but no rows"),
        (b"age,plan\r\n1,a\r\n", "the CSV lacks 1 of 3 columns that the model reads: income"),
        (b"age,age,income,plan\r\n1,1,1,a\r\n", "the CSV has the column 'age' twice"),
        (b"age,income,plan\r\n1,2,a\r\n1,2\r\n", "row 2 has 2 cells, the header has 3"),
        (b"age,income,plan\r\n1,2,a\r\n1,old,a\r\n", "row 2, column 'income': want a number, got 'old'"),
        (b"age,income,plan\r\n1,1e39,a\r\n", "row 1, column 'income': want a finite number that float32 can hold, got 1e+39"),
        (b"age,income,plan\r\n1,inf,a\r\n", "row 1, column 'income': want a number, got 'inf'"),
        (b'age,income,plan\r\n1,2,"a\r\n', "the CSV cannot be read in line 2: unexpected end of data"),
        (b"age,income,plan\r\n1,2,\xff\r\n", "the CSV is not UTF-8: "),
    ],
)  # fmt: skip
def test_a_wrong_cell_is_named_by_row_and_column(table: Any, body: bytes, message: str) -> None:
    status, _, data = call(table, PRICES, body, "text/csv")
    assert status == 400
    assert json.loads(data)["error"].startswith(message)


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_its_pixels_scaled_as_the_models(digits: Any, digits_bundle: Path, kind: str) -> None:
    body = picture(kind=kind)
    status, _, data = call(digits, DIGITS, body, f"image/{kind.lower()}")
    assert status == 200
    with Image.open(io.BytesIO(body)) as image:
        pixels = np.asarray(image, dtype=np.float64).reshape(1, 64) * 16 / 255  # the golden rows reach 16
    shares = open_session(digits_bundle / "model.onnx").run({"pixels": pixels.astype(np.float32)})["probabilities"][0]
    answer = json.loads(data)["predictions"][0]
    assert answer["label"] == int(shares.argmax())
    assert list(answer["probabilities"]) == [str(one) for one in np.argsort(-shares, kind="stable")]
    np.testing.assert_allclose(list(answer["probabilities"].values()), -np.sort(-shares), atol=1e-6)


def test_a_form_with_one_file_is_that_file(digits: Any, table: Any) -> None:
    kind, body = form_of(("image/png", picture()))
    status, _, data = call(digits, DIGITS, body, kind)
    assert (status, data) == (200, call(digits, DIGITS, picture(), "image/png")[2])
    kind, body = form_of(("text/csv", b"age,income,plan\n1,2,a"))
    assert json.loads(call(table, PRICES, body, kind)[2]) == {"predictions": [{"value": 13.0}]}


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "LA"])
def test_colours_become_what_the_model_reads(digits: Any, mode: str) -> None:
    assert call(digits, DIGITS, picture(mode=mode), "image/png")[0] == 200


def test_what_is_no_picture_of_the_right_size_is_refused(digits: Any, table: Any) -> None:
    bomb = picture((8, 8))
    bomb = bomb[:16] + (50_000).to_bytes(4, "big") * 2 + bomb[24:]  # the head says 50000 x 50000
    cases = [
        (digits, "image/png", picture((28, 14)), "want a picture of 8 x 8 pixels, got 28 x 14: resize it first"),
        (digits, "image/png", b"GIF89a", "the body is no PNG that can be read"),
        (digits, "image/jpeg", picture(), "the body is no JPEG that can be read"),
        (digits, "image/png", picture()[:60], "the body is no PNG that can be read"),
        (digits, "image/png", bomb, "the body is no PNG that can be read"),
        (digits, "image/gif", picture(), "want a picture as image/png or image/jpeg, got 'image/gif'"),
        (digits, *form_of(), "want a form with one file, got 0 files"),
        (digits, *form_of(("image/png", b""), ("image/png", b"")), "want a form with one file, got 2 files"),
        (digits, *form_of(("text/html", b"x")), "want a file of type text/csv, image/png, image/jpeg, got 'text/html'"),
        (digits, "multipart/form-data", b"x", "want a form with one file, got 0 files"),
        (table, "image/png", picture(), "the model reads 'numbers', 'categories': want no picture"),
    ]
    for live, kind, body, message in cases:
        status, _, data = call(live, DIGITS if live is digits else PRICES, body, kind)
        assert status == 400, (kind, data)
        assert json.loads(data)["error"].startswith(message)


SIGNATURE = Signature(
    task="classification", outputs=[], label="y", classes=["a", "b"],
    inputs=[TensorSpec(name="pixels", dtype="float32", shape=[-1, 64], semantic="image", image=[8, 8])],
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=4), st.sampled_from(["image/png", "image/jpeg", "form"]))
def test_damaged_pictures_are_the_clients_fault(at: int, noise: bytes, kind: str) -> None:
    body = bytearray(picture(kind="JPEG" if kind == "image/jpeg" else "PNG"))
    body[at : at + len(noise)] = noise
    content, data = form_of(("image/png", bytes(body))) if kind == "form" else (kind, bytes(body))
    try:
        tensors, _ = read_form(SIGNATURE, kind_of(content.encode()), content.encode(), data, {})
    except InputError:
        return
    assert tensors["pixels"].shape == (1, 64)


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=200))
def test_a_file_in_a_form_keeps_its_bytes(data: bytes) -> None:
    kind, body = form_of(("text/csv", b"x\n" + data.replace(b"--cut", b"")))
    model = Signature(
        task="regression", outputs=[], label="y",
        inputs=[TensorSpec(name="x", dtype="string", shape=[-1, 1], semantic="text", columns=["x"])],
    )  # fmt: skip

    def read(kind: str, body: bytes) -> object:
        try:
            return read_form(model, kind_of(kind.encode()), kind.encode(), body, {})[0]["x"].tolist()
        except InputError as error:
            return error.message

    assert read(kind, body) == read("text/csv", b"x\n" + data.replace(b"--cut", b""))


# ---------------------------------------------------------------------- inside the graph


def test_texts_go_into_the_graph_as_they_are(kit: Any, tmp_path: Path) -> None:
    """What the text means is decided inside the graph: no tokenizer stands in the server."""
    graph = helper.make_graph(
        [
            helper.make_node(
                "LabelEncoder", ["text"], ["score"], domain="ai.onnx.ml",
                keys_strings=["Grüße", "nO"], values_floats=[1.0, 2.0], default_float=0.0,
            ),
            helper.make_node("Reshape", ["score", "shape"], ["value"]),
        ],
        "texts",
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["rows"])],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows", 1])],
        [onnx.numpy_helper.from_array(np.array([-1, 1], np.int64), "shape")],
    )  # fmt: skip
    signature = Signature(
        task="regression", label="y",
        inputs=[TensorSpec(name="text", dtype="string", shape=[-1], semantic="text", columns=["text"])],
        outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1], semantic="value")],
    )  # fmt: skip
    session = open_session(kit.serialized(graph))
    body = "text\nGRÜSSE\nGrüße\nnO\n".encode()
    tensors, _ = read_form(signature, "text/csv", b"text/csv", body, {})
    assert session.run(tensors)["value"].tolist() == [[0.0], [1.0], [2.0]]
