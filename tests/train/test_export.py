"""The export: proven on real rows, the same bytes from anywhere, refused when it differs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from millrace.core.errors import CorruptError, StageError
from millrace.core.facts import ExportFacts
from millrace.formats.dataset import open_dataset
from millrace.formats.session import open_session
from millrace.formats.signature import Signature
from millrace.train.export import compare, export
from millrace.train.stage import train

HEAD = "import torch\nfrom torch import nn\n"
CNN = HEAD + (
    "def build(ctx):\n"
    "    c, h, w = ctx.image_shape\n"
    "    return nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),\n"
    "                         nn.Dropout(0.2), nn.Linear(8 * h * w, ctx.outputs))\n"
)
MLP = HEAD + (
    "def build(ctx):\n    return nn.Sequential(nn.Linear(ctx.features, 16), nn.ReLU(), nn.Linear(16, ctx.outputs))\n"
)


def trained(project: Any, code: str, model: str = "model.py:build", **section: Any) -> Any:
    (project.folder / "model.py").write_text(code)
    spec = project.spec(train={"model": model, "epochs": 1, **section})
    train(spec, project.context("train"))
    return spec


def test_a_cnn_with_the_raw_pixels_of_the_dataset(digits: Any) -> None:
    spec = trained(digits, CNN)
    facts = export(spec, digits.context("export"))
    assert set(facts) == set(ExportFacts.__struct_fields__)
    assert facts["rows"] == facts["answers_equal"] == 600
    assert facts["max_difference"] < 1e-5
    assert (facts["exporter"], facts["opset"]) == ("classic", 17)
    folder = digits.context("x").input("export.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "signature.json"]
    assert facts["size_bytes"] == (folder / "model.onnx").stat().st_size
    signature = msgspec.json.decode((folder / "signature.json").read_bytes(), type=Signature)
    assert signature.task == "classification"
    assert signature.classes == [str(digit) for digit in range(10)]
    assert signature.inputs[0].image == [8, 8]
    assert signature.inputs[0].columns[0] == "p00"
    session = open_session(folder / "model.onnx")
    reader = open_dataset(digits.context("x").input("data.dataset"))
    pixels = reader.arrays("test")["pixels"]
    assert pixels.max() == 16.0
    for rows in (1, 5, 600):
        found = session.run({"pixels": pixels[:rows]})["probabilities"]
        assert found.shape == (rows, 10)
        assert np.allclose(found.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("name", "output"), [("cancer", "probabilities"), ("diabetes", "value")])
def test_tables_through_torch(name: str, output: str, request: pytest.FixtureRequest) -> None:
    project = request.getfixturevalue(name)
    spec = trained(project, MLP, optimizer={"name": "adam", "lr": 0.01})
    facts = export(spec, project.context("export"))
    assert facts["answers_equal"] == facts["rows"]
    model = onnx.load(project.context("x").input("export.onnx") / "model.onnx")
    assert [value.name for value in model.graph.output] == [output]
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "rows" for value in model.graph.input)


def test_the_same_bytes_from_another_folder(cancer: Any, tmp_path: Path) -> None:
    spec = trained(cancer, MLP)
    export(spec, cancer.context("export"))
    there = tmp_path / "quite" / "another place"
    shutil.copytree(cancer.folder, there)
    shutil.rmtree(there / "work" / "scratch")
    other = type(cancer.context("x"))(there / "work", there, "export")
    export(spec, other)
    first, second = (context.input("export.onnx") for context in (cancer.context("x"), other))
    for name in ("model.onnx", "signature.json"):
        data = (first / name).read_bytes()
        assert data == (second / name).read_bytes()
        assert str(cancer.folder).encode() not in data
        assert b".py" not in data


BRANCH = HEAD + (
    "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(64, 10)\n"
    "    def forward(self, x):\n        x = x.flatten(1)\n"
    "        if not self.training and x.shape[0] != 2:\n            return self.layer(x) * 3\n"
    "        return self.layer(x)\n"
    "def build(ctx):\n    return Net()\n"
)


def test_a_graph_that_answers_differently_is_refused(digits: Any) -> None:
    spec = trained(digits, BRANCH)
    with pytest.raises(StageError, match=r"differs from torch on test rows: by 0\.\d+, where 0\.0001 is allowed"):
        export(spec, digits.context("export"))
    assert not digits.context("x").has_input("export.onnx")


NEWER = HEAD + (
    "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.seen = nn.Linear(64, 16)\n        self.layer = nn.Linear(16, 10)\n"
    "    def forward(self, x):\n        return self.layer(OPERATION(self.seen(x.flatten(1))))\n"
    "def build(ctx):\n    return Net()\n"
)


@pytest.mark.parametrize("operation", ["torch.sinc", "(lambda x: torch.fft.fft(x).abs())"])
def test_what_the_classic_exporter_lacks_goes_through_the_newer_one(
    operation: str, digits: Any, tmp_path: Path
) -> None:
    spec = trained(digits, NEWER.replace("OPERATION", operation))
    facts = export(spec, digits.context("export"))
    assert (facts["exporter"], facts["opset"]) == ("dynamo", 18)
    assert facts["rows"] == facts["answers_equal"] == 600
    assert facts["max_difference"] < 1e-5
    there = tmp_path / "quite" / "another place"
    shutil.copytree(digits.folder, there)
    shutil.rmtree(there / "work" / "scratch")
    other = type(digits.context("x"))(there / "work", there, "export")
    export(spec, other)
    folder = digits.context("x").input("export.onnx")
    data = (folder / "model.onnx").read_bytes()
    assert data == (other.input("export.onnx") / "model.onnx").read_bytes()
    assert str(digits.folder).encode() not in data
    assert b".py" not in data
    assert b"site-packages" not in data
    model = onnx.load_from_string(data)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert not model.functions
    pixels = open_dataset(digits.context("x").input("data.dataset")).arrays("test")["pixels"]
    session = open_session(folder / "model.onnx")
    for rows in (1, 2, 5, 600):
        assert session.run({"pixels": pixels[:rows]})["probabilities"].shape == (rows, 10)


UNKNOWN = HEAD + (
    "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(64, 10)\n"
    "    def forward(self, x):\n        x = self.layer(x.flatten(1))\n"
    "        return x + torch.special.bessel_j0(x)\n"
    "def build(ctx):\n    return Net()\n"
)


def test_an_operation_that_onnx_lacks_is_named(digits: Any) -> None:
    spec = trained(digits, UNKNOWN)
    with pytest.raises(StageError, match=r"cannot be exported to ONNX \(classic: .*bessel_j0"):
        export(spec, digits.context("export"))


def test_a_module_that_a_user_trained(digits: Any, diabetes: Any) -> None:
    code = HEAD + (
        "def train(ctx):\n"
        "    x, y = ctx.data('train')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(ctx.features, ctx.outputs))\n"
    )
    for project, model in ((digits, "graph"), (diabetes, "graph")):
        spec = trained(project, code, "model.py:train")
        facts = export(spec, project.context("export"))
        assert facts["answers_equal"] == facts["rows"], model


def test_another_module_than_the_trained_one_is_said(digits: Any) -> None:
    spec = trained(digits, CNN)
    (digits.folder / "model.py").write_text(
        CNN.replace("c, 8, 3", "c, 9, 3").replace("(8)", "(9)").replace("8 *", "9 *")
    )
    with pytest.raises(StageError, match="another module than the one that was trained"):
        export(spec, digits.context("export"))


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_damaged_inputs_are_named(name: str, digits: Any) -> None:
    spec = trained(digits, CNN)
    path = digits.context("x").input("train.model") / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CorruptError, match=name):
        export(spec, digits.context("export"))


@pytest.mark.parametrize("name", ["model.onnx", "expected.npz"])
def test_damaged_graphs_are_named(name: str, cancer: Any) -> None:
    spec = cancer.spec(train={"model": "linear"})
    train(spec, cancer.context("train"))
    path = cancer.context("x").input("train.model") / name
    path.write_bytes(b"")
    with pytest.raises(CorruptError):
        export(spec, cancer.context("export"))


def test_a_small_difference_passes_and_a_larger_one_does_not(cancer: Any) -> None:
    train(cancer.spec(train={"model": "linear"}), cancer.context("train"))
    folder = cancer.context("x").input("train.model")
    tensors = open_dataset(cancer.context("x").input("data.dataset")).arrays("test")
    with np.load(folder / "expected.npz") as stored:
        expected = stored["expected"]
    graph = (folder / "model.onnx").read_bytes()
    assert compare(graph, tensors, expected + np.float32(5e-5)).is_good
    moved = compare(graph, tensors, expected + np.float32(2e-4))
    assert not moved.is_good
    assert moved.answers_equal == moved.rows
    swapped = compare(graph, tensors, expected[:, ::-1])
    assert swapped.answers_equal < swapped.rows / 2
    assert not compare(graph, tensors, np.full_like(expected, np.nan)).is_good
