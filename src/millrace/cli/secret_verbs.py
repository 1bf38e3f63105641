"""`millrace secrets set | rotate`, `millrace keys erase`: values come from a prompt, a pipe or a file, never argv."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from millrace.cli.derive import json_option, print_answer
from millrace.cli.session import Session
from millrace.core.errors import InputError
from millrace.core.operations import keys as key_ops
from millrace.core.operations import secrets as ops

_PROJECT = click.option("--in-project", default="default", show_default=True, help="Whose steps may name it.")
_FILE = click.option("--file", "path", type=click.Path(path_type=Path), help="Read the value from this file.")


def read_value(path: Path | None) -> str:
    """The value: of a file, asked for without showing it, or all that is piped in. One last line feed is dropped.

    Raises:
        InputError: It is not UTF-8.
    """
    if path is None and sys.stdin.isatty():
        return click.prompt("Value", hide_input=True, confirmation_prompt=True)
    try:
        text = path.read_bytes().decode() if path is not None else sys.stdin.read()
    except UnicodeDecodeError:
        raise InputError("a secret is text in UTF-8", hint="encode bytes first, for example with base64") from None
    return text.removesuffix("\n")


@click.command("set")
@click.argument("name")
@_PROJECT
@_FILE
@json_option
@click.pass_obj
def set_secret(session: Session, name: str, in_project: str, path: Path | None, as_json: bool) -> None:
    """Keep a value under a name. It is asked for, piped in, or read from a file: an argument would show in `ps`.

    \b
    Examples:
      millrace secrets set DB_PASSWORD
      millrace secrets set DB_PASSWORD --in-project digits --file password.txt
    """
    _keep(session, ops.SET_SECRET.name, name, in_project, path, as_json=as_json)


@click.command("rotate")
@click.argument("name")
@_PROJECT
@_FILE
@json_option
@click.pass_obj
def rotate_secret(session: Session, name: str, in_project: str, path: Path | None, as_json: bool) -> None:
    """Give a secret another value: steps that name it run again.

    \b
    Example:
      millrace secrets rotate DB_PASSWORD --in-project digits
    """
    _keep(session, ops.ROTATE_SECRET.name, name, in_project, path, as_json=as_json)


@click.command("erase")
@click.option("--subject", required=True, help="Whose data: what was given as data_subject when it was kept.")
@json_option
@click.pass_obj
def erase(session: Session, subject: str, as_json: bool) -> None:
    """Throw away the keys of everything that is kept as somebody's data: nobody can read it any more.

    \b
    Example:
      millrace keys erase --subject patient-4711
    """
    session.as_json = as_json
    print_answer(session, session.call(key_ops.ERASE_DATA.name, subject=subject), None)


def _keep(session: Session, operation: str, name: str, in_project: str, path: Path | None, *, as_json: bool) -> None:
    session.as_json = as_json
    answer = session.call(operation, name=name, in_project=in_project, value=read_value(path))
    print_answer(session, answer, "render_secrets")


SECRETS: tuple[click.Command, ...] = (set_secret, rotate_secret)
KEYS: tuple[click.Command, ...] = (erase,)
