"""The Python side on a whole run of a regression: run, wait, report, predict, notebooks."""

from __future__ import annotations

import csv
import re
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from sklearn.datasets import load_diabetes

import millrace
from millrace.core.errors import InputError, NotFoundError
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.rotating(1)
SPEC = """project: sugar
data: {source: sugar.csv, label: target}
train: {model: linear}
compress: {batch_sizes: [1]}
"""


@pytest.fixture(scope="module", params=["embedded", "server", "far server"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[millrace.Client, millrace.Run]]:
    """A run in this process's home, through the server of the home, through one that sees none of our files."""
    folder = tmp_path_factory.mktemp("sugar")
    table = load_diabetes()
    with (folder / "sugar.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [[*table.feature_names, "target"], *np.column_stack([table.data, table.target]).tolist()]
        )
    (folder / "millrace.yaml").write_text(SPEC)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if request.param == "server":
            stack.enter_context(RunningServer(folder / ".millrace"))
        if request.param == "far server":
            server = stack.enter_context(RunningServer(tmp_path_factory.mktemp("far") / "home"))
            patch.setenv("MILLRACE_URL", server.url)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        client = stack.enter_context(closing(millrace.connect(str(folder / ".millrace"))))
        yield client, client.run(folder / "millrace.yaml").wait(timeout_s=120)


def test_the_run_and_its_report(run: tuple[millrace.Client, millrace.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    client, ended = run
    assert ended.state == "succeeded"
    assert ended.facts["data"]["task"] == "regression"
    assert [one.id for one in client.runs()] == [ended.id]
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    path = ended.report.open()
    assert opened == [path.as_uri()]
    titles = re.findall(r"<h2>(.*?)</h2>", path.read_text())
    assert titles == ["Data", "Training", "Mistakes", "Smaller", "Promotion", "Live", "Lineage", "Reproduce"]


def test_guard_and_gate_judge_a_regression(run: tuple[millrace.Client, millrace.Run]) -> None:
    facts = run[1].facts
    judged = [one["guarantee"] for one in facts["compress"]["variants"][1:] if one["guarantee"]]
    assert {one["metric"] for one in judged} <= {"absolute_error", "mae"}
    assert facts["register"]["gate"]["explanation"]
    assert facts["serve"]["wrong"] == 0
    assert facts["monitor"]["reference_rows"] == facts["data"]["split"]["test"], "the profile is of held-out rows"


def test_rows_of_any_kind_are_answered(run: tuple[millrace.Client, millrace.Run]) -> None:
    model = run[0].model("sugar@champion")
    table = load_diabetes()
    rows = [dict(zip(table.feature_names, row, strict=True)) for row in table.data[:50].tolist()]
    values = [answer["value"] for answer in model.predict(rows)]
    assert values == [answer["value"] for answer in model.predict(table.data[:50])]
    assert np.corrcoef(values, table.target[:50])[0, 1] > 0.5
    with pytest.raises(InputError, match=r"instances\[0\]"):
        model.predict([{"age": "old"}])


def test_objects_show_themselves(run: tuple[millrace.Client, millrace.Run]) -> None:
    client, ended = run
    assert "<td>succeeded</td>" in ended._repr_html_()
    assert "sugar" in client.model("sugar")._repr_html_()
    assert "succeeded" in repr(ended)


def test_what_does_not_exist_is_named(run: tuple[millrace.Client, millrace.Run]) -> None:
    with pytest.raises(NotFoundError, match="there is no model 'salt'"):
        run[0].model("salt").predict([])


def test_a_challenger_is_judged_on_the_same_rows_and_looks_are_counted(
    run: tuple[millrace.Client, millrace.Run],
) -> None:
    client, first = run
    assert first.facts["register"]["gate"]["verdict"] == "first"
    again = client.run(first.record.spec_path, ["train.model=boosting"]).wait(timeout_s=120)
    gate = again.facts["register"]["gate"]
    assert gate["champion"].startswith("sugar v1")
    assert gate["looks"] == 2
    assert gate["wins"] + gate["losses"] + gate["ties"] == gate["rows"] > 100
    assert gate["verdict"] in ("promoted", "kept", "undecided")
    card = client.model("sugar@2").card
    assert gate["explanation"] in card
    assert f"{again.facts['evaluate']['metrics'][0]['value']:.4g}" in card
