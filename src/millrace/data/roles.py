"""What every column is for: label, feature, identifier, group, time or nothing; and the label's task."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import polars as pl

from millrace.core.errors import DataError
from millrace.core.facts import Task
from millrace.core.spec import Data
from millrace.data.infer import as_text, decide_task, is_identifier
from millrace.data.naming import did_you_mean, short
from millrace.data.rules import Fill, match_columns
from millrace.data.sources import HIDDEN, Table

LabelType = Literal["string", "integer", "number", "boolean"]
_MAX_CLASSES = 1000
_FEATURE_TYPES = ("number", "boolean", "category", "image")


class Plan(NamedTuple):
    """What the spec says of the columns, checked against the table."""

    ignored: set[str]
    given: dict[str, str]  # types that are not inferred
    pixels: list[str]  # columns that together are the image
    shape: list[int] | None  # of the image, where there is one
    required: list[str]  # rows without a value here are rejected


class Label(NamedTuple):
    """The task, the classes as text in the order of their index, and what they were."""

    task: Task
    classes: list[str]
    label_type: LabelType


class Clean(NamedTuple):
    """Rows after cleaning, with what is known of them."""

    frame: pl.DataFrame
    types: dict[str, str]
    roles: dict[str, str]
    label: Label
    plan: Plan
    fills: dict[str, Fill]
    rejected: pl.DataFrame
    counts: dict[str, int]
    warnings: list[str]

    @property
    def features(self) -> list[str]:
        """Columns that a model reads."""
        return [name for name, role in self.roles.items() if role == "feature"]

    @property
    def columns(self) -> list[str]:
        """The user's columns."""
        return list(self.roles)

    @property
    def label_column(self) -> str:
        """The label's name."""
        return next(name for name, role in self.roles.items() if role == "label")

    def shown_type(self, name: str) -> str:
        """A column's type as people see it: a label of classes is a category."""
        if self.roles[name] == "label":
            return "category" if self.label.task == "classification" else "number"
        return "ignore" if self.roles[name] == "ignored" else self.types.get(name, "ignore")


def make_plan(table: Table, data: Data) -> Plan:
    """Check every column that the spec names.

    Raises:
        DataError: A named column does not exist (with did-you-mean), or the image does not fit.
    """
    names = [column for column in table.frame.columns if column not in HIDDEN]
    if data.label not in names:
        raise DataError(
            f"data.label names column {data.label!r}, which {table.files[0]} does not have",
            hint=did_you_mean(data.label, names),
            details={"file": table.files[0], "column": data.label},
        )
    ignored = set(match_columns(data.ignore, names, "data.ignore")) if data.ignore else set()
    for column in data.types:
        match_columns([column], names, "data.types")
    ignored |= {column for column, kind in data.types.items() if kind == "ignore"}
    ignored |= table.unnamed - data.types.keys() - {data.label}
    if data.label in ignored:
        raise DataError(f"data.ignore names the label {data.label!r}: a label cannot be ignored")
    pixels = _pixels(table, data, names, ignored)
    needed = [column for column in (data.split.time, data.split.group) if column is not None]
    for column in needed:
        match_columns([column], names, "data.split")
    if data.split.key is not None:
        match_columns(data.split.key, names, "data.split.key")
    given = {column: str(kind) for column, kind in data.types.items() if kind != "ignore"}
    given |= {column: "image" for column in pixels}
    shape = list(data.image.shape) if pixels and data.image else table.image
    return Plan(ignored - set(needed), given, pixels, shape, needed + pixels)


def _pixels(table: Table, data: Data, names: list[str], ignored: set[str]) -> list[str]:
    if data.image is None or table.image is not None:
        return []
    shape = list(data.image.shape)
    others = [name for name in names if name != data.label and name not in ignored]
    pixels = match_columns(data.image.columns, others, "data.image.columns")
    if len(pixels) != math.prod(shape):
        raise DataError(
            f"data.image.shape {shape} wants {math.prod(shape)} columns, {data.image.columns!r} means {len(pixels)}",
            hint="correct the shape, or the columns",
        )
    return pixels


def assign_roles(
    frame: pl.DataFrame, types: dict[str, str], plan: Plan, data: Data
) -> tuple[dict[str, str], list[str]]:
    """A role for every column, and warnings about columns that no model will read.

    Raises:
        DataError: No feature is left.
    """
    names = [column for column in frame.columns if column not in HIDDEN]
    keys = set(match_columns(data.split.key, names, "data.split.key")) if data.split.key is not None else set()
    has_image = bool(plan.pixels) or "image" in types.values()
    roles: dict[str, str] = {}
    warnings: list[str] = []
    for name in names:
        roles[name], warning = _role(frame[name], types.get(name, "ignore"), plan, data, has_image)
        if name in keys and roles[name] == "feature" and name not in plan.given:
            roles[name] = "id"
        if warning:
            warnings.append(f"{name} {warning}")
    if "feature" not in roles.values():
        raise DataError(
            f"no column is left to learn {data.label!r} from: " + ("; ".join(warnings) or "all are ignored"),
            hint="set data.types for a column, for example {name: category}",
        )
    return roles, warnings


def _role(values: pl.Series, kind: str, plan: Plan, data: Data, has_image: bool) -> tuple[str, str | None]:
    name = values.name
    if name == data.label:
        return "label", None
    if name in (data.split.group, data.split.time):
        return ("group" if name == data.split.group else "time"), None
    if name in plan.ignored:
        return "ignored", None
    if kind == "ignore":
        return "ignored", "has no values: ignored"
    if has_image:
        return ("feature" if kind == "image" else "ignored"), None
    if name not in plan.given and is_identifier(values, kind):
        return "id", "is different in every row: ignored as an identifier"
    if kind not in _FEATURE_TYPES:
        return "ignored", f"is {kind}: not used as a feature by the models of this version"
    return "feature", None


def settle_label(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, Label]:
    """The task and the classes; a label of classes becomes integers, booleans or text.

    Raises:
        DataError: One class only, too many, or text where numbers are to be predicted.
    """
    label = frame[data.label]
    if label.dtype.is_temporal() or label.dtype == pl.Binary:
        raise DataError(f"label {data.label!r} is a date: want classes or numbers", hint="set data.types for it")
    task: Task = decide_task(label) if data.task == "auto" else data.task
    if task == "regression":
        return _numeric_label(frame, data)
    if label.dtype == pl.Float64:
        frame = frame.with_columns(as_text(data.label, label.dtype).alias(data.label))
        label = frame[data.label]
    classes = [_class_text(value) for value in label.unique().sort()]
    if len(classes) < 2:
        raise DataError(
            f"label {data.label!r} has one class only, {short(classes[0])} in all {frame.height} rows: "
            "want at least two",
            details={"column": data.label},
        )
    if len(classes) > _MAX_CLASSES:
        raise DataError(
            f"label {data.label!r} has {len(classes)} classes in {frame.height} rows: want at most {_MAX_CLASSES}",
            hint="is it an identifier or free text? name another label, or set data.task: regression",
        )
    kind: LabelType = "integer" if label.dtype == pl.Int64 else "boolean" if label.dtype == pl.Boolean else "string"
    return frame, Label("classification", classes, kind)


def _class_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _numeric_label(frame: pl.DataFrame, data: Data) -> tuple[pl.DataFrame, Label]:
    label = frame[data.label]
    if not label.dtype.is_numeric():
        raise DataError(
            f"label {data.label!r} is {'boolean' if label.dtype == pl.Boolean else 'text'} "
            f"(for example {short(label[0])}): regression wants numbers",
            hint="set data.task: classification",
        )
    if label.n_unique() < 2:
        raise DataError(f"label {data.label!r} is {label[0]} in all {frame.height} rows: nothing to predict")
    return frame, Label("regression", [], "number")
