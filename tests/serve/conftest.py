"""A small real model in a real bundle, and a live server for the whole session."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millrace.formats.bundle import BundleContents, write_bundle
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.service import HttpLimits
from millrace.serve.telemetry import TelemetryFrame
from millrace.stats.drift import build_reference

PIXELS, CLASSES = 64, 10


def dense_graph(pixels: int = PIXELS, classes: int = CLASSES) -> bytes:
    """Gemm and Softmax over raw pixels."""
    rng = np.random.default_rng(7)
    weights = numpy_helper.from_array(rng.normal(0, 0.02, (pixels, classes)).astype(np.float32), "w")
    bias = numpy_helper.from_array(rng.normal(0, 0.1, classes).astype(np.float32), "b")
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["pixels", "w", "b"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", pixels])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", classes])],
        [weights, bias],
    )
    return serialized(graph)


def table_graph() -> bytes:
    """2 numbers and 1 category to a value: sum of the numbers (missing: 0), plus 10 where the category is 'a'."""
    constants = [
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(np.array([10.0], np.float32), "ten"),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("IsNaN", ["numbers"], ["missing"]),
            helper.make_node("Where", ["missing", "zero", "numbers"], ["filled"]),
            helper.make_node("ReduceSum", ["filled", "axis"], ["total"], keepdims=1),
            helper.make_node(
                "LabelEncoder", ["categories"], ["score"], domain="ai.onnx.ml",
                keys_strings=["a"], values_floats=[10.0], default_float=0.0,
            ),
            helper.make_node("Add", ["total", "score"], ["value"]),
        ],
        "table",
        [
            helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["rows", 2]),
            helper.make_tensor_value_info("categories", TensorProto.STRING, ["rows", 1]),
        ],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["rows", 1])],
        constants,
    )  # fmt: skip
    return serialized(graph)


def serialized(graph: onnx.GraphProto) -> bytes:
    """A model's bytes in a version that every onnxruntime of ours reads."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


DIGITS = Signature(
    task="classification",
    inputs=[
        TensorSpec(
            name="pixels", dtype="float32", shape=[-1, PIXELS], semantic="image",
            columns=[f"p{i}" for i in range(PIXELS)], image=[8, 8, 1],
        )
    ],
    outputs=[TensorSpec(name="probabilities", dtype="float32", shape=[-1, CLASSES], semantic="probabilities")],
    label="digit",
    classes=[str(digit) for digit in range(CLASSES)],
    label_type="integer",
)  # fmt: skip
TABLE = Signature(
    task="regression",
    inputs=[
        TensorSpec(name="numbers", dtype="float32", shape=[-1, 2], semantic="number", columns=["age", "income"]),
        TensorSpec(name="categories", dtype="string", shape=[-1, 1], semantic="category", columns=["plan"]),
    ],
    outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1], semantic="value")],
    label="price",
    label_type="number",
)


def make_pixels(rows: int, seed: int = 0) -> np.ndarray:
    """Raw values 0 to 16, float32 [rows, 64]."""
    return np.random.default_rng(seed).integers(0, 17, (rows, PIXELS)).astype(np.float32)


def make_table(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers with some missing, and a category."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(40, 10, (rows, 2)).astype(np.float32)
    numbers[rng.random((rows, 2)) < 0.1] = np.nan
    return {"numbers": numbers, "categories": rng.choice(np.array(["a", "b", ""], dtype=object), (rows, 1))}


def make_bundle(
    folder: Path, graph: bytes, signature: Signature, tensors: dict[str, np.ndarray], **variants: bytes
) -> str:
    """Write a bundle with real golden answers and a real reference; its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, data in {"base": graph, **variants}.items():
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(data)
    outputs = open_session(graph).run(tensors)
    contents = BundleContents(
        model=paths.pop("base"), variants=paths, signature=signature, metrics=[], lineage={}, guarantees={},
        reference=build_reference(tensors, outputs, signature),
        golden={
            "inputs": {name: values[:16] for name, values in tensors.items()},
            "outputs": {name: values[:16] for name, values in outputs.items()},
        },
    )  # fmt: skip
    return write_bundle(folder / "bundle", contents)


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """This module: tests cannot import a conftest."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_bundle(folder, dense_graph(), DIGITS, {"pixels": make_pixels(300)})
    return folder / "bundle"


@pytest.fixture(scope="session")
def table_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    make_bundle(folder, table_graph(), TABLE, make_table(300))
    return folder / "bundle"


def child_config(bundle: Path, name: str = "digits", **server: Any) -> ChildConfig:
    """A configuration for a free port."""
    settings = {"name": name, "version": "3", "port": 0, "telemetry_interval_s": 0.1, **server}
    return ChildConfig(bundle_dir=str(bundle), server=msgspec.convert(settings, ServerConfig))


class Live:
    """A running server and what it has told its parent."""

    folder: Path

    def __init__(self, config: ChildConfig) -> None:
        self.frames: list[TelemetryFrame] = []
        self.process = ServerProcess(config, self.frames.append)
        self.port = self.process.wait_ready()

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and decoded JSON (or text) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("Content-Type") == "application/json"
        return response.status, json.loads(data) if is_json else data.decode()


@pytest.fixture(scope="session")
def digits(digits_bundle: Path) -> Iterator[Live]:
    """The digits server: short time-outs, small bodies."""
    limits = HttpLimits(max_body_bytes=1 << 20, head_timeout_s=1.0, body_timeout_s=1.0)
    live = Live(child_config(digits_bundle, limits=limits))
    yield live
    assert live.process.exit_code is None, "the server did not survive the tests"
    assert live.process.stop() == 0


@pytest.fixture(scope="session")
def table(table_bundle: Path) -> Iterator[Live]:
    """The table server."""
    live = Live(child_config(table_bundle, name="prices"))
    yield live
    assert live.process.stop() == 0


@pytest.fixture(scope="session")
def observed(table_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The table server with all that is off elsewhere: cache, access log, traces, capture. `folder` has its files."""
    folder = tmp_path_factory.mktemp("observed")
    live = Live(
        child_config(
            table_bundle, name="prices", access_log=str(folder / "access.jsonl"), captures=str(folder / "captured"),
            cache={"entries": 100}, capture={"share": 1.0, "mask": ["age"]},
        )
    )  # fmt: skip
    live.folder = folder
    yield live
    assert live.process.stop() == 0
