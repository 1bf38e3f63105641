"""Tables of users, roles, approvals, quotas, tokens: what people read there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.wiring import open_transport


@pytest.fixture
def typed(tmp_path: Path) -> Callable[..., str]:
    def run(*words: str, given: str | None = None) -> str:
        done = CliRunner().invoke(cli, ["--home", str(tmp_path), *words], obj=Session(open_transport), input=given)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_users_say_how_they_sign_in_and_whether_they_are_refused(typed: Callable[..., str]) -> None:
    typed("users", "create", "ada", "--email", "ada@example.org", given="blue tractor on mars\n")
    typed("users", "create", "bot", "--service")
    assert rows(typed("roles", "grant", "ada", "developer", "--project", "digits"))[1][:3] == [
        "ada", "developer", "digits",
    ]  # fmt: skip
    assert rows(typed("roles", "grant", "bot", "viewer"))[1][:3] == ["bot", "viewer", "everywhere"]
    header, ada, bot = rows(typed("users"))
    assert header == ["USER", "SIGNS IN WITH", "ROLES", "GROUPS", "SINCE"]
    assert ada[:4] == ["ada", "a password", "developer:digits", "-"]
    assert bot[:3] == ["bot", "tokens", "viewer"]
    assert rows(typed("users", "disable", "ada"))[1][-1] == "disabled"
    assert rows(typed("users"))[1][-1] == "disabled"


def test_roles_say_what_they_allow(typed: Callable[..., str]) -> None:
    made = rows(typed("roles", "create", "releaser", "--allow", "model.*", "--deny", "model.register"))
    assert made == [["ROLE", "WHAT FOR", "ALLOWS", "DENIES"], ["releaser", "-", "model.*", "model.register"]]
    assert ["viewer", "looks", "reading"] in [row[:3] for row in rows(typed("roles"))]


def test_quotas_and_rules_have_units_and_no_ids(typed: Callable[..., str]) -> None:
    assert rows(typed("quotas", "set", "digits", "--storage", "50GB", "--runs", "4"))[1] == ["digits", "50GB", "4", "-"]
    assert rows(typed("approval-rules", "set", "digits", "--needed", "2"))[1][:3] == ["digits", "champion", "2"]


def test_tokens_that_are_good_no_more_say_so(typed: Callable[..., str]) -> None:
    typed("tokens", "create", "brief", "--scope", "viewer", "--expires", "0.001s")
    typed("tokens", "create", "gone", "--scope", "viewer")
    assert rows(typed("tokens", "revoke", "gone"))[1][3] == "revoked"
    assert {row[0]: row[3] for row in rows(typed("tokens"))[1:]} == {"brief": "expired", "gone": "revoked"}


def test_an_erasure_that_was_not_applied_says_what_to_do(typed: Callable[..., str]) -> None:
    typed("users", "create", "bot", "--service")
    assert "--apply does it" in typed("privacy", "erase", "bot")
    assert "--apply does it" not in typed("privacy", "erase", "bot", "--apply")
