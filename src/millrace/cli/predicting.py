"""Answers for files of rows: shown, in one file, or in a folder of parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from millrace.batch import job as batch_job
from millrace.batch.files import predict_file as answer_file
from millrace.batch.files import write_file
from millrace.batch.parts import PART_ROWS
from millrace.cli.render import console
from millrace.cli.session import is_terminal
from millrace.core.errors import InputError
from millrace.core.operations.registry import OpenModelResponse
from millrace.formats.bundle import Bundle, open_bundle

SHOWN_ROWS = 20
_LINE_S = 5.0
_FILE_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def is_folder(output: str, inputs: list[str]) -> bool:
    """Whether the answers go into a folder of parts rather than into one file.

    Example:
        >>> is_folder("out/", ["a.csv"]), is_folder("out", ["a.csv"]), is_folder("answers.csv", ["a.csv"])
        (True, True, False)
    """
    several = len(inputs) > 1 or any(sign in inputs[0] for sign in "*?[") or Path(inputs[0]).is_dir()
    return several or output.endswith(("/", os.sep)) or Path(output).is_dir() or not Path(output).suffix


def predict_file(opened: OpenModelResponse, path: Path) -> list[dict[str, Any]]:
    """Answers in the order of the rows, each a dict with `label` and `probabilities`, or `value`."""
    return list(answer_file(_bundle(opened), opened.variant, path))


def first_answers(opened: OpenModelResponse, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The first answers, and how many there are in all."""
    answers = answer_file(_bundle(opened), opened.variant, path)
    first = list(islice(answers, SHOWN_ROWS))
    return first, len(first) + sum(1 for _ in answers)


def _bundle(opened: OpenModelResponse) -> Bundle:
    return open_bundle(Path(opened.folder), signature=None, verifier=None, expected_digest=opened.digest)


def predict_to_file(opened: OpenModelResponse, paths: list[str], output: Path, options: dict[str, Any]) -> int:
    """Write the answers of one file into one file, whole or not at all; how many there are."""
    if options["on_error"] != "fail" or options["part_rows"] or options["workers"]:
        raise InputError(
            f"--on-error skip, --part-rows and --workers are for a folder of parts; {output} is one file",
            hint="name a folder: --output answers/",
        )
    kind = options["format"] or _FILE_FORMATS.get(output.suffix.lower(), "csv")
    return write_file(_bundle(opened), opened.variant, Path(paths[0]), output, kind)


def predict_to_folder(
    opened: OpenModelResponse, inputs: list[str], output: str, options: dict[str, Any], *, as_json: bool
) -> batch_job.Summary:
    """Write the answers of any number of files into a folder of parts, with a bar that shows how far it is."""
    job = batch_job.BatchJob(
        folder=opened.folder, digest=opened.digest, variant=opened.variant, inputs=inputs, output=output,
        format=options["format"] or "parquet", part_rows=options["part_rows"] or PART_ROWS,
        on_error=options["on_error"], workers=options["workers"],
    )  # fmt: skip
    with showing(as_json=as_json) as show:
        return batch_job.run_batch(job, show)


@contextmanager
def showing(*, as_json: bool) -> Iterator[Callable[[batch_job.Progress], None]]:
    """What shows how far a job is: a bar on a terminal, a line now and then elsewhere."""
    if is_terminal() and not as_json:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task("", total=1.0, text="")
            yield lambda one: bar.update(task, completed=one.share, text=_text(one))
        return
    lines = _Lines()
    yield lines.show


class _Lines:
    """A line on stderr every few seconds, where there is no terminal to draw on."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def show(self, progress: batch_job.Progress) -> None:
        """Say how far it is, if it is time."""
        if time.monotonic() - self._at >= _LINE_S:
            self._at = time.monotonic()
            click.echo(f"{progress.share:4.0%}  {_text(progress)}", err=True)


def _text(progress: batch_job.Progress) -> str:
    rejected = f", {progress.rejected:,} rejected" if progress.rejected else ""
    return f"{progress.rows:,} rows, {progress.parts} parts{rejected}"


def render_summary(summary: batch_job.Summary, model: str) -> None:
    """What was done, where it is, and what was left out."""
    resumed = f", {summary.resumed} of them were there before" if summary.resumed else ""
    click.echo(
        f"{summary.rows - summary.rejected:,} answers of {model} -> {summary.output}  "
        f"({_counted(summary.parts, 'part')} of {_counted(summary.files, 'file')}{resumed})"
    )
    if summary.resumed < summary.parts:
        click.echo(f"{summary.rows_per_s:,.0f} rows/s, {summary.seconds:.1f} s, {_counted(summary.workers, 'worker')}")
    if summary.rejected:
        click.echo(f"{summary.rejected:,} rows have no answer: {Path(summary.output) / batch_job.REJECTED}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
