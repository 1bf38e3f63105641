"""The runs: a table that is filtered, sorted, paged and laid out by its URL alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from starlette.requests import Request

from millrace.api.mlflow.filters import LISTS, NUMERIC, TEXT, TEXT_OR_NULL, Language, parse_filter
from millrace.api.pages.live import last_event
from millrace.api.pages.rendering import Page, number, text, with_query
from millrace.control.dispatch import Dispatcher
from millrace.control.services import Services
from millrace.core.errors import InputError
from millrace.core.search import RUN_ATTRIBUTES, Comparison, Field, FoundRun, Ordering, RunQuery, RunValues
from millrace.core.states import RUN_TRANSITIONS
from millrace.core.types import Project, Run, Struct

SIZES = (50, 100, 250, 500)
MOST_PAGES = 1_000_000
MOST_CHOICES = 200  # columns offered in the menu
Kind = Literal["text", "number"]
_TEXTS: tuple[tuple[str, Kind], ...] = (("id", "text"), ("name", "text"), ("state", "text"), ("created_by", "text"))
_TIMES: tuple[tuple[str, Kind], ...] = (("created_at", "number"), ("started_at", "number"), ("ended_at", "number"))
LANGUAGE = Language(
    attributes={name: (name, kind) for name, kind in (*_TEXTS, *_TIMES)},
    operators={
        "attribute": (*TEXT, *LISTS),
        "metric": NUMERIC,
        "param": TEXT_OR_NULL,
        "tag": TEXT_OR_NULL,
        "dataset": (*TEXT, *LISTS),
    },
    lists=frozenset({"id", "name", "state"}),
)
_FIELDS: dict[str, Field] = {"metrics": "metric", "params": "param", "tags": "tag"}
_WORD = re.compile(r"[\w.:/ -]+")


class TableState(Struct, frozen=True, kw_only=True):
    """What the URL says of the table. No columns: those that tell the runs apart."""

    q: str = ""
    project: str = ""
    state: str = ""
    sort: str = "-started_at"
    columns: tuple[str, ...] = ()
    page: int = 1
    size: int = SIZES[1]

    def url(self, **changes: Any) -> str:
        """The table's URL with some changes; what is as always is left out.

        Example:
            >>> TableState(q="metrics.acc > 0.9", page=3).url(sort="name", page=1)
            '/runs?q=metrics.acc+%3E+0.9&sort=name'
        """
        values = {name: getattr(self, name) for name in self.__struct_fields__} | changes
        standard = TableState()
        pairs = {name: value for name, value in values.items() if value != getattr(standard, name)}
        if "columns" in pairs:
            pairs["column"] = list(pairs.pop("columns"))
        return with_query("/runs", pairs)


class Column(NamedTuple):
    """A column with a metric, parameter or tag: `name` as in URLs, `metrics.acc`."""

    name: str
    field: Field
    key: str


def show(dispatcher: Dispatcher, request: Request) -> Page:
    """The page."""
    state = read_state(request)
    query = to_query(state)
    found, since = dispatcher.perform("run.list", "project:default", lambda services: _found(services, query))
    projects = dispatcher.perform("project.list", "project:default", _projects) | {one.run.project for one in found}
    has_more, found = len(found) > state.size, found[: state.size]
    known = choices(found)
    columns = [to_column(name) for name in state.columns] or likely_columns(found)
    chosen = {column.name for column in columns}
    context = {
        "state": state,
        "rows": [row_of(one, columns) for one in found],
        "columns": columns,
        "choices": sorted({*known, *chosen}, key=_by_kind)[:MOST_CHOICES],
        "chosen": chosen,
        "projects": sorted(projects | {state.project} - {""}),
        "states": list(RUN_TRANSITIONS),
        "sizes": SIZES,
        "has_more": has_more,
        "first": (state.page - 1) * state.size + 1,
        "since": since,
        "is_filtered": bool(state.q or state.project or state.state),
    }
    return Page(template="runs.html", section="runs", title="Runs", context=context)


def _found(services: Services, query: RunQuery) -> tuple[list[FoundRun], int]:
    since = last_event(services)  # before the search, so that nothing falls between the two
    return services.records.search_runs(query), since


def _projects(services: Services) -> set[str]:
    """Those that have a record; others show once one of their runs does."""
    return {project.project for project in services.records.find(Project) if project.deleted_at is None}


def read_state(request: Request) -> TableState:
    """What the URL asks for.

    Raises:
        InputError: A page or size that makes no sense.
    """
    query = request.query_params
    columns = [name for name in query.getlist("column") if name]
    return TableState(
        q=query.get("q", "").strip(), project=query.get("project", ""), state=query.get("state", ""),
        sort=query.get("sort") or "-started_at", columns=tuple(dict.fromkeys(columns))[:40],
        page=whole_number(query.get("page"), "page", 1, MOST_PAGES),
        size=whole_number(query.get("size"), "size", SIZES[1], SIZES[-1]),
    )  # fmt: skip


def whole_number(given: str | None, name: str, default: int, most: int) -> int:
    """A number of the URL, from 1 on.

    Raises:
        InputError: It is none, or too large.

    Example:
        >>> whole_number("3", "page", 1, 10), whole_number(None, "page", 1, 10)
        (3, 1)
    """
    if not given:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 19 and 1 <= int(given) <= most):
        raise InputError(f"{name} must be a number from 1 to {most}, got {given[:40]!r}")
    return int(given)


def to_query(state: TableState) -> RunQuery:
    """The search that answers the URL; one row more than a page has, to see whether there is a next one.

    Raises:
        InputError: The filter or the order cannot be read.

    Example:
        >>> to_query(TableState(q="digits", sort="-metrics.acc")).where[0].value
        '%digits%'
    """
    if state.q and _WORD.fullmatch(state.q) and not re.search(r"\b(I?LIKE|IN|IS)\b", state.q, re.IGNORECASE):
        where: tuple[Comparison, ...] = (
            Comparison(field="attribute", key="name", operator="ILIKE", value=f"%{state.q}%"),
        )
    else:
        where = parse_filter(state.q, LANGUAGE)
    if state.state:
        if state.state not in RUN_TRANSITIONS:
            raise InputError(f"there is no state {state.state!r}; want one of {', '.join(RUN_TRANSITIONS)}")
        where += (Comparison(field="attribute", key="state", operator="=", value=state.state),)
    return RunQuery(
        projects=(state.project,) if state.project else (), where=where, order=(to_order(state.sort),),
        limit=state.size + 1, offset=(state.page - 1) * state.size,
    )  # fmt: skip


def to_order(sort: str) -> Ordering:
    """The order that `-metrics.acc` or `name` means.

    Raises:
        InputError: There is no such attribute.

    Example:
        >>> to_order("-metrics.acc")
        Ordering(field='metric', key='acc', descending=True)
    """
    name = sort.removeprefix("-")
    kind, dot, key = name.partition(".")
    if dot and kind in _FIELDS and key:
        return Ordering(field=_FIELDS[kind], key=key, descending=sort.startswith("-"))
    if name not in RUN_ATTRIBUTES:
        known = ", ".join(RUN_ATTRIBUTES)
        raise InputError(f"want metrics.NAME, params.NAME, tags.NAME or one of {known} to sort by, got {sort[:80]!r}")
    return Ordering(field="attribute", key=name, descending=sort.startswith("-"))


def to_column(name: str) -> Column:
    """The column that a URL names.

    Raises:
        InputError: It is not of the form.
    """
    kind, _, key = name.partition(".")
    if kind not in _FIELDS or not key:
        raise InputError(f"want a column such as metrics.acc, params.lr or tags.owner, got {name[:80]!r}")
    return Column(name, _FIELDS[kind], key)


def params_of(run: Run, values: RunValues) -> dict[str, str]:
    """Parameters of a run as text."""
    own = run.facts.get("params")
    return {**({key: text(value) for key, value in own.items()} if isinstance(own, dict) else {}), **values.params}


def choices(found: Iterable[FoundRun]) -> set[str]:
    """Every column that the runs of this page could fill."""
    names: set[str] = set()
    for one in found:
        names.update(f"metrics.{key}" for key in one.values.metrics)
        names.update(f"params.{key}" for key in params_of(one.run, one.values))
        names.update(f"tags.{key}" for key in one.values.tags if not key.startswith("mlflow."))
    return names


def likely_columns(found: Sequence[FoundRun]) -> list[Column]:
    """The commonest metrics, and the parameters in which most runs differ."""
    metrics = Counter(key for one in found for key in one.values.metrics if not key.startswith("system/"))
    params: dict[str, set[str]] = {}
    for one in found:
        for key, value in params_of(one.run, one.values).items():
            params.setdefault(key, set()).add(value)
    differing = sorted((key for key in params if len(params[key]) > 1), key=lambda key: (-len(params[key]), key))
    most = max(metrics.values(), default=0)
    common = sorted((key for key in metrics if metrics[key] * 4 >= most), key=lambda key: (-metrics[key], key))
    return [Column(f"metrics.{key}", "metric", key) for key in common[:4]] + [
        Column(f"params.{key}", "param", key) for key in differing[:3]
    ]


def row_of(found: FoundRun, columns: Sequence[Column]) -> dict[str, Any]:
    """What the template shows of a run."""
    run, values = found.run, found.values
    params = params_of(run, values)
    return {
        "run": run,
        "params": params,
        "duration_s": None if run.started_at is None or run.ended_at is None else run.ended_at - run.started_at,
        "cells": [_cell(column, values, params) for column in columns],
    }


def _cell(column: Column, values: RunValues, params: dict[str, str]) -> tuple[str, str]:
    """What a cell shows and, where that is not all of it, the whole."""
    if column.field == "metric":
        point = values.metrics.get(column.key)
        return ("", "") if point is None else (number(point.value), f"{point.value!r} at step {point.step}")
    value = (params if column.field == "param" else values.tags).get(column.key, "")
    return value[:80], value[:1000] if len(value) > 24 else ""


def _by_kind(name: str) -> tuple[int, str]:
    return ("metrics", "params", "tags").index(name.partition(".")[0]), name.lower()
