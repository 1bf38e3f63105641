"""The step on a real dataset folder, and the same for somebody else's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import polars as pl
import pytest

from millrace.compress import COMPRESS
from millrace.compress.foreign import class_indices, compress_model
from millrace.compress.stage import compress
from millrace.core.errors import InputError, StageError
from millrace.core.extras import load, missing_modules
from millrace.core.facts import CompressFacts
from millrace.core.ids import digest_bytes
from millrace.core.spec import Compress, Evaluate, Spec
from millrace.data.write import write_manifest, write_parts
from millrace.formats.dataset import ColumnSchema, Manifest, tensors
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec

PIXELS = [f"p{index:02d}" for index in range(64)]


@pytest.fixture(scope="module")
def inputs(digits: Any, cnn: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    dataset, exported = folder / "dataset", folder / "onnx"
    bounds = {"train": (0, 897), "validation": (897, 1197), "test": (1197, 1797)}
    parts = {}
    for name, (start, stop) in bounds.items():
        frame = pl.DataFrame(digits.pixels[start:stop], schema=PIXELS, orient="row")
        labels = pl.Series("digit", [str(label) for label in digits.labels[start:stop]])
        parts[name] = write_parts(dataset, name, frame.with_columns(labels))
    manifest = Manifest(
        columns=[ColumnSchema(name=name, type="image", role="feature") for name in PIXELS]
        + [ColumnSchema(name="digit", type="category", role="label")],
        task="classification",
        label="digit",
        classes=[str(digit) for digit in range(10)],
        label_type="integer",
        image=[8, 8],
        image_columns=PIXELS,
        splits=parts,
        rows={name: stop - start for name, (start, stop) in bounds.items()},
    )
    write_manifest(dataset, manifest)
    exported.mkdir()
    (exported / "model.onnx").write_bytes(cnn)
    output = TensorSpec(name="probabilities", dtype="float32", shape=[-1, 10], semantic="probabilities")
    signature = Signature(
        task="classification", inputs=tensors(manifest), outputs=[output], label="digit", classes=manifest.classes
    )
    (exported / "signature.json").write_bytes(msgspec.json.encode(signature))
    return {"data.dataset": dataset, "export.onnx": exported}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest_bytes(path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def ran(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, context_type: Any) -> tuple[Any, Any]:
    ctx = context_type(inputs, tmp_path_factory.mktemp("scratch"))
    return compress(Spec(), ctx), ctx


def test_the_step_reports_facts_that_decode(ran: tuple[Any, Any]) -> None:
    facts = msgspec.convert(ran[0], CompressFacts)
    assert facts.chosen in {row.name for row in facts.variants}
    assert facts.rows == 600
    assert "certifying" in ran[1].said


def test_the_variants_tree_holds_certified_files_and_every_guarantee(ran: tuple[Any, Any], digits: Any) -> None:
    folder = ran[1].outputs["variants"]
    guarantees = json.loads((folder / "guarantees.json").read_bytes())
    files = {path.stem for path in folder.glob("*.onnx")}
    assert files == {name for name, entry in guarantees.items() if entry["status"] == "certified"}
    static = guarantees["int8-static"]
    assert (static["weights"], static["acts"], static["reduce_range"], static["needs_vnni"]) == (
        "int8", "uint8", True, False,
    )  # fmt: skip
    assert static["file"] == "int8-static.onnx"
    assert static["explanation"]
    answers = open_session(folder / static["file"]).run(digits.test)["probabilities"].argmax(axis=1)
    assert np.mean(answers == digits.test_labels) == pytest.approx(static["score"])


def test_times_are_in_the_measurements_only(ran: tuple[Any, Any]) -> None:
    assert "p50_s" not in (ran[1].outputs["variants"] / "guarantees.json").read_text()
    measured = json.loads((ran[1].outputs["measurements"] / "measurements.json").read_bytes())
    assert measured["variants"][0]["latency"][0]["p50_s"] > 0
    assert measured["chosen"] == ran[0]["chosen"]


def test_the_variants_tree_is_the_same_again(
    ran: tuple[Any, Any], inputs: dict[str, Path], tmp_path: Path, context_type: Any
) -> None:
    again = context_type(inputs, tmp_path)
    compress(Spec(evaluate=Evaluate(metrics=["accuracy"])), again)
    assert digests(again.outputs["variants"]) == digests(ran[1].outputs["variants"])


def test_the_descriptor_names_what_exists() -> None:
    assert load(COMPRESS.implementation) is compress
    assert missing_modules(COMPRESS.extras) == []
    assert COMPRESS.timed
    assert {section.partition(".")[0] for section in COMPRESS.sections} <= set(Spec.__struct_fields__)


# --------------------------------------------------------------------------- a foreign model


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    return path


def test_a_foreign_classifier(tmp_path: Path, mlp: bytes, digits: Any) -> None:
    rows = digits.part(897, 1797)
    facts, folder = compress_model(write(tmp_path, mlp), rows, digits.labels[897:], folder=tmp_path / "out")
    assert facts.rows == 900 - 180
    assert facts.variants[0].name == "fp32"
    assert {path.name for path in folder.iterdir()} >= {"guarantees.json", "measurements.json"}
    assert any(row.guarantee and row.guarantee.status == "certified" for row in facts.variants)


def test_foreign_labels_may_be_words(tmp_path: Path, mlp: bytes, digits: Any) -> None:
    words = np.array([f"digit-{label}" for label in digits.labels[897:]])
    options = Compress(variants=["int8-weights"])
    numbers = compress_model(write(tmp_path, mlp), digits.part(897, 1797), digits.labels[897:], options)[0]
    named = compress_model(write(tmp_path, mlp), digits.part(897, 1797), words, options)[0]
    assert named.variants[1].guarantee == numbers.variants[1].guarantee


def test_a_foreign_regressor(tmp_path: Path, regressor: bytes, digits: Any) -> None:
    facts, _ = compress_model(
        write(tmp_path, regressor), digits.part(897, 1797), digits.labels[897:].astype(float),
        Compress(variants=["int8-weights"]), folder=tmp_path / "out",
    )  # fmt: skip
    assert facts.variants[1].guarantee is not None
    assert facts.variants[1].guarantee.metric == "mae"


def test_foreign_rows_that_do_not_fit_are_named(tmp_path: Path, mlp: bytes, digits: Any) -> None:
    path = write(tmp_path, mlp)
    rows = digits.part(0, 100)
    with pytest.raises(InputError, match=r"reads pixels; the rows have x"):
        compress_model(path, {"x": rows["pixels"]}, digits.labels[:100])
    with pytest.raises(InputError, match="unequal numbers of rows"):
        compress_model(path, rows, digits.labels[:99])
    with pytest.raises(InputError, match="at least 10"):
        compress_model(path, digits.part(0, 5), digits.labels[:5])
    with pytest.raises(InputError, match="scores 10 classes, the labels have 2"):
        compress_model(path, rows, np.array(["a", "b"] * 50))
    with pytest.raises(StageError, match="pixels"):
        compress_model(path, {"pixels": rows["pixels"][:, :60]}, digits.labels[:100])


def test_a_model_without_numbers_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0)
    graph = onnx.helper.make_graph(
        [node], "labels",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 3])],
        [onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["rows"])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(InputError, match="no output of decimal numbers"):
        compress_model(write(tmp_path, model.SerializeToString()), {"x": np.ones((20, 3), np.float32)}, np.zeros(20))


def test_class_numbers_are_taken_as_they_are() -> None:
    assert class_indices(np.array([0, 2, 2]), 5).tolist() == [0, 2, 2]
    assert class_indices(np.array([1.0, 0.0]), 2).tolist() == [1, 0]
    assert class_indices(np.array(["b", "a", "c"], dtype=object), 3).tolist() == [1, 0, 2]
