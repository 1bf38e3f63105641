"""`search_runs`, `metric_history` and the latest points against an evaluation in plain Python, on both databases."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.search import Comparison, FoundRun, Ordering, RunQuery
from millrace.core.types import MetricPoint, Run, RunLink
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import STORES, open_place

QUICKLY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1.0, 2.0, 1e308, math.inf, math.nan])
TIMES = st.sampled_from([0.5, 1.0, 2.0])
TEXTS = st.sampled_from(
    ["", "a", "A", "ab", "aB", "é", "É", "10", "9", "a%b", "a_b", "a*b", "[a]", "\\", "a\nb", '"', "😀"]
)
PATTERNS = st.text(st.sampled_from("aAbBéÉ%_*?[]\\\n😀"), max_size=4)
NAMES = st.sampled_from(["k", "K", "a b", 'q"\\', "é"])
RUNS = st.fixed_dictionaries(
    {
        "project": st.sampled_from(["p", "q"]),
        "name": TEXTS,
        "state": st.sampled_from(["running", "failed"]),
        "created_by": TEXTS,
        "created_at": TIMES,
        "started_at": st.none() | TIMES,
        "ended_at": st.none() | TIMES,
        "deleted_at": st.sampled_from([None, None, 5.0]),
        "metrics": st.dictionaries(NAMES, NUMBERS, max_size=3),
        "params": st.dictionaries(NAMES, TEXTS, max_size=3),
        "tags": st.dictionaries(NAMES, TEXTS, max_size=3),
        "datasets": st.lists(st.tuples(TEXTS, TEXTS, st.none() | TEXTS), max_size=2),
    }
)
SORTED = st.sampled_from(["=", "!=", "<", "<=", ">", ">="])
PRESENCE = st.tuples(st.sampled_from(["IS NULL", "IS NOT NULL"]), st.none())
ON_NUMBERS = st.tuples(SORTED, NUMBERS) | PRESENCE
ON_TEXTS = (
    st.tuples(SORTED, TEXTS)
    | st.tuples(st.sampled_from(["LIKE", "ILIKE"]), TEXTS | PATTERNS)
    | st.tuples(st.sampled_from(["IN", "NOT IN"]), st.lists(TEXTS, max_size=3).map(tuple))
    | PRESENCE
)
TEXT_KEYS = st.sampled_from(
    [("attribute", "name"), ("attribute", "state"), ("attribute", "created_by"), ("attribute", "id")]
)
TIME_KEYS = st.sampled_from([("attribute", "created_at"), ("attribute", "started_at"), ("attribute", "ended_at")])
DATASET_KEYS = st.sampled_from([("dataset", "name"), ("dataset", "digest"), ("dataset", "context")])
METRIC_KEYS = st.tuples(st.just("metric"), NAMES)
VALUE_KEYS = st.tuples(st.sampled_from(["param", "tag"]), NAMES)
COMPARISONS = (
    st.tuples(METRIC_KEYS | TIME_KEYS, ON_NUMBERS) | st.tuples(VALUE_KEYS | TEXT_KEYS | DATASET_KEYS, ON_TEXTS)
).map(lambda parts: Comparison(field=parts[0][0], key=parts[0][1], operator=parts[1][0], value=parts[1][1]))
ORDERINGS = st.builds(
    lambda key, descending: Ordering(field=key[0], key=key[1], descending=descending),
    METRIC_KEYS | TIME_KEYS | VALUE_KEYS | TEXT_KEYS | DATASET_KEYS,
    st.booleans(),
)
QUERIES = st.builds(
    RunQuery,
    projects=st.lists(st.sampled_from(["p", "q", "none"]), max_size=3).map(tuple),
    where=st.lists(COMPARISONS, max_size=5).map(tuple),
    order=st.lists(ORDERINGS, max_size=4).map(tuple),
    lifecycle=st.sampled_from(["active", "deleted", "all"]),
    limit=st.sampled_from([1, 2, 3, 100]),
    offset=st.sampled_from([0, 0, 1, 2, 5]),
)


@pytest.fixture(scope="module", params=STORES)
def records(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SqlRecords]:
    opened = open_place(STORES[request.param](tmp_path_factory.mktemp("home")))
    yield opened
    opened.close()


def fill(records: SqlRecords, runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put these runs in place of all others; the dictionaries by run id, as the evaluation reads them."""
    filled = {}
    with records.transaction() as transaction:
        for record_type in (Run, RunLink):
            for record in transaction.find(record_type):
                transaction.delete(record_type, record.id)
        for number, values in enumerate(runs):
            id = f"r{number}"
            fields = {name: value for name, value in values.items() if name in Run.__struct_fields__ and name != "tags"}
            transaction.put(Run(id=id, **fields))
            points = [MetricPoint(id, name, 0, value, 0.0) for name, value in values["metrics"].items()]
            transaction.log(id, points=points, params=values["params"], tags=values["tags"])
            for place, (name, digest, context) in enumerate(values["datasets"]):
                tags = {} if context is None else {"mlflow.data.context": context}
                link = RunLink(
                    id=f"{id}/{place}",
                    run_id=id,
                    direction="input",
                    target="dataset",
                    name=name,
                    digest=digest,
                    tags=tags,
                )
                transaction.put(link)
            filled[id] = {**values, "id": id}
    return filled


def options(run: dict[str, Any], field: str, key: str) -> list[Any]:
    """The values that a run has under a key: none, one, of datasets several."""
    if field == "dataset":
        return [
            one for one in (row[("name", "digest", "context").index(key)] for row in run["datasets"]) if one is not None
        ]
    found = run[key] if field == "attribute" else run[f"{field}s"].get(key)
    return [] if found is None else [found]


def fits(value: Any, operator: str, want: Any) -> bool:
    """Whether one value fulfils a comparison."""
    if operator in ("LIKE", "ILIKE"):
        if operator == "ILIKE":
            value, want = (re.sub("[A-Z]", lambda found: found[0].lower(), text) for text in (value, want))
        pattern = "".join({"%": ".*", "_": "."}.get(char, re.escape(char)) for char in want)
        return re.fullmatch(pattern, value, re.DOTALL) is not None
    if isinstance(value, float) and math.isnan(value):
        return operator == "!="
    if isinstance(value, float) and math.isnan(want):
        return False
    return {
        "=": lambda: value == want, "!=": lambda: value != want, "<": lambda: value < want, "<=": lambda: value <= want,
        ">": lambda: value > want, ">=": lambda: value >= want, "IN": lambda: value in want,
        "NOT IN": lambda: value not in want,
    }[operator]()  # fmt: skip


def agrees(run: dict[str, Any], comparison: Comparison) -> bool:
    """Whether a run fulfils a comparison."""
    found = options(run, comparison.field, comparison.key)
    if comparison.operator in ("IS NULL", "IS NOT NULL"):
        return bool(found) == (comparison.operator == "IS NOT NULL")
    return any(fits(value, comparison.operator, comparison.value) for value in found)


def evaluate(runs: dict[str, dict[str, Any]], query: RunQuery) -> list[str]:
    """What a search must find, by stable sorts from the last key to the first."""
    deleted = {"active": (False,), "deleted": (True,), "all": (False, True)}[query.lifecycle]
    found = [
        run
        for run in runs.values()
        if (not query.projects or run["project"] in query.projects)
        and (run["deleted_at"] is not None) in deleted
        and all(agrees(run, comparison) for comparison in query.where)
    ]
    order = query.order or (Ordering(field="attribute", key="started_at", descending=True),)
    named = {(key.field, key.key): number for number, key in reversed(list(enumerate(order)))}
    order = [order[number] for number in sorted(named.values())]  # a later double has no say, nor in ties
    found.sort(key=lambda run: run["id"], reverse=order[-1].descending)
    for key in reversed(order):

        def present(run: dict[str, Any], key: Ordering = key) -> list[Any]:
            return sorted(one for one in options(run, key.field, key.key) if one == one)[:1]

        found.sort(key=lambda run: present(run), reverse=key.descending)
        found.sort(key=lambda run, key=key: (not present(run), not options(run, key.field, key.key)))
    return [run["id"] for run in found][query.offset : query.offset + query.limit]


@given(runs=st.lists(RUNS, max_size=7), queries=st.lists(QUERIES, min_size=4, max_size=8))
@QUICKLY
def test_a_search_finds_what_a_naive_evaluation_finds(
    records: SqlRecords, runs: list[dict[str, Any]], queries: list[RunQuery]
) -> None:
    filled = fill(records, runs)
    for query in queries:
        found = records.search_runs(query)
        assert [one.run.id for one in found] == evaluate(filled, query), query
        for one in found:
            check_values(one, filled[one.run.id])


def check_values(found: FoundRun, run: dict[str, Any]) -> None:
    """The values are those that were logged."""
    assert (found.values.params, found.values.tags) == (run["params"], run["tags"])
    assert found.values.metrics.keys() == run["metrics"].keys()
    for name, value in run["metrics"].items():
        logged = found.values.metrics[name].value
        assert logged == value or (math.isnan(logged) and math.isnan(value))


POINTS = st.lists(
    st.tuples(st.sampled_from(["m", "n"]), st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]), NUMBERS, TIMES),
    max_size=30,
)


@given(batches=st.lists(st.tuples(POINTS, st.booleans()), max_size=5), limit=st.integers(1, 7))
@QUICKLY
def test_points_are_a_set_and_the_latest_is_the_greatest(
    records: SqlRecords, batches: list[tuple[list[tuple[str, int, float, float]], bool]], limit: int
) -> None:
    with records.transaction() as transaction:
        transaction.delete(Run, "x")
    logged = []
    for batch, is_buffered in batches:
        points = [MetricPoint("x", *point) for point in batch]
        logged += points
        if is_buffered:
            records.append_metrics(points)
        else:
            with records.transaction() as transaction:
                transaction.log("x", points=points)
    latest = records.run_values(["x"])["x"].metrics
    assert latest.keys() == {point.name for point in logged}
    for name in latest:
        mine = [point for point in logged if point.name == name]
        as_set = {(point.at, point.step, None if math.isnan(point.value) else point.value) for point in mine}
        pages: list[tuple[MetricPoint, tuple[float, int, int]]] = []
        while page := records.metric_history("x", name, limit, pages[-1][1] if pages else None):
            pages += page
        found = [(point.at, point.step, None if math.isnan(point.value) else point.value) for point, _ in pages]
        assert set(found) == as_set
        assert len(found) == len(as_set)
        assert [moment[:2] for moment in found] == sorted(moment[:2] for moment in found)
        greatest = max(mine, key=lambda point: (point.step, point.at, not math.isnan(point.value), point.value))
        assert latest[name] == greatest or (math.isnan(greatest.value) and math.isnan(latest[name].value))
        assert (latest[name].step, latest[name].at) == (greatest.step, greatest.at)
