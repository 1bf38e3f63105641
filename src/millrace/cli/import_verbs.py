"""`millrace import`: other programs' stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import json_option
from millrace.cli.session import Session
from millrace.core import extras
from millrace.core.errors import InputError
from millrace.core.settings import find_home, resolve_settings
from millrace.core.units import format_size


@click.group("import", short_help="Bring runs and models of another program over.")
def import_group() -> None:
    """Bring runs and models of another program over.

    \b
    Example:
      millrace import mlflow http://127.0.0.1:5000
    """


@import_group.command()
@click.argument("source")
@click.option("--experiment", "experiments", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--artifacts", metavar="FOLDER", help="Where the files of runs are, if not beside the store.")
@click.option("--dry-run", is_flag=True, help="Only say what would come.")
@json_option
@click.pass_obj
def mlflow(
    session: Session, source: str, experiments: tuple[str, ...], artifacts: str | None, dry_run: bool, as_json: bool
) -> None:
    """Bring an MLflow store over: SOURCE is its server's URL, its SQLite database, or the folder of a file store.

    Runs keep their ids: what is here already is passed over, so an import that was stopped can be started again.

    \b
    Examples:
      millrace import mlflow http://127.0.0.1:5000
      millrace import mlflow sqlite:///mlflow.db
      millrace import mlflow ./mlruns --experiment churn --dry-run
    """
    session.as_json = as_json
    if not source.startswith(("http://", "https://")):
        _refuse_remote(session, source)
        source = _absolute(source)
    answer = session.stream(
        "system.import_mlflow", source=source, experiments=list(experiments), dry_run=dry_run,
        artifacts=str(Path(artifacts).absolute()) if artifacts else None,
    )  # fmt: skip
    problems: list[str] = []
    counts: dict[str, Any] = {}
    for event in answer:
        counts = event.counts
        if event.kind == "problem":
            problems.append(event.text)
        if not as_json:
            _tell(event)
    if as_json:
        session.print_json({"counts": counts, "problems": problems, "dry_run": dry_run})


def _absolute(source: str) -> str:
    """A path as the server, which works in another folder, finds it.

    Example:
        >>> _absolute("sqlite:////a/mlflow.db"), _absolute("file:///a"), _absolute("mysql://host/a")
        ('sqlite:////a/mlflow.db', '/a', 'mysql://host/a')
    """
    scheme, mark, path = source.partition("://")
    if scheme == "sqlite" and path.startswith("/"):
        return f"sqlite:///{Path(path[1:]).absolute()}"
    return source if mark and scheme != "file" else str(Path(path or source).absolute())


def _refuse_remote(session: Session, source: str) -> None:
    """A folder here means nothing to a server elsewhere."""
    url = None if session.embedded else resolve_settings(home=_home(session))["url"].value
    if url:
        raise InputError(
            f"the server {url} cannot read the folder {source} of this machine",
            hint="serve it with `mlflow server` and import its URL, or run this on the server's machine in its home",
        )


def _home(session: Session) -> Path:
    return Path(session.home).absolute() if session.home else find_home(Path.cwd())


def _tell(event: Any) -> None:
    if event.kind == "problem":
        click.echo(f"  not brought over  {event.text}", err=True)
    elif event.kind == "done":
        rows = [[name, format_size(number) if name == "bytes" else number] for name, number in event.counts.items()]
        extras.load("millrace.cli.render:print_table")(["WHAT", "COUNT"], rows)
        if event.text:
            click.echo(event.text)
    else:
        click.echo(f"  {event.text}")


COMMANDS: tuple[click.Command, ...] = (import_group,)
