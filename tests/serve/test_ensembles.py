"""Ensembles and cascades answer what their parts, composed by hand, answer; what does not fit is named at the start."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from millrace.core.errors import InputError
from millrace.formats.session import open_session
from millrace.serve.child import ChildConfig, ServedModel
from millrace.serve.ensembles import CascadeRuntime, EnsembleRuntime, Part, open_ensemble, read_document
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.server import ServerConfig

SCALE = '''
class Brighter:
    """A transform: pixels of another camera."""

    inputs = {"raw": ("float32", [-1, 64])}
    outputs = {"pixels": ("float32", [-1, 64])}

    def predict(self, batch):
        return {"pixels": batch["raw"] * 16}
'''
GRAPH = {
    "name": "camera",
    "inputs": {"raw": ["float32", [-1, 64]]},
    "outputs": {"probabilities": "digits.probabilities", "pixels": "scale.pixels"},
    "steps": {
        "digits": {"model": "digits@1", "inputs": {"pixels": "scale.pixels"}},
        "scale": {"model": "scale.py:Brighter", "inputs": {"raw": "raw"}},
    },
}


def changed(document: Mapping[str, Any], **steps: Any) -> dict[str, Any]:
    """The graph with some steps (or what is no step) replaced."""
    result = {**document, "steps": {**document["steps"]}}
    for name, value in steps.items():
        (result if name in ("inputs", "outputs") else result["steps"])[name] = value
    return result


def other_digits(kit: ModuleType) -> bytes:
    """Another model of the same rows, that is surer of itself."""
    import onnx

    model = onnx.load_from_string(kit.dense_graph())
    for constant in model.graph.initializer:
        values = onnx.numpy_helper.to_array(constant) * -3
        constant.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), constant.name))
    return model.SerializeToString()


@pytest.fixture(scope="module")
def large_bundle(kit: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    kit.make_bundle(folder, other_digits(kit), kit.DIGITS, {"pixels": kit.make_pixels(50)})
    return folder / "bundle"


def part(bundle: Path, max_batch: int = 64) -> Part:
    runtime = OnnxRuntime(bundle)
    runtime.load()
    return Part(runtime, runtime.bundle.signature, max_batch)


@pytest.fixture(scope="module")
def small(digits_bundle: Path) -> Part:
    return part(digits_bundle)


@pytest.fixture(scope="module")
def large(large_bundle: Path) -> Part:
    return part(large_bundle, max_batch=8)


# --------------------------------------------------------------------------- cascades


@pytest.mark.parametrize("below", [0.0, 0.2, 0.25, 1.0])
def test_each_row_of_a_cascade_is_answered_by_who_is_sure(
    kit: ModuleType, small: Part, large: Part, below: float
) -> None:
    document = {"name": "fast", "cascade": {"small": "small", "large": "large", "below": below}}
    cascade = open_ensemble(document, {"small": small, "large": large})
    assert isinstance(cascade, CascadeRuntime)
    pixels = {"pixels": kit.make_pixels(100, seed=3)}
    first, second = (open_session(data).run(pixels)["probabilities"] for data in (kit.dense_graph(), other_digits(kit)))
    unsure = first.max(axis=1) < below
    by_hand = np.where(unsure[:, None], second, first)
    got = cascade.infer(pixels)["probabilities"]
    assert np.abs(got - by_hand).max() < 1e-6
    if below in (0.2, 0.25):
        assert 0 < unsure.sum() < 100, "the test wants rows of both kinds"


def test_a_row_s_answer_does_not_depend_on_its_neighbours(kit: ModuleType, small: Part, large: Part) -> None:
    cascade = CascadeRuntime(small, large, 0.2)
    pixels = kit.make_pixels(30, seed=4)
    together = cascade.infer({"pixels": pixels})["probabilities"]
    alone = np.concatenate([cascade.infer({"pixels": row[None]})["probabilities"] for row in pixels])
    assert np.abs(together - alone).max() < 1e-6


def test_a_cascade_of_models_that_differ_is_refused(small: Part, table_bundle: Path) -> None:
    table = part(table_bundle)
    with pytest.raises(InputError, match=r"cascade\.small: want a classifier"):
        CascadeRuntime(table, small, 0.5)
    with pytest.raises(InputError, match="want the same classes"):
        CascadeRuntime(small, table, 0.5)


# --------------------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (changed(GRAPH, scale={"model": "scale", "inputs": {"raw": "digits.probabilities"}}),
         "in a circle: (digits → scale → digits|scale → digits → scale)"),
        (changed(GRAPH, scale={"model": "scale", "inputs": {"raw": "raws"}}), "there is no 'raws'"),
        (changed(GRAPH, digits={"model": "digits", "inputs": {"pixels": "scale.pixel"}}), "there is no 'scale.pixel'"),
        (changed(GRAPH, digits={"model": "digits", "inputs": {}}), r"steps.digits.inputs.pixels: missing"),
        (changed(GRAPH, digits={"model": "digits", "inputs": {"pixel": "raw", "pixels": "raw"}}), "no 'pixel'"),
        (changed(GRAPH, inputs={"raw": ["float64", [-1, 64]]}), "scale.inputs.raw: want float32, got float64 from 'raw'"),
        (changed(GRAPH, inputs={"raw": ["float32", [-1, 63]]}), r"want shape \[-1, 64\], got \[-1, 63\] from 'raw'"),
        (changed(GRAPH, inputs={"raw": ["float23", [-1, 64]]}), "got 'float23'"),
        (changed(GRAPH, outputs={"probabilities": "digits.value"}), "outputs.probabilities: there is no 'digits.value'"),
        (changed(GRAPH, **{"a.b": {"model": "digits"}}), "may not be called 'a.b'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(document: dict[str, Any], text: str, small: Part) -> None:
    scale = Part(small.runtime, _scale_signature(), 64)
    parts = {step["model"]: (scale if name == "scale" else small) for name, step in document["steps"].items()}
    with pytest.raises(InputError, match=text):
        open_ensemble(document, parts)


def _scale_signature() -> Any:
    from millrace.serve.runtimes.declared import declared

    said = {"inputs": {"raw": ("float32", [-1, 64])}, "outputs": {"pixels": ("float32", [-1, 64])}}
    return declared(said, "scale").signature


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "ensemble: Expected `object`"),
        ({"name": "x"}, "either steps or a cascade"),
        ({"name": "x", "steps": {"a": {"model": "m"}}}, "steps want inputs and outputs"),
        ({"name": "x", "stepps": {}}, "stepps"),
        ({"name": "x", "cascade": {"small": "a", "large": "b", "below": "high"}}, r"cascade\.below"),
        ({"name": "x", "steps": {"a": {"model": "m"}}, "cascade": {"small": "a", "large": "b", "below": 0.5}},
         "either steps or a cascade"),
    ],
)  # fmt: skip
def test_a_document_that_is_none_is_refused(given: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_document(given)


def test_the_examples_of_the_documentation() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/how-to/ensembles.md"
    blocks = re.findall(r"```yml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [len(read_document(yaml.safe_load(block)).models) for block in blocks] == [3, 2]


def test_a_step_runs_once_however_many_read_it(small: Part) -> None:
    calls: list[int] = []

    class Counted:
        """The real model, counted."""

        is_ready = True

        def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            calls.append(len(tensors["pixels"]))
            return small.runtime.infer(tensors)

    counted: Any = Counted()
    document = {
        "name": "twice",
        "inputs": {"pixels": ["float32", [-1, 64]]},
        "outputs": {"probabilities": "one.probabilities", "again": "one.probabilities"},
        "steps": {"one": {"model": "m", "inputs": {"pixels": "pixels"}}},
    }
    runtime = open_ensemble(document, {"m": Part(counted, small.signature, 4)})
    assert isinstance(runtime, EnsembleRuntime)
    outputs = runtime.infer({"pixels": np.ones((10, 64), np.float32)})
    assert calls == [4, 4, 2], "in slices of what the part takes at once"
    assert (outputs["probabilities"] == outputs["again"]).all()
    assert runtime.signature.classes == small.signature.classes


# --------------------------------------------------------------------------- served


@pytest.fixture(scope="module")
def live(
    kit: ModuleType, digits_bundle: Path, large_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    script = tmp_path_factory.mktemp("camera") / "scale.py"
    script.write_text(SCALE)
    parts = {
        "digits@1": ServedModel(name="digits", path=str(digits_bundle)),
        "scale.py:Brighter": ServedModel(name="scale", source="code", path=str(script), attribute="Brighter"),
    }
    cascade = {"name": "fast", "cascade": {"small": "digits@1", "large": "digits@2", "below": 0.2}}
    both = {"digits@1": parts["digits@1"], "digits@2": ServedModel(name="digits", path=str(large_bundle))}
    models = [
        ServedModel(name="camera", source="ensemble", document=GRAPH, parts=parts),
        ServedModel(name="fast", source="ensemble", document=cascade, parts=both),
    ]
    preload = [model.name for model in models]
    server = kit.Live(
        ChildConfig(models=models, preload=preload, server=ServerConfig(name="", version="", port=0, tune_s=0))
    )  # fmt: skip
    yield server
    assert server.process.stop() == 0


def test_served_they_answer_as_by_hand(kit: ModuleType, live: Any) -> None:
    raw = kit.make_pixels(6, seed=9) / 16
    by_hand = open_session(kit.dense_graph()).run({"pixels": raw * 16})["probabilities"]
    status, body = live.call("POST", "/v1/models/camera:predict", {"instances": raw.tolist()})
    assert status == 200, body
    got = np.array([list(row["probabilities"].values()) for row in body["predictions"]])
    assert np.abs(got - by_hand).max() < 1e-6
    assert [row["label"] for row in body["predictions"]] == by_hand.argmax(axis=1).tolist()
    tensor = {"name": "raw", "datatype": "FP32", "shape": [6, 64], "data": raw.tolist()}
    status, body = live.call("POST", "/v2/models/camera/infer", {"inputs": [tensor]})
    assert {one["name"] for one in body["outputs"]} == {"probabilities", "pixels"}
    assert live.call("GET", "/v2/models/camera")[1]["platform"] == "ensemble"

    pixels = kit.make_pixels(40, seed=3)
    first, second = (
        open_session(data).run({"pixels": pixels})["probabilities"] for data in (kit.dense_graph(), other_digits(kit))
    )
    by_hand = np.where((first.max(axis=1) < 0.2)[:, None], second, first)
    status, body = live.call("POST", "/v1/models/fast:predict", {"instances": pixels.tolist()})
    got = np.array([list(row["probabilities"].values()) for row in body["predictions"]])
    assert np.abs(got - by_hand).max() < 1e-6
    status, body = live.call("POST", "/v1/models/fast:predict", {"instances": [[1]]})
    assert status == 400
