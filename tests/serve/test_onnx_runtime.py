"""The onnxruntime runtime: conformance, trust, self-test, instruction sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millrace.core.errors import CapacityError, CorruptError, NotFoundError, UntrustedError
from millrace.formats.bundle import BundleContents, open_bundle, write_bundle
from millrace.serve.runtimes import onnx as runtime_module
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.testing.runtime import RuntimeConformance


class TestOnnxDigits(RuntimeConformance):
    @pytest.fixture
    def make_runtime(self, digits_bundle: Path) -> Callable[[], OnnxRuntime]:
        return lambda: OnnxRuntime(digits_bundle)

    @pytest.fixture
    def rows(self, kit: Any) -> Mapping[str, np.ndarray]:
        return {"pixels": kit.make_pixels(8, seed=3)}


class TestOnnxTable(RuntimeConformance):
    @pytest.fixture
    def make_runtime(self, table_bundle: Path) -> Callable[[], OnnxRuntime]:
        return lambda: OnnxRuntime(table_bundle)

    @pytest.fixture
    def rows(self, kit: Any) -> Mapping[str, np.ndarray]:
        return kit.make_table(8, seed=3)


class OneKey:
    """Trusts one signature."""

    def verify(self, digest: str, signature: bytes) -> str:
        if signature != b"signed " + digest.encode():
            raise UntrustedError("no trusted key made this signature")
        return "key"


def test_the_signature_is_checked_before_anything_is_loaded(digits_bundle: Path) -> None:
    digest = open_bundle(digits_bundle).digest
    trusted = OnnxRuntime(digits_bundle, signature=b"signed " + digest.encode(), verifier=OneKey())
    trusted.load()
    assert trusted.is_ready
    for signature in (None, b"signed by somebody else"):
        runtime = OnnxRuntime(digits_bundle, signature=signature, verifier=OneKey())
        with pytest.raises(UntrustedError):
            runtime.load()
        assert not runtime.is_ready


def test_a_flipped_bit_is_refused(digits_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(digits_bundle, folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.onnx"):
        OnnxRuntime(folder).load()


def other_weights(graph: bytes, scale: float) -> bytes:
    """A graph with its weights multiplied."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(scale), tensor.name))
    return model.SerializeToString()


def rebuilt(folder: Path, base: Path, model: bytes, variants: dict[str, bytes], **guarantees: dict) -> Path:
    """A valid bundle with other graphs under the base's golden answers."""
    bundle = open_bundle(base)
    folder.mkdir()
    paths = {}
    for name, data in {"base": model, **variants}.items():
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(data)
    golden = bundle.golden
    contents = BundleContents(
        model=paths.pop("base"), variants=paths, signature=bundle.signature, metrics=[], lineage={},
        guarantees=guarantees, reference=bundle.reference,
        golden={"inputs": golden.inputs, "outputs": golden.outputs},
    )  # fmt: skip
    write_bundle(folder / "bundle", contents)
    return folder / "bundle"


def test_the_self_test_compares_the_golden_answers(kit: Any, digits_bundle: Path, tmp_path: Path) -> None:
    good = kit.dense_graph()
    flipped, close, nan = (other_weights(good, scale) for scale in (-1.0, 1.0001, float("nan")))
    with pytest.raises(CorruptError, match="self-test of fp32 failed"):
        OnnxRuntime(rebuilt(tmp_path / "a", digits_bundle, other_weights(good, 1.05), {})).load()
    folder = rebuilt(tmp_path / "b", digits_bundle, good, {"close": close, "flipped": flipped, "nan": nan})
    OnnxRuntime(folder, "close").load()
    with pytest.raises(CorruptError, match="other answers than the base"):
        OnnxRuntime(folder, "flipped").load()
    with pytest.raises(CorruptError, match="not finite"):
        OnnxRuntime(folder, "nan").load()
    with pytest.raises(NotFoundError, match="no variant 'int4'"):
        OnnxRuntime(folder, "int4").load()


def test_a_variant_that_needs_vnni_is_refused_without_it(
    kit: Any, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarantees, graph = {"fast": {"needs_vnni": True}}, kit.dense_graph()
    folder = rebuilt(tmp_path / "a", digits_bundle, graph, {"fast": graph}, **guarantees)
    monkeypatch.setattr(runtime_module, "has_vnni", lambda: False)
    with pytest.raises(CapacityError, match="VNNI"):
        OnnxRuntime(folder, "fast").load()
    OnnxRuntime(folder, "fp32").load()
    monkeypatch.setattr(runtime_module, "has_vnni", lambda: True)
    OnnxRuntime(folder, "fast").load()


def dynamic_graph(kit: Any) -> bytes:
    """A dynamically quantised product: its scale is that of the whole call."""
    weights = np.random.default_rng(0).integers(-100, 100, (kit.PIXELS, kit.CLASSES)).astype(np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["pixels"], ["q", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
            helper.make_node("Cast", ["product"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "scale"], ["scaled"]),
            helper.make_node("Mul", ["scaled", "small"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "dynamic",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", kit.PIXELS])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", kit.CLASSES])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32(1e-3), "small")],
    )
    return kit.serialized(graph)


def test_dynamic_quantisation_mixes_rows(kit: Any, digits_bundle: Path, tmp_path: Path) -> None:
    """Then requests of different people must not share a call: answers would depend on the company."""
    kit.make_bundle(tmp_path / "d", dynamic_graph(kit), kit.DIGITS, {"pixels": kit.make_pixels(300)})
    runtime = OnnxRuntime(tmp_path / "d" / "bundle")
    runtime.load()
    assert runtime.mixes_rows
    row = kit.make_pixels(1, seed=1)
    alone = runtime.infer({"pixels": row})["probabilities"]
    company = runtime.infer({"pixels": np.concatenate([row, np.full((1, kit.PIXELS), 5000, np.float32)])})[
        "probabilities"
    ]
    assert not np.allclose(alone, company[:1], atol=1e-3)
    plain = OnnxRuntime(digits_bundle)
    plain.load()
    assert not plain.mixes_rows


def test_a_bundle_without_golden_rows_loads(digits_bundle: Path, tmp_path: Path) -> None:
    contents = BundleContents(
        model=digits_bundle / "model.onnx", variants={}, signature=open_bundle(digits_bundle).signature, metrics=[],
        lineage={}, guarantees={}, reference={}, golden={"inputs": {}, "outputs": {}},
    )  # fmt: skip
    write_bundle(tmp_path / "b", contents)
    runtime = OnnxRuntime(tmp_path / "b")
    runtime.load()
    assert runtime.is_ready
    assert runtime.sample() == {}
    assert msgspec.json.decode((tmp_path / "b" / "reference.json").read_bytes()) == {}
