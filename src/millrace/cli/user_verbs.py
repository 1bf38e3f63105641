"""`millrace users …`: verbs that ask for a password, and never take one as an argument."""

from __future__ import annotations

import sys
from typing import Any

import click

from millrace.cli.derive import json_option, print_answer
from millrace.cli.session import Session
from millrace.core.errors import DeniedError
from millrace.core.operations import users as ops


def read_password(what: str, *, is_new: bool = False) -> str:
    """A password: asked for without showing it, or the first line of what is piped in.

    Args:
        what: How people are asked.
        is_new: Ask twice.
    """
    if sys.stdin.isatty():
        return click.prompt(what, hide_input=True, confirmation_prompt=is_new)
    return sys.stdin.readline().removesuffix("\n")


@click.command()
@click.argument("name")
@click.option("--email", default="", help="An e-mail address.")
@click.option("--service", is_flag=True, help="A service account: no password, only tokens.")
@click.option("--no-password", is_flag=True, help="No password yet: `users set-password` gives one.")
@json_option
@click.pass_obj
def create(session: Session, name: str, email: str, service: bool, no_password: bool, as_json: bool) -> None:
    """Make a user, whose password is asked for, or the first line of standard input. `roles grant` says what they may.

    \b
    Examples:
      millrace users create ada --email ada@example.org
      millrace users create deploy-bot --service
    """
    session.as_json = as_json
    password = None if service or no_password else read_password("Password", is_new=True)
    answer = session.call(ops.CREATE_USER.name, name=name, email=email, service=service, password=password)
    print_answer(session, answer, "render_users")


@click.command("set-password")
@click.argument("name")
@json_option
@click.pass_obj
def set_password(session: Session, name: str, as_json: bool) -> None:
    """Give a user another password; their sessions end. For your own, the present one is asked for first.

    \b
    Example:
      millrace users set-password ada
    """
    session.as_json = as_json
    answer = _with_own(
        session, ops.SET_PASSWORD.name, "current", name, password=read_password("New password", is_new=True)
    )
    print_answer(session, answer, "render_users")


@click.command("enable-totp")
@click.argument("name")
@json_option
@click.pass_obj
def enable_totp(session: Session, name: str, as_json: bool) -> None:
    """Want a second factor: shows a secret for an app, and asks for a code of it.

    \b
    Example:
      millrace users enable-totp ada
    """
    session.as_json = as_json
    made = session.call(ops.PREPARE_TOTP.name, name=name)
    click.echo(f"secret {made.secret}\n{made.uri}\nput it into an app, then type the code that it shows", err=True)
    code = click.prompt("Code", err=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    answer = _with_own(session, ops.ENABLE_TOTP.name, "password", name, secret=made.secret, code=code)
    print_answer(session, answer, "render_users")


def _with_own(session: Session, operation: str, field: str, name: str, **values: Any) -> Any:
    """Call; where it is one's own, the present password is wanted, and asked for."""
    try:
        return session.call(operation, name=name, **values)
    except DeniedError as error:
        if "present password" not in error.message:
            raise
        present = read_password("Your present password")
        return session.call(operation, name=name, **values, **{field: present})


COMMANDS: tuple[click.Command, ...] = (create, set_password, enable_totp)
