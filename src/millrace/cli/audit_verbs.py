"""`millrace system audit …` and `millrace privacy …`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import derive_command, json_option
from millrace.cli.session import EXIT_CODES, Session, plain
from millrace.core import extras
from millrace.core.csv_cells import safe_cell
from millrace.core.errors import CorruptError, InputError
from millrace.core.operations import audit as ops

RENDER = "millrace.cli.render"
MOST_CHARACTERS = 16 << 20  # of heads in one request
_COLUMNS = ("seq", "at", "actor", "verb", "subject", "detail", "commitment", "chain")
_FILTERS = (
    click.option("--since", metavar="TIME", help="From this time on: a date, a time, or an age such as 24h."),
    click.option("--until", metavar="TIME", help="Up to this time."),
    click.option("--subject", default="", help="On what, for example model:digits; may end with *."),
    click.option("--actor", default="", help="Who, for example user:ada; may end with *."),
    click.option("--verb", default="", help="What was done, for example model.promote; may end with *."),
)


def _filtered(command: Any) -> Any:
    for option in reversed(_FILTERS):
        command = option(command)
    return command


@click.group("audit", short_help="What happened, and that nobody rewrote it.")
def audit() -> None:
    """What happened, and that nobody rewrote it.

    \b
    Examples:
      millrace system audit verify
      millrace system audit search --actor user:ada --since 24h
    """


@audit.command()
@click.option("--heads", metavar="FILE", help="Published heads, or an export: what they say is checked too.")
@click.option("--proof", metavar="FILE", help="Check this proof instead; needs no events.")
@json_option
@click.pass_obj
def verify(session: Session, heads: str | None, proof: str | None, as_json: bool) -> None:
    """Check that every event is as it was sealed. Exit code 0 only if so, else 8, and it says where it breaks.

    \b
    Examples:
      millrace system audit verify
      millrace system audit verify --heads /mnt/worm/heads.jsonl
      millrace system audit verify --proof event-17.json --heads heads.jsonl
    """
    session.as_json = as_json
    kept = _few(_read(heads)) if heads else ""
    if proof:
        checked = session.call(ops.CHECK_PROOF.name, proof=_read(proof), heads=kept)
        if as_json:
            session.print_json(checked)
        else:
            click.echo(f"event {checked.event} ({checked.actor} {checked.verb} {checked.subject}) is among the "
                       f"{checked.size} events whose head {checked.key} signed")  # fmt: skip
        return
    report = session.call(ops.VERIFY.name, heads=kept)
    if as_json:
        session.print_json(report)
    else:
        _print_report(report)
    if not report.is_whole:
        click.get_current_context().exit(EXIT_CODES[CorruptError.code])


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is no text: want lines of JSON") from None


def _few(text: str) -> str:
    """Heads of a long file, as many as a request takes: some of all ages, and the last."""
    if len(text) < MOST_CHARACTERS:
        return text
    lines = [line for line in text.splitlines() if line[:1] == "{" and line[-1:] == "}" and '"signature"' in line]
    step = 1 + sum(map(len, lines)) // MOST_CHARACTERS
    return "\n".join(lines[::-1][::step][::-1])


def _print_report(report: Any) -> None:
    rows = [[_places(one), one.problem, one.explanation] for one in report.breaks]
    if rows:
        extras.load(f"{RENDER}:print_table")(["EVENT", "PROBLEM", "WHAT"], rows)
    erased = f", {report.erased} of them without their erased detail" if report.erased else ""
    click.echo(f"{'whole' if report.is_whole else 'NOT WHOLE'}: {report.events} events{erased}")
    if report.heads:
        heads = "1 signed head" if report.heads == 1 else f"{report.heads} signed heads"
        proven = (
            f"the last that holds is over {report.proven} events"
            if report.proven
            else "none of the events that are here"
        )
        click.echo(f"{heads}, {proven}, by {', '.join(report.keys)}")
    else:
        click.echo("no signed head: who can write the records can rewrite all of them (`millrace up` signs heads)")
    if report.unsealed:
        click.echo(f"{report.unsealed} events wait to be sealed")


def _places(one: Any) -> str:
    return str(one.first) if one.first == one.last else f"{one.first}-{one.last}"


@audit.command()
@_filtered
@click.option("--csv", "as_csv", is_flag=True, help="A table for spreadsheets; no cell is a formula.")
@json_option
@click.pass_obj
def export(session: Session, as_csv: bool, as_json: bool, **wanted: Any) -> None:
    """Write events with their details, and the signed heads, as lines of JSON.

    \b
    Examples:
      millrace system audit export > audit.jsonl
      millrace system audit export --verb 'model.*' --since 2026-01-01 --csv > promotions.csv
    """
    if as_csv and as_json:
        raise InputError("want --csv or --json, not both")
    lines = session.stream(ops.EXPORT.name, **wanted)
    if as_csv:
        _write_csv(lines)
        return
    for line in lines:
        click.echo(json.dumps(plain(line.event or line.head), ensure_ascii=False))


def _write_csv(lines: Iterator[Any]) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(_COLUMNS)
    for line in lines:
        if line.event is not None:
            event = plain(line.event)
            event["detail"] = json.dumps(event["detail"], ensure_ascii=False)
            writer.writerow([safe_cell(event[name]) for name in _COLUMNS])


@audit.command()
@click.argument("event", type=int)
@click.option("--since", type=int, metavar="SIZE", help="Also prove that the head grew out of one over SIZE events.")
@click.option("--with-detail", is_flag=True, help="Show the event's detail too.")
@json_option
@click.pass_obj
def prove(session: Session, event: int, since: int | None, with_detail: bool, as_json: bool) -> None:
    """Prove by a signed head that an EVENT, by its number, happened. Always JSON: others check it without the events.

    \b
    Examples:
      millrace system audit prove 17 > event-17.json
      millrace system audit prove 17 --since 12
    """
    session.as_json = as_json
    session.print_json(session.call(ops.PROVE.name, event=event, since=since, with_detail=with_detail))


@audit.command()
@_filtered
@click.option("--text", default="", help="Stands anywhere in the event.")
@click.option("--before", type=int, metavar="EVENT", help="The page after this event, the last of the page before.")
@click.option("--limit", type=int, default=100, show_default=True, help="At most so many.")
@json_option
@click.pass_obj
def search(session: Session, as_json: bool, **wanted: Any) -> None:
    """Find events, the newest first.

    \b
    Examples:
      millrace system audit search --actor user:ada --since 24h
      millrace system audit search --text champion --before 1200
    """
    session.as_json = as_json
    found = session.call(ops.SEARCH.name, **wanted)
    if as_json:
        session.print_json(found)
        return
    if not found:
        click.echo("no such event")
        return
    when = extras.load(f"{RENDER}:when")
    rows = [
        [one.seq, when(one.at), one.actor, one.verb, one.subject, (one.detail or {}).get("outcome", "erased")]
        if isinstance(one.detail, dict | None)
        else [one.seq, when(one.at), one.actor, one.verb, one.subject, "altered"]
        for one in found
    ]
    extras.load(f"{RENDER}:print_table")(["EVENT", "WHEN", "ACTOR", "VERB", "SUBJECT", "OUTCOME"], rows)
    if len(found) == wanted["limit"]:
        click.echo(f"older ones: --before {found[-1].seq}")


@audit.command()
@click.option("--days", type=float, required=True, help="Keep the details of so many days.")
@click.option("--apply", is_flag=True, help="Do it; otherwise only count.")
@json_option
@click.pass_obj
def retention(session: Session, days: float, apply: bool, as_json: bool) -> None:
    """Erase the details of old events, for good. The events stay, and verify.

    \b
    Examples:
      millrace system audit retention --days 365
      millrace system audit retention --days 365 --apply
    """
    session.as_json = as_json
    erased = session.call(ops.RETAIN.name, days=days, apply=apply)
    if as_json:
        session.print_json(erased)
        return
    what = "erased" if erased.applied else "would be erased (--apply does it)"
    click.echo(f"{erased.details} details of events up to {erased.last_event} {what}")


@click.group("privacy", short_help="What is here about somebody; erase it.")
def privacy() -> None:
    """What is here about somebody, and erasing it.

    \b
    Examples:
      millrace privacy export ada
      millrace privacy erase ada
    """


@privacy.command("export")
@click.argument("subject")
@json_option
@click.pass_obj
def export_subject(session: Session, subject: str, as_json: bool) -> None:
    """Write everything about SUBJECT, a user's name or another one, as JSON; without secrets and their hashes.

    \b
    Example:
      millrace privacy export ada > ada.json
    """
    session.as_json = as_json
    session.print_json(session.call(ops.EXPORT_SUBJECT.name, subject=subject))


_erase = derive_command(ops.ERASE_SUBJECT, "erase", "render_erasure")
_erase.help = """Erase what events say about SUBJECT, and give the user a pseudonym; the events verify afterwards.

Without --apply it only says what would be done.

\b
Examples:
  millrace privacy erase ada
  millrace privacy erase ada --apply
"""
privacy.add_command(_erase)
COMMANDS: tuple[click.Command, ...] = (privacy,)
