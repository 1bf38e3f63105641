"""The stage: a real child, real sockets, two windows of telemetry."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.core.errors import CorruptError, NotFoundError
from millrace.core.facts import ServeFacts
from millrace.core.ids import digest_bytes
from millrace.core.spec import Register, Serve, Spec
from millrace.formats.dataset import ColumnSchema, Manifest, PartEntry
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.probe import agrees, chosen_variant, damage, probe
from millrace.stats.drift import judge
from millrace.stats.histogram import Histograms


class StageContext:
    """What the probe may touch."""

    def __init__(self, scratch: Path, inputs: dict[str, Path]) -> None:
        self.scratch = scratch
        self.cancelled = False
        self.outputs: dict[str, Path] = {}
        self._inputs = inputs

    def input(self, name: str) -> Path:
        return self._inputs[name]

    def has_input(self, name: str) -> bool:
        return name in self._inputs

    def output(self, name: str, path: Path) -> None:
        self.outputs[name] = path

    def progress(self, done: float, total: float, text: str = "") -> None:
        assert done <= total


def write_dataset(folder: Path, columns: dict[str, list[Any]], manifest: Manifest) -> Path:
    (folder / "test").mkdir(parents=True)
    path = folder / "test" / "part-00000.parquet"
    pq.write_table(pa.table(columns), path)
    rows = len(next(iter(columns.values())))
    data = path.read_bytes()
    part = PartEntry(path="test/part-00000.parquet", rows=rows, digest=digest_bytes(data), size_bytes=len(data))
    manifest = msgspec.structs.replace(manifest, splits={"test": [part]}, rows={"test": rows})
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return folder


@pytest.fixture(scope="module")
def digits_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 17, (400, 64)).astype(np.float32)
    names = [f"p{i}" for i in range(64)]
    columns: dict[str, list[Any]] = {name: pixels[:, i].tolist() for i, name in enumerate(names)}
    columns["digit"] = [str(i % 10) for i in range(400)]
    schema = [ColumnSchema(name=name, type="number", role="feature", mean=8.0, sd=5.0) for name in names]
    manifest = Manifest(
        columns=[*schema, ColumnSchema(name="digit", type="category", role="label")], task="classification",
        label="digit", classes=[str(i) for i in range(10)], image=[8, 8, 1], image_columns=names,
    )  # fmt: skip
    return write_dataset(tmp_path_factory.mktemp("dataset") / "d", columns, manifest)


def context(tmp_path: Path, dataset: Path, bundle: Path, chosen: str = "fp32") -> StageContext:
    measurements = tmp_path / "measurements"
    measurements.mkdir()
    (measurements / "measurements.json").write_bytes(msgspec.json.encode({"chosen": chosen}))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    inputs = {"data.dataset": dataset, "register.bundle": bundle, "compress.measurements": measurements}
    return StageContext(scratch, inputs)


def test_images_are_answered_as_offline_and_inverted_ones_alert(
    tmp_path: Path, digits_dataset: Path, digits_bundle: Path
) -> None:
    ctx = context(tmp_path, digits_dataset, digits_bundle)
    spec = Spec(register=Register(model="digits"))
    facts = msgspec.convert(probe(spec, ctx), ServeFacts)  # type: ignore[arg-type]
    assert (facts.requests, facts.answered, facts.wrong, facts.variant) == (400, 400, 0, "fp32")
    assert 0 < facts.p50_s <= facts.p99_s < 5
    assert facts.ready_s > 0
    written = msgspec.json.decode((ctx.outputs["telemetry"] / "telemetry.json").read_bytes())["windows"]
    assert [(window["label"], window["rows"]) for window in written] == [("clean", 400), ("inverted", 400)]
    reference = msgspec.json.decode((digits_bundle / "reference.json").read_bytes())
    clean, inverted = (Histograms.from_dict(window["histograms"]) for window in written)
    assert clean.rows == inverted.rows == 400
    assert not judge(reference, clean).is_alert
    means = [[one.moments(i)[0] for i in range(64)] for one in (clean, inverted)]
    np.testing.assert_allclose(np.array(means[1]), 16 - np.array(means[0]), atol=1e-3)


def test_tables_are_shifted_by_one_deviation(tmp_path: Path, table_bundle: Path) -> None:
    rng = np.random.default_rng(2)
    columns = {
        "age": [None if i % 9 == 0 else float(v) for i, v in enumerate(rng.normal(40, 10, 200).astype(np.float32))],
        "income": rng.normal(40, 10, 200).astype(np.float32).tolist(),
        "plan": [None if i % 7 == 0 else "ab"[i % 2] for i in range(200)],
        "price": [1.0] * 200,
    }
    manifest = Manifest(
        columns=[
            ColumnSchema(name="age", type="number", role="feature", sd=10.0),
            ColumnSchema(name="income", type="number", role="feature", sd=10.0),
            ColumnSchema(name="plan", type="category", role="feature", categories=["a", "b"]),
            ColumnSchema(name="price", type="number", role="label"),
        ],
        task="regression", label="price",
    )  # fmt: skip
    dataset = write_dataset(tmp_path / "d", columns, manifest)
    ctx = context(tmp_path, dataset, table_bundle)
    facts = msgspec.convert(probe(Spec(project="prices"), ctx), ServeFacts)  # type: ignore[arg-type]
    assert (facts.requests, facts.answered, facts.wrong) == (200, 200, 0)
    written = msgspec.json.decode((ctx.outputs["telemetry"] / "telemetry.json").read_bytes())["windows"]
    assert [window["label"] for window in written] == ["clean", "shifted"]
    reference = msgspec.json.decode((table_bundle / "reference.json").read_bytes())
    shifted = Histograms.from_dict(written[1]["histograms"])
    assert judge(reference, shifted).is_alert
    clean = Histograms.from_dict(written[0]["histograms"])
    assert shifted.moments(0)[0] - clean.moments(0)[0] == pytest.approx(10.0, abs=1e-3)


def test_a_bundle_that_was_altered_is_not_served(tmp_path: Path, digits_dataset: Path, digits_bundle: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(digits_bundle, altered)
    (altered / "golden.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"golden\.json"):
        probe(Spec(), context(tmp_path, digits_dataset, altered))  # type: ignore[arg-type]


def test_the_variant_is_the_specs_or_the_chosen_one(tmp_path: Path, digits_dataset: Path, digits_bundle: Path) -> None:
    from_measurements = context(tmp_path, digits_dataset, digits_bundle, chosen="absent")

    class Names:
        variants = ["fp32", "int8"]

        def model_path(self, name: str) -> Path:
            raise NotFoundError(name)

    assert chosen_variant(Spec(), from_measurements, Names()) == "fp32"  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        chosen_variant(Spec(serve=Serve(variant="int4")), from_measurements, Names())  # type: ignore[arg-type]


def test_answers_are_compared_by_label_and_shares() -> None:
    right = {"label": "a", "probabilities": {"a": 0.7, "b": 0.3}}
    assert agrees(right, right)
    assert not agrees({**right, "label": "b"}, right)
    assert not agrees({"label": "a", "probabilities": {"a": 0.6, "b": 0.4}}, right)


def test_damage_keeps_the_range_of_an_image() -> None:
    pixels = TensorSpec(name="pixels", dtype="float32", shape=[-1, 2], semantic="image")
    signature = Signature(task="classification", inputs=[pixels], outputs=[], label="y")
    manifest = Manifest(columns=[], task="classification", label="y")
    label, damaged = damage(signature, manifest, {"pixels": np.array([[0.0, 16.0], [4.0, 4.0]], np.float32)})
    assert label == "inverted"
    assert damaged["pixels"].tolist() == [[16.0, 0.0], [12.0, 12.0]]
