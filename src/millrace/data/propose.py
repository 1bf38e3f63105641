"""A first `millrace.yaml` for a stranger's file: what `millrace init --data FILE --label L` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl

from millrace.core.errors import DataError, InputError
from millrace.core.spec import CleanRule, Data, DropDuplicates
from millrace.data.builtin import builtin_of
from millrace.data.naming import did_you_mean
from millrace.data.prepare import clean_table
from millrace.data.roles import Clean
from millrace.data.sources import FILE, ROW, SPLIT, Table, read_source

_PLAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_.-]*$")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_ENCODINGS = ("utf-8", "cp1252", "latin-1")
LINES = 12
# Said where the table leaves room, most useful first: without them the same happens.
_DEFAULTS = ("serve: {port: 8080}", "monitor: {false_alarms: 2%}", "evaluate: {confidence: 0.95}")


def quote(text: str) -> str:
    """A text as YAML: plain where that is safe in every version, else in double quotes.

    Example:
        >>> quote("churn.csv"), quote("no"), quote("a: b")
        ('churn.csv', '"no"', '"a: b"')
    """
    if _PLAIN.match(text) and text.lower() not in _WORDS:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def project_name(file: Path) -> str:
    """A project's name from a file's: lower case, only letters, digits, dots, dashes and underscores.

    Example:
        >>> project_name(Path("My Churn (2024).csv.gz")), project_name(Path("数据.csv"))
        ('my-churn-2024', 'project')
    """
    stem = file.name.split(".")[0].lower()
    return re.sub(r"[^a-z0-9_]+", "-", stem).strip("-_")[:48] or "project"


def propose(file: Path, label: str, project_dir: Path | None = None) -> str:
    """A spec of twelve lines: the label, the task, what is ignored, and types where the guess was close.

    What a table needs said (an encoding, columns to ignore, types) takes the place of lines that only
    show defaults.

    Args:
        file: The data: anything that `data.source` may name.
        label: The column to predict.
        project_dir: Where the spec will stand (default: the current folder); the source is written
            relative to it where it lies inside.

    Returns:
        The text of a `millrace.yaml`.

    Raises:
        InputError: There is no such column (with did-you-mean), or no such file.
        DataError: The file cannot be read, or nothing can be learnt from it.

    Example:
        >>> propose(Path("nowhere.csv"), "y")
        Traceback (most recent call last):
        millrace.core.errors.InputError: nowhere.csv does not exist
    """
    base = (project_dir or Path.cwd()).resolve()
    builtin = builtin_of(str(file))
    source = str(file) if builtin else _source_of(file, base)
    table, encoding = _read(source, label, base)
    names = [column for column in table.frame.columns if column not in (FILE, ROW, SPLIT)]
    if label not in names:
        raise InputError(f"{file.name} has no column {label!r}", hint=did_you_mean(label, names))
    rules = [] if table.image else [CleanRule(drop_duplicates=DropDuplicates())]
    clean = clean_table(table, Data(source=source, label=label, encoding=encoding, clean=rules))
    return _text(project_name(Path(builtin or file)), source, encoding, clean, table)


def _source_of(file: Path, base: Path) -> str:
    """How the spec names a file."""
    place = file.resolve()
    if not place.exists():
        raise InputError(f"{file} does not exist", hint="name a CSV, Parquet, JSONL or .npz file, or builtin:iris")
    return place.relative_to(base).as_posix() if place.is_relative_to(base) else place.as_posix()


def _read(source: str, label: str, base: Path) -> tuple[Table, str]:
    for encoding in _ENCODINGS:
        try:
            return read_source(Data(source=source, label=label, encoding=encoding), base), encoding
        except DataError as error:
            if error.details.get("problem") != "encoding":
                raise
    raise InputError(f"{source} is text in none of {', '.join(_ENCODINGS)}", hint="convert it to utf-8")


def _text(name: str, source: str, encoding: str, clean: Clean, table: Table) -> str:
    label = clean.label_column
    ignored = [column for column, role in clean.roles.items() if role in ("id", "ignored")]
    types = _close_guesses(clean)
    data = [f"  source: {quote(source)}", f"  label: {quote(label)}"]
    if encoding != "utf-8":
        data.append(f"  encoding: {encoding}")
    data.append(f"  task: {clean.label.task}   # {_label_note(clean)}")
    if ignored:
        data.append(f"  ignore: [{', '.join(quote(column) for column in ignored)}]")
    if types:
        data.append(f"  types: {{{', '.join(f'{quote(column)}: {kind}' for column, kind in types.items())}}}")
    duplicates = "" if table.image else "drop_duplicates, "
    data.append(f"  clean: [{duplicates}{{drop_missing: {quote(label)}}}]")
    lines = [
        f"project: {quote(name)}",
        "data:",
        *data,
        "train: {model: auto, seed: 0}",
        "compress: {variants: auto, max_changed: 5%}",
        f"register: {{model: {quote(name)}, alias: champion, promote_if: not_worse}}",
    ]
    return "\n".join([*lines, *_DEFAULTS[: LINES - len(lines)]]) + "\n"


def _close_guesses(clean: Clean) -> dict[str, str]:
    """Columns whose type the values do not all share: said openly, so that the user can correct it."""
    refused = clean.rejected.filter(pl.col("rule") == "types")["column"].drop_nulls().unique().sort()
    return {column: clean.types[column] for column in refused if column in clean.types and column != clean.label_column}


def _label_note(clean: Clean) -> str:
    values = clean.frame[clean.label_column]
    if clean.label.task == "regression":
        return f"{values.len()} rows, {values.min():g} to {values.max():g}"
    counted = dict(values.cast(pl.String).value_counts().iter_rows())
    shares = [f"{quote(name)[:24]} {counted[name] / values.len() * 100:.0f} %" for name in clean.label.classes[:3]]
    more = ", …" if len(clean.label.classes) > 3 else ""
    return f"{len(clean.label.classes)} classes: {', '.join(shares)}{more}"
