"""The command tree: what there is, its help, its examples, JSON, exit codes, completion."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from millrace.__main__ import open_transport
from millrace.cli.main import EXIT_CODE_HELP, cli
from millrace.cli.session import EXIT_CODES, Session
from millrace.core.errors import MillraceError, all_errors

VERBS = {
    "init",
    "demo",
    "run",
    "compress",
    "serve",
    "predict",
    "loadtest",
    "open",
    "status",
    "logs",
    "doctor",
    "config",
    "up",
    "deploy",
    "worker",
    "login",
    "logout",
    "service",
    "import",
}
NOUNS = {
    "runs": {"list", "show", "diff", "cancel", "delete", "restore", "sbom"},
    "projects": {"list", "create", "update", "delete", "restore"},
    "datasets": {"list", "show", "diff"},
    "models": {"list", "show", "register", "promote", "rollback", "export", "dossier"},
    "endpoints": {
        "list",
        "show",
        "delete",
        "rollout",
        "promote",
        "abort",
        "status",
        "forecast",
        "captured",
        "manifests",
    },
    "alerts": {"list", "show", "resolve"},
    "tokens": {"list", "create", "revoke"},
    "approvals": {"list", "approve", "refuse"},
    "approval-rules": {"list", "set", "delete"},
    "quotas": {"list", "set"},
    "keys": {"list", "rotate", "drop", "erase"},
    "secrets": {"list", "set", "rotate", "delete"},
    "trusted-keys": {"list", "add", "revoke"},
    "users": {"list", "show", "create", "set-password", "enable-totp", "disable-totp", "disable", "enable", "who-can"},
    "roles": {"list", "create", "delete", "bindings", "grant", "revoke"},
    "privacy": {"export", "erase"},
    "system": {"gc", "du", "migrate", "backup", "backups", "verify", "restore", "drill", "prune", "audit"},
}


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that people see, with its words."""
    if not command.hidden:
        yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))


TREE = dict(walk(cli))
LEAVES = [path for path, command in TREE.items() if not isinstance(command, click.Group)]


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = CliRunner().invoke(cli, list(arguments), obj=Session(open_transport), prog_name="millrace")
    return done.exit_code, done.stdout, done.stderr


def test_the_verbs_and_nouns_are_the_promised_ones() -> None:
    shown = {path[0] for path in TREE if len(path) == 1}
    assert shown == VERBS | set(NOUNS)
    for noun, verbs in NOUNS.items():
        assert {path[1] for path in TREE if len(path) == 2 and path[0] == noun} == verbs


@pytest.mark.parametrize("path", list(TREE), ids=" ".join)
def test_every_help_has_an_example_that_names_the_command(path: tuple[str, ...]) -> None:
    code, printed, _ = invoke(*path, "--help")
    assert code == 0
    assert "Example" in printed
    example = printed.split("Example", 1)[1]
    assert " ".join(("millrace", *path)).rstrip() in example


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_can_print_json(path: tuple[str, ...]) -> None:
    assert "--json" in {option for parameter in TREE[path].params for option in parameter.opts}


@pytest.mark.parametrize("path", [("status",), ("doctor",), ("config",), ("system", "du"), ("system", "gc"),
                                  *((noun,) for noun in NOUNS if noun not in ("system", "privacy"))], ids=" ".join)  # fmt: skip
def test_json_of_an_empty_home_is_json_and_text_is_text(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, _ = invoke(*path, "--json")
    assert code == 0
    json.loads(printed)
    code, printed, _ = invoke(*path)
    assert code == 0
    assert printed.strip()


def test_every_error_has_an_exit_code_that_the_help_explains() -> None:
    codes = {error.code for error in all_errors() if error.__module__.startswith("millrace.")}
    assert codes == set(EXIT_CODES)
    explained = EXIT_CODE_HELP.replace("·", " ").split()
    assert {str(number) for number in EXIT_CODES.values()} <= set(explained)
    assert 0 not in EXIT_CODES.values()


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.code)
def test_an_error_is_printed_for_people_and_for_scripts(
    error: type[MillraceError], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(open_transport)
    assert session.fail(error("it broke", details={"log": "/a/log"})) == EXIT_CODES[error.code]
    said = capsys.readouterr().err
    assert said.startswith("error: it broke\n  log:  /a/log\n  hint: ")
    session.as_json = True
    session.fail(error("it broke"))
    assert json.loads(capsys.readouterr().out)["error"]["code"] == error.code


def test_the_home_is_found_from_a_subfolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILLRACE_HOME", raising=False)
    (tmp_path / "millrace.yaml").write_text("data: {source: a.csv, label: y}\n")
    (tmp_path / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/er")
    assert json.loads(invoke("status", "--json")[1])["home"] == str(tmp_path / ".millrace")


def test_the_shell_completes() -> None:
    words = {"_MILLRACE_COMPLETE": "bash_complete", "COMP_WORDS": "millrace mod", "COMP_CWORD": "1", "PATH": "/bin"}
    done = subprocess.run([sys.executable, "-m", "millrace"], env=words, capture_output=True, text=True, check=False)
    assert "models" in done.stdout
    assert "runs" not in done.stdout


def test_deploying_without_a_server_says_so_at_once_and_keeps_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "negative.onnx")
    assert invoke("models", "register", "negative.onnx", "--name", "negative")[0] == 0
    monkeypatch.setattr("millrace.cli.server_verbs.time.sleep", lambda _: pytest.fail("it waits"))
    code, _, said = invoke("deploy", "negative", "--endpoint", "n")
    assert code == EXIT_CODES["unavailable"]
    assert "no server is running" in said
    assert "millrace up" in said
    shown = json.loads(invoke("endpoints", "show", "n", "--json")[1])
    assert (shown["state"], shown["model"], shown["is_managed"]) == ("stopped", "negative", True)
    code, printed, _ = invoke("deploy", "negative", "--endpoint", "n", "--no-wait")
    assert (code, printed) == (0, "n wanted: negative v1\n")


def test_the_help_of_migrate_shows_what_to_type() -> None:
    _, printed, _ = invoke("system", "migrate", "--help")
    examples = printed.split("Examples:", 1)[1].split("Options:", 1)[0].split("\n")
    assert [line.split()[3] for line in examples if line.strip()] == ["--records-to", "--blobs-to", "--records-to"]
    assert "postgresql://" in printed.split("Options:", 1)[1]
