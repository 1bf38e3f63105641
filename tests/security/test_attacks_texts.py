"""Attacks by texts: formulas in tables, lines in logs, escape sequences for terminals, tags and bombs in specs.

Where each comes from: CWE-1236 (formulas in tables); CWE-117 (forged lines of logs), CWE-150 (escape sequences for
terminals, CVE-2003-0063, CVE-2021-25743 of kubectl), CVE-2021-42574 (characters that turn the direction); CWE-502 and
CVE-2017-18342 (tags of PyYAML), CWE-776 (anchors that expand, "billion laughs", CVE-2019-11253 of Kubernetes), CWE-1336
(templates), CWE-1333 and CWE-400 (long and deep ones).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from attacked import Site
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.batch.output import open_writer
from millrace.core.errors import SpecError
from millrace.core.spec_errors import load_spec, parse_spec
from millrace.core.spec_source import MAX_NODES
from millrace.core.types import Event
from millrace.core.visible import LineFormatter, visible
from millrace.formats.signature import Signature
from millrace.wiring import open_dispatcher

# --------------------------------------------------------------------------- tables

FORMULAS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1|A1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    '=HYPERLINK("http://evil.example")',
]


def test_no_cell_of_answers_is_a_formula(tmp_path: Path) -> None:
    """Classes of a model come from data of others."""
    path = tmp_path / "answers.csv"
    model = Signature(task="classification", inputs=[], outputs=[], label="y", classes=FORMULAS)
    with open_writer("csv", path, model, has_numbers=False) as writer:
        writer.write(np.arange(len(FORMULAS)), {"probabilities": np.eye(len(FORMULAS), dtype=np.float32)})
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(FORMULAS) + 1
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    numbers = Signature(task="classification", inputs=[], outputs=[], label="y", classes=["-1", "+2.5e-3"])
    with open_writer("csv", path, numbers, has_numbers=False) as writer:
        writer.write(np.arange(2), {"probabilities": np.eye(2, dtype=np.float32)})
    assert [line.split(",")[0] for line in path.read_text().splitlines()[1:]] == ["-1", "+2.5e-3"], "numbers stay"


def test_no_cell_of_events_is_a_formula(tmp_path: Path) -> None:
    home = open_dispatcher(str(tmp_path / "home"))
    with home.services.records.transaction() as transaction:
        for one in FORMULAS:
            transaction.append(Event(at=1.0, actor=one, verb=one, subject=one))
    home.close()
    command = [sys.executable, "-m", "millrace", "--home", str(tmp_path / "home"), "system", "audit", "export", "--csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = list(csv.reader(io.StringIO(done.stdout, newline="")))
    assert len(rows) == len(FORMULAS) + 1
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]


# --------------------------------------------------------------------------- logs and terminals

STEERING = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b2J\x08\x7f\u202egnp.exe\u2066"
FORGED = "run\nINFO the owner has signed in\r\nERROR \u2028all is lost"


@given(st.text())
def test_what_is_shown_steers_nothing(text: str) -> None:
    shown = visible(text, is_line=True)
    assert len(shown) == len(text)
    assert shown.isprintable() or not {one for one in shown if ord(one) < 0x20 or 0x7F <= ord(one) < 0xA0}
    assert "\n" not in shown
    assert visible(text).count("\n") == text.count("\n")
    assert visible(shown) == shown


def test_a_log_has_one_line_for_one_record() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("attacked")
    logger.addHandler(handler)
    logger.error("%s failed", FORGED + STEERING)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("%s", "broken")
    lines = stream.getvalue().split("\n")
    assert [line for line in lines if re.match("INFO|ERROR|WARNING", line)] == [lines[0], "ERROR broken"]
    assert "\x1b" not in stream.getvalue()
    assert len(lines[0].splitlines()) == 1


def test_no_request_writes_a_line_of_its_own_into_the_servers_log(tmp_path: Path) -> None:
    """Through the process as it is started: what its log has of paths and names is what its formatter lets through."""
    code = (
        "import logging, sys\nfrom click.testing import CliRunner\nfrom millrace.__main__ import cli, Session, open_transport\n"
        "sys.argv = ['millrace', '--home', sys.argv[1], 'status']\n"
        "try:\n    cli(obj=Session(open_transport), prog_name='millrace')\nexcept SystemExit:\n    pass\n"
        f"logging.getLogger('millrace.api.app').error('%s %s: %s', 'GET', {FORGED!r}, {STEERING!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = [line for line in done.stderr.split("\n") if line]
    assert len(lines) == 1
    assert lines[0].startswith("ERROR GET run")
    assert "\x1b" not in done.stderr


def on_a_terminal(*arguments: str) -> str:
    """What a command writes to a terminal, by both of its streams."""
    mine, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "millrace", *arguments], stdin=other, stdout=other, stderr=other,
                               env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"})  # fmt: skip
    os.close(other)
    written = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:  # nobody writes any more
            break
        if not part:
            break
        written += part
    os.close(mine)
    assert process.wait(60) in (0, 3)
    return written.decode()


def test_no_name_steers_a_terminal(tmp_path: Path) -> None:
    """Tables in colours, plain lines, logs and errors; colours of ours are colours."""
    home = open_dispatcher(str(tmp_path / "home"))
    run = home.call("run.track", {"name": f"evil{STEERING}", "project": "default", "tags": {"t": STEERING}})
    home.call(
        "run.end", {"run": run.id, "state": "failed", "error": {"code": "x", "message": STEERING, "hint": STEERING}}
    )
    home.call("project.create", {"name": f"p{STEERING}"})
    with home.services.records.transaction() as transaction:
        transaction.append(Event(at=time.time(), actor=STEERING, verb="v", subject=STEERING, detail={"a": STEERING}))
    home.close()
    place = ("--home", str(tmp_path / "home"))
    seen = 0
    for arguments in (("runs",), ("runs", "show", run.id), ("projects",), ("runs", "show", f"x{STEERING}"),
                      ("system", "audit", "search", "--text", "owned"), ("runs", "--json"), ("status",)):  # fmt: skip
        text = on_a_terminal(*place, *arguments)
        assert re.sub(r"\x1b\[[0-9;]*m", "", text).count("\x1b") == 0, (arguments, text)
        assert "\x1b[31mred" not in text, "a colour that is theirs"
        assert not re.search("[\x07\x08\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]", text), (arguments, text)
        seen += "owned" in text
    assert seen >= 3, "it is there, to be seen"
    piped = subprocess.run([sys.executable, "-m", "millrace", *place, "runs", "--json"], capture_output=True, text=True,
                           timeout=60, check=True)  # fmt: skip
    assert json.loads(piped.stdout)[0]["name"] == f"evil{STEERING}", "programs get it as it is"


# --------------------------------------------------------------------------- specs

TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']", "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1]", "!!python/object:builtins.open {{}}", "!ENV ${{HOME}}",
    "!include /etc/passwd", "!vault x", "!Ref x", "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "!!binary aGk=", "!!set {{a: }}", "!!omap [a: 1]", "!local x",
]  # fmt: skip
LITERAL = ["${HOME}", "$(id)", "`id`", "{{7*7}}", "{% raw %}", "%(HOME)s", "${env:HOME}", "${{ secrets.KEY }}", "<%= 7*7 %>", "#{7*7}",
           "~root", "$HOME", "@/etc/passwd", "%{HOME}"]  # fmt: skip
BOMBS = {
    "laughs": "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9) if i else 'lol'}]\n" for i in range(12)),
    "maps": "".join(
        f"a{i}: &a{i} {{{','.join(f'k{j}: *a{i - 1}' for j in range(9)) if i else 'x: y'}}}\n" for i in range(12)
    ),
    "itself": "a: &a [*a]\n",
    "keys": "a: &a {b: c}\n? *a\n: x\n",
    "merge": "a: &a {b: c}\nd: {<<: *a, <<: *a}\n",
    "deep lists": "a: " + "[" * 100_000,
    "deep maps": "a: " + "{b: " * 50_000,
    "deep blocks": "\n".join(" " * at + "a:" for at in range(900)),
    "many": "a: [" + "1," * 300_000 + "]",
    "large": "a: '" + "x" * 1_200_000 + "'",
    "twice": "project: a\nproject: b\ndata: {source: a, label: b}\n",
    "twice inside": "data: {source: a, label: b, source: /etc/passwd}\n",
    "documents": "data: {source: a, label: b}\n---\ndata: {source: c, label: b}\n",
    "directive": "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system [id]\n",
    "no text": "\x00\x01",
    "surrogate": 'project: "\\ud800"\n',
}


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_makes_nothing(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    text = f"data: {{source: rows.csv, label: y}}\ntrain: {{params: {{a: {tag.format(canary=made)}}}}}\n"
    with pytest.raises(SpecError):
        parse_spec(text)
    with pytest.raises(SpecError):
        parse_spec("data: {source: rows.csv, label: y}", overrides=[f"train.params.a={tag.format(canary=made)}"])
    assert not made.exists()


@pytest.mark.parametrize("text", LITERAL)
def test_an_expression_is_the_text_that_it_is(text: str) -> None:
    written = f"project: p\ndata: {{source: {json.dumps(text)}, label: {json.dumps(text)}}}\ntrain: {{params: {{a: {json.dumps(text)}}}}}\n"
    spec = parse_spec(written, overrides=[f"data.ignore=[{json.dumps(text + text)}]"])
    assert spec.data is not None
    assert (spec.data.source, spec.data.label, spec.data.ignore) == (text, text, [text + text])
    assert spec.train.params == {"a": text}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_clear_error_by_file_and_by_the_api(site: Site, tmp_path: Path, name: str) -> None:
    path = tmp_path / "millrace.yaml"
    path.write_text(BOMBS[name])
    with pytest.raises(SpecError):
        load_spec(path)
    client = site.client(site.tokens["dev"])
    stored = client.request("POST", "/api/v1/blobs", content=BOMBS[name].encode()).json()
    entry = {"path": "millrace.yaml", "digest": stored["digest"], "size_bytes": stored["size_bytes"]}
    tree = client.post("/api/v1/trees", json={"entries": [entry]}).json()
    answer = client.post("/api/v1/runs", json={"spec_path": f"tree:{tree['digest']}/millrace.yaml"})
    assert (answer.status_code, answer.json()["code"]) == (422, "spec.invalid"), answer.text[:300]


def test_many_values_are_not_all_read_before_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of them is half a minute's work, for which whoever asks pays nothing."""
    made: list[Any] = []
    real = yaml.composer.Composer.compose_scalar_node

    def compose(self: Any, anchor: Any) -> Any:
        made.append(anchor)
        return real(self, anchor)

    monkeypatch.setattr(yaml.composer.Composer, "compose_scalar_node", compose)
    with pytest.raises(SpecError, match="values"):
        parse_spec(BOMBS["many"])
    assert 0 < len(made) <= 2 * MAX_NODES


def test_a_long_spec_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "millrace.yaml"
    with path.open("wb") as file:
        file.write(b"a: b\n")
        file.truncate(200 << 30)  # sparse: it takes no room, and whoever reads it all takes all memory
    with pytest.raises(SpecError, match="bytes at most"):
        load_spec(path)


@pytest.mark.parametrize(
    "number", ["9" * 5000, "-" + "9" * 5000, "1e999999", "0x" + "f" * 5000, "0b1", "1:30:00", ".nan", "-.inf"]
)
def test_no_number_is_too_large_to_be_refused(number: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(f"data: {{source: rows.csv, label: y}}\ntrain: {{epochs: {number}}}\n")
    with pytest.raises(SpecError):
        parse_spec("data: {source: rows.csv, label: y}", overrides=[f"train.epochs={number}"])


def test_a_merge_key_is_a_key_that_nobody_knows() -> None:
    """It could take a section's values from elsewhere in the file, unseen by who reads it."""
    with pytest.raises(SpecError, match="unknown key"):
        parse_spec("base: &b {label: z}\ndata: {source: rows.csv, <<: *b}\n")
    with pytest.raises(SpecError):
        parse_spec("data: {source: rows.csv, label: y}\ntrain: {<<: {epochs: 1000000}}\n")


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.sampled_from(["x", "1", "*a", "!!int 5", "${X}"]),
        lambda inner: st.lists(inner, max_size=4).map(lambda parts: f"&a [{', '.join(parts)}]"),
        max_leaves=20,
    )
)
def test_any_anchors_end(text: str) -> None:
    written = f"data: {{source: rows.csv, label: y}}\ntrain: {{params: {{v: {text}}}}}\n"
    try:
        spec = parse_spec(written)
    except SpecError:
        return
    assert "v" in spec.train.params
