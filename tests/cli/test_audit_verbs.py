"""`millrace system audit …` and `millrace privacy …`: exit codes, files, tables."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from millrace.__main__ import open_transport
from millrace.cli import audit_verbs
from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.wiring import open_dispatcher


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path / "home"))
    dispatcher = open_dispatcher()
    for name in ("one", "=HYPERLINK(1)"):
        dispatcher.call("project.create", {"name": name})
    dispatcher.close()
    return tmp_path / "home"


def invoke(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(arguments), obj=Session(open_transport), prog_name="millrace")
    assert done.exit_code == code, done.output
    return done.stdout


def tamper(home: Path, statement: str) -> None:
    with closing(sqlite3.connect(home / "records.db")) as connection, connection:
        assert connection.execute(statement).rowcount > 0


def test_the_exit_code_says_whether_the_events_are_whole(home: Path) -> None:
    said = invoke("system", "audit", "verify")
    assert "whole: 2 events" in said
    assert "no signed head" in said
    Path("proof.json").write_text(invoke("system", "audit", "prove", "1"))
    Path("export.jsonl").write_text(invoke("system", "audit", "export"))
    assert "1 signed head, the last that holds is over 2 events" in invoke(
        "system", "audit", "verify", "--heads", "export.jsonl"
    )
    tamper(home, "UPDATE events SET actor = 'user:eve' WHERE seq = 2")
    said = invoke("system", "audit", "verify", code=8)
    assert "NOT WHOLE" in said
    assert "1 signed head, none of the events that are here" in said
    assert "event 2 (project.create" in said
    report = json.loads(invoke("system", "audit", "verify", "--json", code=8))
    assert [(one["first"], one["problem"]) for one in report["breaks"]] == [(2, "altered")]
    said = invoke("system", "audit", "verify", "--proof", "proof.json", "--heads", "export.jsonl")
    assert "is among the 2 events" in said, "a proof needs no events"
    assert json.loads(invoke("system", "audit", "verify", "--proof", "proof.json", "--json"))["event"] == 1
    Path("proof.json").write_text(Path("proof.json").read_text().replace("project.create", "project.delete"))
    invoke("system", "audit", "verify", "--proof", "proof.json", code=8)


def test_a_file_that_is_none_is_named(home: Path) -> None:
    Path("image").write_bytes(b"\xff\xfe\x00")
    invoke("system", "audit", "verify", "--heads", "image", code=2)
    invoke("system", "audit", "verify", "--heads", "nowhere", code=10)
    invoke("system", "audit", "prove", "99", code=3)
    invoke("system", "audit", "search", "--since", "yesterday", code=2)


def test_an_export_is_lines_of_json_or_a_table_without_formulas(home: Path) -> None:
    tamper(home, "UPDATE events SET subject = '=cmd|calc', actor = '@eve', verb = '-1+1' WHERE seq = 2")
    lines = [json.loads(line) for line in invoke("system", "audit", "export").splitlines()]
    assert [(line["kind"], line["seq"]) for line in lines] == [("event", 1), ("event", 2)]
    assert lines[0]["detail"]["request"]["name"] == "one"
    rows = list(csv.reader(io.StringIO(invoke("system", "audit", "export", "--csv"))))
    assert rows[0][:5] == ["seq", "at", "actor", "verb", "subject"]
    assert rows[2][2:5] == ["'@eve", "'-1+1", "'=cmd|calc"]
    invoke("system", "audit", "export", "--csv", "--json", code=2)
    assert invoke("system", "audit", "export", "--until", "2000-01-01") == ""


def test_searches_show_pages(home: Path) -> None:
    said = invoke("system", "audit", "search", "--verb", "project.*", "--limit", "1")
    assert "older ones: --before 2" in said
    found = json.loads(invoke("system", "audit", "search", "--before", "2", "--json"))
    assert [one["seq"] for one in found] == [1]
    assert "no such event" in invoke("system", "audit", "search", "--actor", "user:nobody")


def test_retention_and_erasure_say_first_and_do_when_told(home: Path) -> None:
    assert "2 details of events up to 2 would be erased" in invoke("system", "audit", "retention", "--days", "0")
    assert "2 details of events up to 2 erased" in invoke("system", "audit", "retention", "--days", "0", "--apply")
    assert "2 of them without their erased detail" in invoke("system", "audit", "verify")
    assert json.loads(invoke("privacy", "export", "somebody"))["names"] == ["somebody"]
    assert "applied    no" in invoke("privacy", "erase", "somebody")
    assert json.loads(invoke("privacy", "erase", "somebody", "--apply", "--json"))["applied"] is True
    assert json.loads(invoke("system", "audit", "verify", "--json"))["is_whole"] is True


def test_of_a_file_of_many_heads_some_of_all_ages_and_the_last_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"kind": "head", "size": size, "signature": "x"}) for size in range(1, 1001)]
    text = "\n".join(['{"kind":"event"}', *lines[:500], lines[500][:7], *lines[500:]])
    assert audit_verbs._few(text) == text
    monkeypatch.setattr(audit_verbs, "MOST_CHARACTERS", 5000)
    sizes = [json.loads(line)["size"] for line in audit_verbs._few(text).splitlines()]
    assert (sizes[-1], sizes == sorted(sizes), sizes[0] < 20) == (1000, True, True)
    assert 50 < len(sizes) < 120
