"""`millrace models dossier`, `millrace runs sbom`: what others ask for, on the screen or as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import json_option
from millrace.cli.session import Session, plain
from millrace.core.dossier import NOT_RECORDED
from millrace.core.errors import InputError
from millrace.core.operations import compliance as ops


@click.command()
@click.argument("model")
@click.option("--to", type=click.Path(path_type=Path), help="A folder for dossier.html and dossier.json.")
@json_option
@click.pass_obj
def dossier(session: Session, model: str, to: Path | None, as_json: bool) -> None:
    """Everything recorded of a model version, by the headings of the EU AI Act's technical documentation.

    \b
    Examples:
      millrace models dossier digits@champion
      millrace models dossier digits@3 --to dossier
    """
    session.as_json = as_json
    answer = session.call(ops.DOSSIER.name, model=model, html=to is not None)
    if to is not None:
        written = [_write(to / "dossier.html", answer.html), _write(to / "dossier.json", _text(plain(answer.dossier)))]
        if not as_json:
            click.echo("\n".join(str(path) for path in written))
    if as_json:
        session.print_json(answer.dossier)
    elif to is None:
        _print_headings(answer)


def _print_headings(answer: ops.DossierAnswer) -> None:
    """Each point: what is there, and what people still have to write."""
    model = answer.dossier.model
    click.echo(f"{model.name} v{model.version}, by the headings of {answer.dossier.regulation}")
    for heading in answer.dossier.headings:
        click.echo(f"\n{heading.point}. {heading.title}")
        there = [part for part in heading.parts if getattr(answer.dossier, part) is not None]
        if there:
            click.echo(f"   recorded: {', '.join(there)}")
        if heading.text:
            click.echo("   written by the provider")
        if heading.missing:
            click.echo(f"   {NOT_RECORDED}:")
        for item in heading.missing:
            click.echo(f"     {item}")


@click.command()
@click.argument("run")
@click.option("--to", type=click.Path(path_type=Path), help="A file to write instead of the screen.")
@json_option
@click.pass_obj
def sbom(session: Session, run: str, to: Path | None, as_json: bool) -> None:
    """The packages that a run was made with, as CycloneDX 1.6 JSON. Needs the extra `sbom` where the home is.

    \b
    Examples:
      millrace runs sbom last
      millrace runs sbom last --to sbom.cdx.json
    """
    session.as_json = as_json
    document = session.call(ops.SBOM.name, run=run)
    if to is not None:
        click.echo(str(_write(to, _text(document))), err=as_json)
    if to is None or as_json:
        session.print_json(document)


def _text(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str | None) -> Path:
    """Make a file anew.

    Raises:
        InputError: It cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", hint="name another place") from None
    return path


MODELS: tuple[click.Command, ...] = (dossier,)
RUNS: tuple[click.Command, ...] = (sbom,)
