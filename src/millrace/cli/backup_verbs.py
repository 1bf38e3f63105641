"""`millrace system backup | backups | verify | restore | drill | prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import json_option, parameters, print_answer
from millrace.cli.session import Session
from millrace.core.errors import CorruptError
from millrace.core.operations import Operation
from millrace.core.operations import backup as ops

_PLACES = {"to": "TO", "source": "FROM"}
_EXAMPLES = {
    "backup": ("/srv/backups", "s3://bucket/backups --encrypt-key file:backup.key --include-keys"),
    "backups": ("/srv/backups",),
    "verify": ("/srv/backups", "s3://bucket/backups --encrypt-key env:BACKUP_KEY"),
    "restore": ("/srv/backups --signer ed25519:66687aadf862bd776c8fc18b8e9f8e20",),
    "drill": ("/srv/backups",),
    "prune": ("/srv/backups --daily 7 --weekly 4",),
}


def commands() -> list[click.Command]:
    """The commands of the group `system` that are about backups."""
    return [_command(operation) for operation in ops.OPERATIONS]


def _command(operation: Operation) -> click.Command:
    name = operation.name.partition(".")[2]
    field = "source" if issubclass(operation.request, ops.BackupSource) else "to"

    def callback(as_json: bool, **values: Any) -> None:
        session: Session = click.get_current_context().obj
        session.as_json = as_json
        if values[field] is not None:
            values[field] = _absolute(values[field])
            session.embedded = True  # paths and keys are of this machine and this person
        answer = session.call(operation.name, **values)
        print_answer(session, answer, f"render_{name}" if name == "backups" else None)
        problems = getattr(answer, "problems", [])
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CorruptError(
                f"the backup is not whole: {problems[0]}{more}", hint="remove the damaged objects, and back up again"
            )

    options = [one for one in parameters(operation.request) if one.name != field]
    place = click.Argument([field], required=False, metavar=f"[{_PLACES[field]}]")
    examples = "\n".join(f"  millrace system {name} {one}" for one in _EXAMPLES[name])
    where = f"{_PLACES[field]}: a folder, or s3://bucket/prefix; the setting backup_to when absent."
    text = f"{operation.summary}\n\n{where}\n\n\b\nExamples:\n{examples}"
    return json_option(click.Command(name, callback=callback, params=[place, *options], help=text))


def _absolute(text: str) -> str:
    return text if "://" in text else str(Path(text).expanduser().absolute())
