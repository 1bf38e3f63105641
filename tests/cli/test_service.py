"""`millrace service`: the unit is one that systemd accepts and whose command serves the home."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from millrace.__main__ import open_transport
from millrace.api.supervisor import GRACE_S
from millrace.cli import service_verbs
from millrace.cli.main import cli
from millrace.cli.server_verbs import up
from millrace.cli.service_verbs import Place, Up, complaints, quote, render_unit
from millrace.cli.session import Session
from millrace.core.errors import InputError

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder, with units and secrets below the test's folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MILLRACE_HOME", raising=False)
    monkeypatch.setattr(service_verbs, "SYSTEM_UNITS", tmp_path / "units")
    monkeypatch.setattr(service_verbs, "SYSTEM_SECRETS", tmp_path / "secrets")
    project = tmp_path / "a project"
    project.mkdir()
    monkeypatch.chdir(project)
    return project


def invoke(*arguments: str) -> Result:
    """A `millrace service` command."""
    return CliRunner().invoke(cli, ["service", *arguments], obj=Session(open_transport), prog_name="millrace")


def settings(text: str) -> dict[str, str]:
    """A unit's settings; every one stands once."""
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")]
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def words_of(line: str) -> list[str]:
    """`ExecStart=` as systemd.service(5) says that it is read."""
    first, *others = (word.replace("%%", "%") for word in shlex.split(line))
    return [first, *(word.replace("$$", "$") for word in others)]


def unit_of(home: Path, *, is_system: bool = False, interpreter: str = sys.executable) -> str:
    up = Up(home=home, host="127.0.0.1", port=7070, serve_port=7071, workers=1)
    return render_unit(Place.of("millrace", is_system), up, interpreter)


# ----------------------------------------------------------------------------- the text


printable = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="\\"), min_size=1)


@given(printable.filter(lambda word: word == word.strip() and word.isprintable()))
def test_a_word_reaches_the_program_as_it_was(word: str) -> None:
    assert words_of(f"/bin/x {quote(word)}")[1:] == [word]
    if not {'"', "'"} & {*word}:
        assert words_of(quote(f"/{word}", is_command=True)) == [f"/{word}"]
        assert quote(f"/{word}", is_command=True).count("$") == word.count("$")


@pytest.mark.parametrize("word", ["a\nb", "a\\b", "tail ", "", "\x00", "a\x7fb", "a\u2028b"])
def test_what_a_unit_cannot_say_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="a unit cannot name"):
        quote(word)


def test_systemd_runs_no_program_with_a_quote_in_its_path() -> None:
    with pytest.raises(InputError, match="quote in its path"):
        quote("/srv/it's/python3", is_command=True)


@pytest.mark.parametrize("is_system", [False, True])
def test_the_unit_says_what_it_must(folder: Path, is_system: bool) -> None:
    said = settings(unit_of(folder / ".millrace", is_system=is_system))
    assert words_of(said["ExecStart"])[:4] == [sys.executable, "-P", "-m", "millrace"]
    assert said["WorkingDirectory"] == str(folder)
    assert said["Restart"] == "on-failure"
    assert said["KillMode"] == "mixed"
    assert float(said["TimeoutStopSec"]) > GRACE_S
    assert said["EnvironmentFile"].startswith("-")
    assert said["NoNewPrivileges"] == "yes"
    assert said.get("User") == (folder.owner() if is_system else None)
    assert said["WantedBy"] == ("multi-user.target" if is_system else "default.target")


@needs_systemd
@pytest.mark.parametrize("is_system", [False, True])
@pytest.mark.parametrize("name", ["plain", "with blanks", "100% h", "$HOME", "semi;colon", "ünïcode"])
def test_systemd_reads_every_path_as_it_was(tmp_path: Path, name: str, is_system: bool) -> None:
    """It complains about a command that is not there, so no complaint shows that it found this one."""
    place = tmp_path / name
    place.mkdir()
    program = place / "python3"
    text = unit_of(place / ".millrace", is_system=is_system, interpreter=str(program))
    said = complaints("millrace", text, is_system)
    assert said
    assert "not executable" in said[0]
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert complaints("millrace", text, is_system) == []


@needs_systemd
def test_systemd_knows_every_setting(folder: Path) -> None:
    text = unit_of(folder / ".millrace", is_system=True)
    assert complaints("millrace", text.replace("KillMode=mixed", "KillMode=maybe"), True)
    assert complaints("millrace", text.replace("ProtectClock", "ProtectClocks"), True)
    assert complaints("millrace", text, True) == []


# ----------------------------------------------------------------------------- the commands


def test_install_show_and_uninstall(folder: Path, tmp_path: Path) -> None:
    unit = tmp_path / "config/systemd/user/millrace.service"
    done = invoke("install", "--port", "9000", "--workers", "3")
    assert done.exit_code == 0, done.output
    assert f"written   {unit}" in done.stdout
    assert "systemctl --user daemon-reload\n  systemctl --user enable --now millrace\n" in done.stdout
    assert settings(unit.read_text())["ExecStart"].endswith("--port 9000 --serve-port 7071 --workers 3")
    assert unit.read_text() in invoke("show").stdout
    wanted = unit.parent / "default.target.wants/millrace.service"
    wanted.parent.mkdir()
    wanted.symlink_to(unit)
    gone = invoke("uninstall")
    assert gone.exit_code == 0, gone.output
    assert not os.path.lexists(wanted)
    assert not unit.exists()
    assert "systemctl --user stop millrace" in gone.stdout
    for again in ("show", "uninstall"):
        missing = invoke(again)
        assert missing.exit_code == 3
        assert "millrace service install" in missing.stderr


def test_secrets_stand_in_a_file_of_their_own_that_is_kept(tmp_path: Path) -> None:
    secrets = tmp_path / "config/millrace/millrace.env"
    assert invoke("install").exit_code == 0
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert all(line.startswith("#") for line in secrets.read_text().splitlines())
    secrets.write_text("MILLRACE_RECORDS_URL=postgresql://u:secret@h/d\n")
    assert invoke("install").exit_code == 0
    assert invoke("uninstall").exit_code == 0
    assert "secret" in secrets.read_text()


def test_installing_again_says_how_to_restart(tmp_path: Path) -> None:
    invoke("install")
    again = invoke("install", "--port", "9001")
    assert again.stdout.startswith("updated")
    assert "systemctl --user restart millrace" in again.stdout
    assert "9001" in (tmp_path / "config/systemd/user/millrace.service").read_text()


def test_a_unit_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    unit = tmp_path / "config/systemd/user/millrace.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    for command in ("install", "uninstall", "show"):
        refused = invoke(command)
        assert refused.exit_code == 4
        assert "was not written by Millrace" in refused.stderr
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"
    unit.unlink()
    unit.symlink_to("/dev/null")  # how systemd masks a unit
    assert invoke("install").exit_code == 4
    assert unit.is_symlink()


def test_a_second_home_gets_a_unit_of_its_own(tmp_path: Path) -> None:
    invoke("install")
    other = tmp_path / "other"
    other.mkdir()
    refused = invoke("install", "--home", str(other / ".millrace"))
    assert refused.exit_code == 4
    assert "serves" in refused.stderr
    named = invoke("install", "--home", str(other / ".millrace"), "--name", "second", "--port", "7080")
    assert named.exit_code == 0, named.output
    assert str(other) in (tmp_path / "config/systemd/user/second.service").read_text()


def test_a_unit_of_the_system_runs_as_the_owner_of_the_home(folder: Path, tmp_path: Path) -> None:
    done = invoke("install", "--system", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["unit"] == str(tmp_path / "units/millrace.service")
    assert settings(Path(told["unit"]).read_text())["User"] == folder.owner()
    assert json.loads(invoke("show", "--system", "--json").stdout)["home"] == str(folder / ".millrace")
    assert json.loads(invoke("uninstall", "--system", "--json").stdout)["removed"] == [told["unit"]]


def test_print_writes_nothing(tmp_path: Path) -> None:
    printed = invoke("install", "--print")
    assert printed.exit_code == 0
    assert "[Service]" in printed.stdout
    assert json.loads(invoke("install", "--print", "--json").stdout)["text"] == printed.stdout
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "rule"),
    [
        (["--host", "0.0.0.0"], 2, "loopback"),
        (["--name", "../up"], 2, "unit's name"),
        (["--home", "/nowhere/at/all/.millrace"], 3, "no folder"),
    ],
)
def test_what_could_never_run_is_refused_at_once(arguments: list[str], code: int, rule: str, tmp_path: Path) -> None:
    refused = invoke("install", *arguments)
    assert refused.exit_code == code
    assert rule in refused.stderr
    assert not (tmp_path / "config").exists()


def test_variables_that_the_service_would_not_see_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_RECORDS_URL", "postgresql://u:hidden@h/d")
    said = invoke("install").stdout
    assert "MILLRACE_RECORDS_URL is set here but not in the service" in said
    assert "hidden" not in said


def test_a_server_that_others_reach(folder: Path) -> None:
    """Its certificate, or the proxy that has one; what the unit runs is what `millrace up` takes."""
    own = ["--host", "10.0.0.5", "--tls-cert", "cert.pem", "--tls-key", "key.pem", "--host-name", "models.example.org"]
    text = invoke("install", "--print", *own).stdout
    words = words_of(settings(text)["ExecStart"])
    assert words[words.index("--tls-cert") + 1] == str(folder / "cert.pem")
    assert words[words.index("--name") + 1] == "models.example.org"
    by_proxy = ["--host", "10.0.0.5", "--host-name", "m.example", "--tls-terminated-by-proxy", "10.0.0.7"]
    assert "at https://m.example\n" in invoke("install", *by_proxy).stdout
    for options in (own, by_proxy):
        words = words_of(settings(invoke("install", "--print", *options).stdout)["ExecStart"])
        up.make_context("up", words[words.index("up") + 1 :]).close()  # it knows every one of them
    refused = invoke("install", "--host-name", "m", "--tls-terminated-by-proxy", "0.0.0.0/0")
    assert (refused.exit_code, "every address" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_the_command_of_the_unit_serves_the_home_and_ends_in_time(folder: Path) -> None:
    """A module of the project's folder must not stand in for one of Python's."""
    (folder / "json.py").write_text("raise SystemExit('the wrong json')\n")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [str(each.getsockname()[1]) for each in (one, two)]
    unit = invoke("install", "--print", "--port", ports[0], "--serve-port", ports[1]).stdout
    said = settings(unit)
    server = subprocess.Popen(words_of(said["ExecStart"]), cwd=said["WorkingDirectory"], stdout=subprocess.PIPE,
                              text=True, env={"PATH": os.defpath})  # fmt: skip
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{ports[0]}" in server.stdout.readline()
        assert (folder / ".millrace/server.json").is_file()
        server.send_signal(signal.SIGTERM)
        assert server.wait(float(said["TimeoutStopSec"])) == 0
    finally:
        server.kill()
        server.communicate()
