"""An ONNX file that was made elsewhere: register, export, predict, compress; rubbish is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typing_by_hand import run_millrace, write_table


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType

    table = load_breast_cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(table.data, table.target)
    converted = convert_sklearn(
        model, initial_types=[("x", FloatTensorType([None, 30]))], options={id(model): {"zipmap": False}}
    )
    (tmp_path / "model.onnx").write_bytes(converted.SerializeToString())
    lines = [",".join([*(name.replace(" ", "_") for name in table.feature_names), "target"])]
    lines += [
        ",".join(str(value) for value in [*row, answer]) for row, answer in zip(table.data, table.target, strict=True)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    return tmp_path


def test_register_export_and_predict(foreign: Path) -> None:
    run_millrace(
        foreign, "models", "register", "model.onnx", "--name", "cancer", "--data", "rows.csv", "--label", "target"
    )
    listed = json.loads(run_millrace(foreign, "models", "--json").stdout)
    assert (listed[0]["name"], listed[0]["version"], listed[0]["aliases"]) == ("cancer", 1, ["champion"])
    run_millrace(
        foreign, "models", "register", "model.onnx", "--name", "cancer", "--data", "rows.csv", "--label", "target"
    )
    assert len(json.loads(run_millrace(foreign, "models", "--json").stdout)) == 1, "the same bytes are one version"
    answers = json.loads(run_millrace(foreign, "predict", "cancer", "--input", "rows.csv", "--json").stdout)
    expected = load_breast_cancer().target
    right = np.mean([answer["label"] in (str(want), int(want)) for answer, want in zip(answers, expected, strict=True)])
    assert right > 0.95
    run_millrace(foreign, "models", "export", "cancer", "--to", "out")
    assert (foreign / "out" / "model.onnx").read_bytes() == (foreign / "model.onnx").read_bytes()


def test_compress_a_foreign_file(foreign: Path) -> None:
    done = run_millrace(foreign, "compress", "model.onnx", "--data", "rows.csv", "--label", "target", "--json")
    facts = json.loads(done.stdout)["facts"]
    assert facts["variants"][0]["name"] == "fp32"
    assert facts["why"]


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x80\x04\x95pickle", b"PK\x03\x04"])
def test_rubbish_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    done = run_millrace(tmp_path, "models", "register", "model.onnx", code=None)
    assert done.returncode in (2, 8)
    assert "error:" in done.stderr
    assert json.loads(run_millrace(tmp_path, "models", "--json").stdout) == []


def test_a_tampered_or_unsigned_bundle_is_refused(foreign: Path) -> None:
    run_millrace(foreign, "models", "register", "model.onnx", "--name", "cancer")
    blobs = foreign / ".millrace" / "blobs"
    victim = max((path for path in blobs.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    write_table(foreign / "cancer.csv")
    done = run_millrace(foreign, "predict", "cancer", "--input", "rows.csv", code=8)
    assert victim.name in done.stderr or "model.onnx" in done.stderr
    assert run_millrace(foreign, "doctor", code=1).returncode == 1
