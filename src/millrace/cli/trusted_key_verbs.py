"""`millrace trusted-keys add`: the key comes from a file of whoever types it, or from a pipe."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from millrace.cli.derive import json_option, print_answer
from millrace.cli.session import Session
from millrace.core.errors import InputError, NotFoundError
from millrace.core.operations import trusted_keys as ops

MAX_BYTES = 4096


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", default="", help="Whose it is, for people.")
@click.option("--not-before", metavar="DAY", help="It counts from then on, for example 2027-01-31.")
@click.option("--not-after", metavar="DAY", help="It counts until then.")
@json_option
@click.pass_obj
def add(session: Session, file: Path, name: str, not_before: str | None, not_after: str | None, as_json: bool) -> None:
    """Trust a public key, of a file or (with -) of standard input: models that it has signed are opened.

    \b
    Examples:
      millrace trusted-keys add /srv/fraud/.millrace/keys/signing.pub --name "the team of fraud"
      millrace trusted-keys add partner.pub --not-after 2027-12-31
    """
    session.as_json = as_json
    pem = read_public(file)
    times = {"not_before": not_before, "not_after": not_after}
    print_answer(session, session.call(ops.ADD_TRUSTED_KEY.name, pem=pem, name=name, **times), None)


def read_public(file: Path) -> str:
    """The text of a public key; a private one is not sent anywhere.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no small text, or a private key.
    """
    if str(file) != "-" and not file.is_file():
        raise NotFoundError(f"there is no file {file}", hint="want the signer's keys/signing.pub")
    if str(file) == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES or not data.isascii():
        raise InputError(f"{file} is no public key as PEM", hint="want the signer's keys/signing.pub")
    if b"PRIVATE KEY" in data:
        raise InputError(f"{file} is a private key, which stays where it is", hint="want keys/signing.pub beside it")
    return data.decode()


COMMANDS: tuple[click.Command, ...] = (add,)
