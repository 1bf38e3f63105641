"""Commands derived from operations: required fields become arguments, the others options."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin

import click
import msgspec

from millrace.cli.session import Session
from millrace.core import extras
from millrace.core.operations import Operation

OPTIONS = {"to": "The folder to write into."}  # required, but clearer with their name
HELP = {
    "records_to": "postgresql://…, or home for the file in the home's folder.",
    "blobs_to": "s3://… (or az://…, gs://…), or home for the files in the home's folder.",
    "limit": "At most so many.",
    "offset": "Leave out so many.",
    "scope": "Roles, everywhere or in one project: operator:digits,viewer.",
    "expires": "How long it is good, such as 720h; for ever if nothing is said.",
    "user": "The service account that it acts for.",
    "needed": "How many others have to agree.",
    "storage": "Bytes of its blobs, such as 50GB; not bounded if nothing is said.",
    "runs": "Runs at once; not bounded if nothing is said.",
    "requests_per_s": "Requests a second of its tokens; not bounded if nothing is said.",
    "keep_key": "Make no new key: wrap with the present one what an older one wraps.",
    "in_project": "The project.",
    "project": "The project; * is all.",
    "password": "Your own password, where it is your own second factor.",
    "allow": "Operations, such as 'model.*,endpoint.deploy'.",
    "deny": "Operations that nothing else allows then.",
    "description": "What it is for.",
    "who": "A user's name, or group:NAME.",
    "reason": "Why, for the record.",
    "encrypt_key": "file:PATH or env:NAME, with 32 bytes as hex or base64.",
    "include_keys": "The home's keys too; only into an encrypted backup.",
    "include_logs": "Logs and reports too.",
    "full": "Read every row again, and say their digest.",
    "prune": "Then remove what the settings do not keep.",
    "daily": "Keep the newest of so many days.",
    "weekly": "Keep the newest of so many weeks.",
    "backup": "Which one; the newest if nothing is said.",
    "signer": "The key that may have signed it.",
    "weight": "The candidate's share of the requests, in percent.",
    "rollout": "Only this one, by its id; whichever is on if nothing is said.",
    "apply": "Do it; without, only say what would be done.",
}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
client_rate_option = click.option(
    "--client-rate", type=click.FloatRange(min=0), metavar="N", help="Requests of one client per second; 0: any number."
)
queue_s_option = click.option(
    "--queue-s", type=click.FloatRange(min=0, min_open=True), metavar="S",
    help="Nobody is let in behind so many predicted seconds of work.",
)  # fmt: skip


def derive_command(
    operation: Operation, name: str, show: str | None = None, examples: Sequence[str] = ()
) -> click.Command:
    """A click command that calls an operation.

    Args:
        operation: The verb.
        name: The command's name.
        show: The function of `cli.render` that prints the answer; `render_value` by default.
        examples: What to type after the command; by default what the operation's example requires.
    """

    def callback(as_json: bool, **values: Any) -> None:
        session: Session = click.get_current_context().obj
        session.as_json = as_json
        answer = session.call(operation.name, **values)
        print_answer(session, answer, show)

    command = click.Command(
        name, callback=callback, params=list(parameters(operation.request)), help=help_of(operation, name, examples)
    )
    return json_option(command)


def print_answer(session: Session, answer: Any, show: str | None) -> None:
    """JSON when asked for, else by a renderer."""
    if session.as_json:
        session.print_json(answer)
        return
    extras.load(f"millrace.cli.render:{show or 'render_value'}")(answer)


def help_of(operation: Operation, name: str, examples: Sequence[str] = ()) -> str:
    """The summary with an example, or the given ones."""
    noun = operation.name.split(".")[0]
    positional = [str(operation.example[field.name]) for field in msgspec.structs.fields(operation.request)
                  if field.required and field.name in operation.example]  # fmt: skip
    typed = [" ".join(["millrace", plural(noun), name, rest]).rstrip() for rest in examples or [" ".join(positional)]]
    title = "Examples" if len(typed) > 1 else "Example"
    return f"{operation.summary}\n\n\b\n{title}:\n  " + "\n  ".join(typed)


def plural(noun: str) -> str:
    """The noun of a command group.

    Example:
        >>> plural("run"), plural("system")
        ('runs', 'system')
    """
    return noun if noun == "system" else f"{noun.replace('_', '-')}s"


def parameters(request: type[Any]) -> list[click.Parameter]:
    """Arguments and options for the fields of a request."""
    found: list[click.Parameter] = []
    for field in msgspec.structs.fields(request):
        kind = _plain_type(field.type)
        if kind is None:
            continue
        if field.required and field.name in OPTIONS:
            found.append(click.Option([_flag(field.name)], required=True, help=OPTIONS[field.name]))
        elif field.required:
            found.append(click.Argument([field.name]))
        elif kind is bool:
            found.append(click.Option([_flag(field.name)], is_flag=True, help=_help(field.name)))
        else:
            default = None if field.default is msgspec.NODEFAULT else field.default
            found.append(
                click.Option([_flag(field.name)], type=kind, default=default, show_default=default not in (None, ""),
                             help=_help(field.name))
            )  # fmt: skip
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(name: str) -> str:
    return HELP.get(name) or name.replace("_", " ").capitalize() + "."


def _plain_type(kind: Any) -> Callable[..., Any] | None:
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        kind = options[0] if len(options) == 1 else None
    return kind if kind in (str, int, float, bool) else None
