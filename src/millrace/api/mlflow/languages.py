"""What each kind of search may say, and how comparisons are made on things that are not in SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

from millrace.api.mlflow.filters import LISTS, NUMERIC, TEXT, TEXT_OR_NULL, Language
from millrace.core.search import Comparison, Ordering

T = TypeVar("T")
Kind = Literal["text", "number"]


def _attributes(texts: Mapping[str, str], numbers: Mapping[str, str]) -> dict[str, tuple[str, Kind]]:
    found: dict[str, tuple[str, Kind]] = {name: (own, "text") for name, own in texts.items()}
    return {**found, **{name: (own, "number") for name, own in numbers.items()}}


RUNS = Language(
    attributes=_attributes(
        {
            "run_id": "id",
            "run_name": "name",
            "run name": "name",
            "Run name": "name",
            "Run Name": "name",
            "status": "state",
            "user_id": "created_by",
            "artifact_uri": "artifact_uri",
        },
        {"start_time": "started_at", "end_time": "ended_at", "created": "started_at", "Created": "started_at"},
    ),
    operators={
        "attribute": (*TEXT, *LISTS),
        "metric": NUMERIC,
        "param": TEXT_OR_NULL,
        "tag": TEXT_OR_NULL,
        "dataset": (*TEXT, *LISTS),
    },
    lists=frozenset({"run_id"}),
    ordered_fields=frozenset({"attribute", "metric", "param", "tag"}),
)
EXPERIMENTS = Language(
    attributes=_attributes(
        {"name": "name", "experiment_id": "id"}, {"creation_time": "created_at", "last_update_time": "updated_at"}
    ),
    operators={"attribute": (*TEXT, *LISTS), "tag": TEXT_OR_NULL},
    lists=frozenset({"experiment_id"}),
)
_TIMES = {"creation_timestamp": "created_at", "last_updated_timestamp": "updated_at", "timestamp": "updated_at"}
MODELS = Language(
    attributes=_attributes({"name": "name"}, {}),
    operators={"attribute": (*TEXT, *LISTS), "tag": TEXT},
    lists=frozenset({"name"}),
    ordering=_TIMES,
)
VERSIONS = Language(
    attributes=_attributes({"name": "name", "run_id": "run_id", "source_path": "source"}, {"version_number": "number"}),
    operators={"attribute": (*TEXT, *LISTS), "tag": TEXT},
    lists=frozenset({"name", "run_id"}),
    ordering=_TIMES,
    takes_quoted_numbers=True,
)
LOGGED_MODELS = Language(
    attributes=_attributes(
        {
            "name": "name",
            "model_id": "id",
            "model_type": "model_type",
            "status": "status",
            "source_run_id": "run_id",
            "experiment_id": "experiment_id",
        },
        {
            "creation_timestamp": "created_at",
            "creation_time": "created_at",
            "creation_timestamp_ms": "created_at",
            "last_updated_timestamp": "updated_at",
            "last_updated_time": "updated_at",
            "last_updated_timestamp_ms": "updated_at",
        },
    ),
    operators={"attribute": (*TEXT, *LISTS), "metric": NUMERIC, "param": (*TEXT, *LISTS), "tag": (*TEXT, *LISTS)},
    lists=frozenset({"name", "model_id", "model_type", "status", "source_run_id", "experiment_id"}),
    ordered_fields=frozenset({"attribute", "metric"}),
)


@lru_cache(maxsize=256)
def _pattern(pattern: str, ignores_case: bool) -> re.Pattern[str]:
    parts = (".*" if part == "%" else "." if part == "_" else re.escape(part) for part in re.split("([%_])", pattern))
    return re.compile("".join(parts), re.DOTALL | (re.IGNORECASE if ignores_case else 0))


def is_true(comparison: Comparison, value: Any) -> bool:
    """Whether a value fits; what is absent fits IS NULL only.

    Example:
        >>> is_true(Comparison(field="tag", key="a", operator="LIKE", value="b%"), "bc")
        True
    """
    operator, want = comparison.operator, comparison.value
    if value is None or operator in ("IS NULL", "IS NOT NULL"):
        return (value is None) == (operator == "IS NULL")
    if operator in ("LIKE", "ILIKE"):
        return _pattern(str(want), operator == "ILIKE").fullmatch(str(value)) is not None
    return _TESTS[operator](value, want)


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda value, want: value == want,
    "!=": lambda value, want: value != want,
    "<": lambda value, want: value < want,
    "<=": lambda value, want: value <= want,
    ">": lambda value, want: value > want,
    ">=": lambda value, want: value >= want,
    "IN": lambda value, want: value in want,
    "NOT IN": lambda value, want: value not in want,
}


def chosen(
    things: Iterable[T], where: Sequence[Comparison], order: Sequence[Ordering], read: Callable[[T, str, str], Any]
) -> list[T]:
    """The things that fit all comparisons, in an order; absent values last in both directions.

    Args:
        things: In their natural order, which breaks ties.
        where: All must hold.
        order: The first key decides first.
        read: (thing, field, key) → value or None.
    """
    found = [one for one in things if all(is_true(each, read(one, each.field, each.key)) for each in where)]
    for ordering in reversed(order):
        keyed = [(read(one, ordering.field, ordering.key), one) for one in found]
        known = [pair for pair in keyed if pair[0] is not None and pair[0] == pair[0]]
        rest = [pair for pair in keyed if not (pair[0] is not None and pair[0] == pair[0])]
        known.sort(key=lambda pair: pair[0], reverse=ordering.descending)
        found = [one for _, one in [*known, *rest]]
    return found
