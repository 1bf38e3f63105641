"""A run as it happens: a live view on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from millrace.cli.lines import step_line, variant_rows, verdict_line
from millrace.cli.render import console
from millrace.cli.session import is_terminal, plain
from millrace.core.operations.runs import RunEvent
from millrace.core.units import format_duration


class RunView:
    """What a terminal shows of a run: finished lines stay, the running step has a bar."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, str]] = []
        self.running: dict[str, tuple[float, float, str, float]] = {}

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for column in range(4):
            table.add_column(no_wrap=column != 2, justify="right" if column == 3 else "left")
        marks = {"succeeded": "[green]✓[/]", "cached": "[dim]=[/]", "failed": "[red]✗[/]", "cancelled": "[yellow]■[/]"}
        for name, state, text, duration in self.lines:
            table.add_row(marks.get(state, " "), name, Text(text, style="dim" if state == "cached" else ""), duration)
        for name, (done, total, text, since) in self.running.items():
            elapsed = format_duration(time.monotonic() - since)
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=total or 1.0, completed=done, width=24, pulse=not total), Text(text))
            table.add_row("[cyan]▶[/]", name, bar, elapsed)
        return table


def show_run(events: Iterator[RunEvent], spec_path: Path, *, as_json: bool) -> dict[str, Any] | None:
    """Show a run's events.

    Args:
        events: As `run.drive` yields them.
        spec_path: The spec, for the last line.
        as_json: One JSON object per line instead.

    Returns:
        The error of the run, or None.
    """
    facts: dict[str, dict[str, Any]] = {}
    end: RunEvent | None = None
    view = RunView() if is_terminal() and not as_json else None
    live = Live(view, console=console(), refresh_per_second=8) if view is not None else nullcontext()
    with live:
        for event in events:
            if as_json:
                click.echo(json.dumps(plain(event)))
            elif view is not None:
                update_view(view, event, facts)
            else:
                print_event(event, facts)
            if event.kind == "step" and event.facts:
                facts[event.step] = event.facts
            end = event if event.kind == "end" else end
    if end is None:
        return None
    if not as_json and end.state == "succeeded":
        print_end(end, facts, spec_path)
    return end.error


def framework_of(facts: dict[str, dict[str, Any]]) -> str:
    """The framework, for the export line."""
    return str(facts.get("train", {}).get("framework", "torch"))


def update_view(view: RunView, event: RunEvent, facts: dict[str, dict[str, Any]]) -> None:
    """Apply an event to the live view."""
    if event.kind == "progress":
        since = view.running.get(event.step, (0, 0, "", time.monotonic()))[3]
        view.running[event.step] = (event.done, event.total, event.text, since)
    elif event.kind == "step" and event.state == "running":
        view.running[event.step] = (0.0, 0.0, event.text, time.monotonic())
    elif event.kind == "step":
        view.running.pop(event.step, None)
        duration = format_duration(event.duration_s) if event.duration_s >= 0.05 else ""
        view.lines.append((event.step, event.state, event_text(event, facts), duration))


def event_text(event: RunEvent, facts: dict[str, dict[str, Any]]) -> str:
    """The line of a step that ended."""
    if event.state in ("succeeded", "cached"):
        text = step_line(event.step, event.facts, framework_of({**facts, event.step: event.facts}))
        return f"{text} (cached)" if event.state == "cached" else text
    if event.state == "failed" and event.error:
        return f"FAILED: {event.error['message'].splitlines()[0]}"
    return event.state


def print_event(event: RunEvent, facts: dict[str, dict[str, Any]]) -> None:
    """One plain line for a step that ended."""
    if event.kind != "step" or event.state in ("running", "pending", "skipped"):
        return
    duration = f"   {format_duration(event.duration_s)}" if event.duration_s >= 0.5 else ""
    click.echo(f" {event.step:<9} {event_text(event, facts)}{duration}")


def print_end(end: RunEvent, facts: dict[str, dict[str, Any]], spec_path: Path) -> None:
    """The table of variants, what is served, where the report is, what to do next."""
    compress = facts.get("compress")
    if compress and compress.get("variants"):
        rows = variant_rows(compress, facts.get("evaluate"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        click.echo(verdict_line(compress))
    folder = os.path.relpath(spec_path.parent)
    model = facts.get("register", {}).get("model")
    parts = [f"report {_shown(end.report_path)}"] if end.report_path else []
    if model:
        step = "" if folder == "." else f"cd {folder} && "
        parts.append(f"next: {step}millrace serve {model}")
    if parts:
        click.echo("    ".join(parts))


def _shown(place: str) -> str:
    """A report's path from here, or its page on a server."""
    return place if place.startswith("http") else os.path.relpath(place)
