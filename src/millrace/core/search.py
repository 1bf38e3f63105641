"""Searching runs: the questions that a store answers, whoever asks them (API, pages, MLflow clients).

A filter is a conjunction of comparisons; an order is a list of keys. Parsing a filter *language* is the
business of whoever speaks it; stores see these structs alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from millrace.core.types import MetricPoint, Run, Struct

Field = Literal["attribute", "metric", "param", "tag", "dataset"]
Operator = Literal["=", "!=", "<", "<=", ">", ">=", "LIKE", "ILIKE", "IN", "NOT IN", "IS NULL", "IS NOT NULL"]
Lifecycle = Literal["active", "deleted", "all"]

RUN_ATTRIBUTES = ("id", "name", "state", "created_by", "created_at", "started_at", "ended_at")
DATASET_KEYS = ("name", "digest", "context")


class Comparison(Struct, frozen=True, kw_only=True):
    """One condition on a run.

    `key` is one of `RUN_ATTRIBUTES` for an attribute, of `DATASET_KEYS` for a dataset, else the name of a
    metric (its latest value), parameter or tag. `value` is a number for metrics and times, text otherwise,
    a tuple of texts for IN and NOT IN, None for IS NULL and IS NOT NULL. A run without the key never fits,
    except for IS NULL; NaN differs (!=) from every number. LIKE heeds case, ILIKE does not; `%` and `_` are wildcards.
    """

    field: Field
    key: str
    operator: Operator
    value: str | float | tuple[str, ...] | None = None


class Ordering(Struct, frozen=True, kw_only=True):
    """One key of an order. Metrics: numbers, then NaN, then absent, in both directions; others: absent last."""

    field: Field
    key: str
    descending: bool = False


class RunQuery(Struct, frozen=True, kw_only=True):
    """Which runs, in which order, which page.

    Without an order: `started_at` descending. Ties are broken by id, so that pages never repeat a run.
    An empty `projects` means every project.
    """

    projects: tuple[str, ...] = ()
    where: tuple[Comparison, ...] = ()
    order: tuple[Ordering, ...] = ()
    lifecycle: Lifecycle = "active"
    limit: int = 100
    offset: int = 0


class RunValues(Struct, frozen=True, kw_only=True):
    """What is known of a run by name: text parameters, tags, and of each metric the latest point.

    The latest point is the one with the greatest (step, time, value).
    """

    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    metrics: dict[str, MetricPoint] = {}


class FoundRun(Struct, frozen=True, kw_only=True):
    """A run with its values."""

    run: Run
    values: RunValues


class TrackingWriter(Protocol):
    """What a transaction can do besides putting records. Part of `core.ports.Transaction`."""

    def log(
        self,
        run_id: str,
        *,
        points: Sequence[MetricPoint] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        removed_tags: Sequence[str] = (),
        replace_params: bool = False,
    ) -> None:
        """Record points, parameters and tags of a run; equal points count once.

        Raises:
            ConflictError: A parameter has another value already and `replace_params` is False;
                `details` names the key, the old and the new value.
        """
        ...


class RunSearch(Protocol):
    """Questions on runs and their values. Part of `core.ports.Records`."""

    def search_runs(self, query: RunQuery) -> list[FoundRun]:
        """The page of runs that fit."""
        ...

    def run_values(self, run_ids: Sequence[str]) -> dict[str, RunValues]:
        """The values of runs; runs without any are there with empty ones."""
        ...

    def metric_history(
        self, run_id: str, name: str, limit: int | None = None, after: tuple[float, int, int] | None = None
    ) -> list[tuple[MetricPoint, tuple[float, int, int]]]:
        """Points of one metric by (time, step, row), each with the cursor that goes on after it."""
        ...
