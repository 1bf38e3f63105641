"""A run as it is shown: plain lines elsewhere, a live view on a terminal, JSON for scripts; `demo --keep` stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from millrace.cli import progress
from millrace.cli.main import cli
from millrace.cli.progress import RunView, show_run, update_view
from millrace.cli.session import Session
from millrace.core.operations.runs import RunEvent

DATA = {"rows_in": 9, "rejected": 0, "rejected_by_reason": {}, "split": {"train": 9}}
ERROR = {"code": "stage.failed", "message": "model.py:3 in forward\nmore", "hint": "", "details": {}}


def events(folder: Path) -> list[RunEvent]:
    return [
        RunEvent(kind="step", step="data", state="running"),
        RunEvent(kind="progress", step="data", done=1, total=2, text="half"),
        RunEvent(kind="step", step="data", state="succeeded", facts=DATA, duration_s=2.0),
        RunEvent(kind="step", step="sweep", state="cached", facts={"rows": 3}),
        RunEvent(kind="step", step="train", state="failed", error=ERROR),
        RunEvent(kind="end", state="succeeded", report_path=str(folder / "report.html")),
    ]


def test_one_plain_line_for_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert show_run(iter(events(tmp_path)), tmp_path / "millrace.yaml", as_json=False) is None
    assert capsys.readouterr().out.splitlines() == [
        " data      9 in, 0 rejected; train 9   2.0 s",
        " sweep     rows 3 (cached)",
        " train     FAILED: model.py:3 in forward",
        "report report.html",
    ]


def test_json_is_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_run(iter(events(tmp_path)), tmp_path / "millrace.yaml", as_json=True)
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["step", "progress", "step", "step", "step", "end"]


def shown(view: RunView) -> str:
    console = Console(width=120, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def test_the_live_view_has_a_bar_for_what_runs_and_keeps_what_ended(tmp_path: Path) -> None:
    view = RunView()
    for event in events(tmp_path)[:2]:
        update_view(view, event, {})
    assert "▶ data" in shown(view)
    assert "half" in shown(view)
    for event in events(tmp_path)[2:]:
        update_view(view, event, {})
    text = shown(view)
    assert "▶" not in text
    assert ["✓" in line for line in text.splitlines()] == [True, False, False]
    assert "9 in, 0 rejected" in text
    assert "✗ train" in text


def test_a_terminal_gets_the_live_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    show_run(iter(events(tmp_path)), tmp_path / "millrace.yaml", as_json=False)
    assert "✓" in capsys.readouterr().out


class Recorded:
    """A transport that notes what it is asked; the run succeeds at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def call(self, operation: str, body: dict[str, Any]) -> Any:
        self.asked.append((operation, body))
        return SimpleNamespace(run=SimpleNamespace(id="r"), is_joined=False)

    def stream(self, operation: str, body: dict[str, Any]) -> Iterator[Any]:
        self.asked.append((operation, body))
        if operation == "run.drive":
            yield RunEvent(kind="end", state="succeeded")
        else:
            yield SimpleNamespace(kind="ready", text="http://127.0.0.1:8080")

    def close(self) -> None: ...


@pytest.mark.parametrize("keep", [False, True])
def test_the_demo_is_init_and_run_and_with_keep_serves(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    transport = Recorded()
    done = CliRunner().invoke(
        cli, ["demo", *(["--keep"] if keep else [])], obj=Session(lambda home, embedded: transport)
    )
    assert done.exit_code == 0
    assert (tmp_path / "digits/millrace.yaml").is_file()
    assert transport.asked[0] == (
        "run.submit",
        {"spec_path": str(tmp_path / "digits/millrace.yaml"), "overrides": []},
    )
    names = [name for name, _ in transport.asked]
    assert names == ["run.submit", "run.drive", *(["endpoint.serve"] if keep else [])]
    assert ("http://127.0.0.1:8080" in done.stdout) is keep


def test_overrides_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transport = Recorded()
    CliRunner().invoke(
        cli, ["run", "--set", "train.epochs=5", "--set", "a=b"], obj=Session(lambda home, embedded: transport)
    )
    assert transport.asked[0][1]["overrides"] == ["train.epochs=5", "a=b"]
