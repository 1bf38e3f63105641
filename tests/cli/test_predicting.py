"""`millrace predict` into a folder: what a terminal and a pipe are shown, the summary, JSON, and how places are told apart."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from millrace.__main__ import open_transport
from millrace.batch.job import Progress, Summary
from millrace.cli import predicting
from millrace.cli.main import cli
from millrace.cli.session import Session

PROGRESS = Progress(share=0.5, rows=1234, parts=2, rejected=3)
SUMMARY = Summary(
    output="out", rows=1300, rejected=3, parts=5, resumed=2, files=1, seconds=2.0, rows_per_s=650.0, workers=2
)  # fmt: skip


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(predicting, "is_terminal", lambda: True)
    monkeypatch.setattr(predicting, "console", lambda: Console(file=shown, force_terminal=True, width=100))
    with predicting.showing(as_json=False) as show:
        show(PROGRESS)
    assert " 50%" in shown.getvalue()
    assert "1,234 rows, 2 parts, 3 rejected" in shown.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    monkeypatch.setattr(predicting, "is_terminal", lambda: as_json)
    now = [0.0]
    monkeypatch.setattr(predicting.time, "monotonic", lambda: now[0])
    with predicting.showing(as_json=as_json) as show:
        for now[0] in (0.1, 4.9, 5.1, 6.0, 10.2):
            show(PROGRESS)
    out, err = capsys.readouterr()
    assert out == "", "JSON and tables stay whole"
    assert err.splitlines() == [" 50%  1,234 rows, 2 parts, 3 rejected"] * 2


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    predicting.render_summary(SUMMARY, "digits v1 (fp32)")
    assert capsys.readouterr().out.splitlines() == [
        "1,297 answers of digits v1 (fp32) -> out  (5 parts of 1 file, 2 of them were there before)",
        "650 rows/s, 2.0 s, 2 workers",
        "3 rows have no answer: out/rejected.jsonl",
    ]


@pytest.mark.parametrize(
    ("output", "inputs", "is_folder"),
    [
        ("answers.csv", ["a.csv"], False),
        ("answers.parquet", ["a.parquet"], False),
        ("answers", ["a.csv"], True),
        ("answers.d/", ["a.csv"], True),
        ("answers.csv", ["a.csv", "b.csv"], True),
        ("answers.csv", ["data/*.csv"], True),
    ],
)
def test_a_file_or_a_folder(output: str, inputs: list[str], is_folder: bool) -> None:
    assert predicting.is_folder(output, inputs) is is_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a model that adds two columns."""
    folder = tmp_path_factory.mktemp("prices")
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", n])
        for name, n in (("numbers", 2), ("value", 1))
    ]
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["numbers", "axis"], ["value"], keepdims=1)],
        "sum",
        tensors[:1],
        tensors[1:],
        [axis],
    )
    path = folder / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    rows = folder / "rows.csv"
    rows.write_text("age,income,price\n" + "".join(f"{k % 9},{k},{k % 9 + k}\n" for k in range(60)))
    made = invoke(
        folder / ".millrace",
        "models",
        "register",
        str(path),
        "--name",
        "prices",
        "--data",
        str(rows),
        "--label",
        "price",
    )
    assert made.exit_code == 0, made.output
    return folder / ".millrace"


def invoke(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home), *arguments], obj=Session(open_transport))


def test_the_command(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("age,income\n" + "1,2\n" * 25)

    def predict(*arguments: str) -> Result:
        return invoke(home, "predict", "prices", *arguments)

    done = predict("--input", "a.csv", "b.csv", "--output", "out", "--format", "csv")
    assert "50 answers of prices v1 (fp32) -> out  (2 parts of 2 files)" in done.output
    (first, _) = sorted(Path("out").glob("part-*"))
    assert first.read_text().splitlines()[:2] == ["row,value", "1,3.0"]
    again = predict("--input", "a.csv", "--input", "b.csv", "--output", "out", "--format", "csv", "--json")
    assert json.loads(again.stdout)["resumed"] == 2
    other = predict("--input", "a.csv", "--output", "out", "--format", "csv")
    assert (other.exit_code, "answers of another job" in other.output) == (4, True)
    assert predict("--input", "a.csv", "--output", "one.csv").exit_code == 0
    assert Path("one.csv").read_text().splitlines()[:2] == ["value", "3.0"]
    assert "25 answers in all" in predict("--input", "a.csv").output
    several = predict("--input", "*.csv")
    assert (several.exit_code, "want a folder" in several.output) == (2, True)
    ignored = predict("--input", "a.csv", "--output", "one.csv", "--on-error", "skip")
    assert (ignored.exit_code, "are for a folder of parts" in ignored.output) == (2, True)
    (tmp_path / "a.csv").write_text("age,income\n1,2\nold,2\n")
    bad = predict("--input", "a.csv", "--output", "one.csv")
    assert (bad.exit_code, "a.csv row 2: age: want a number, got 'old'" in bad.output) == (2, True)
    assert Path("one.csv").read_text().splitlines()[:2] == ["value", "3.0"], "what was there stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "one.csv", "out"]
