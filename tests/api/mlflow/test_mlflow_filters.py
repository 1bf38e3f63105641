"""The filter language: what it means, and that everything else is refused as invalid."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.api.mlflow.filters import parse_filter, parse_order
from millrace.api.mlflow.languages import EXPERIMENTS, LOGGED_MODELS, MODELS, RUNS, VERSIONS, chosen, is_true
from millrace.core.errors import InputError
from millrace.core.search import Comparison, Ordering


def one(text: str, language: Any = RUNS) -> tuple[str, str, str, Any]:
    (found,) = parse_filter(text, language)
    return found.field, found.key, found.operator, found.value


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("metrics.acc > 0.9", ("metric", "acc", ">", 0.9)),
        ("metric.`a b`>=-1e-3", ("metric", "a b", ">=", -0.001)),
        ('params."my lr" = "0.1"', ("param", "my lr", "=", "0.1")),
        ("tags.`mlflow.source.type` ILIKE 'no%'", ("tag", "mlflow.source.type", "ILIKE", "no%")),
        ("tags.mlflow.user = 'ann'", ("tag", "mlflow.user", "=", "ann")),
        ("attributes.run_id IN ('a', 'b')", ("attribute", "id", "IN", ("a", "b"))),
        ("run_id not in ('a',)", ("attribute", "id", "NOT IN", ("a",))),
        ("params.y IS NULL", ("param", "y", "IS NULL", None)),
        ("tags.y is not null", ("tag", "y", "IS NOT NULL", None)),
        ("`run name` = 'x'", ("attribute", "name", "=", "x")),
        ("Created <= 3", ("attribute", "started_at", "<=", 3.0)),
        ("dataset.context = 'train'", ("dataset", "context", "=", "train")),
        ("params.and = 'a AND b'", ("param", "and", "=", "a AND b")),
        ("params.x = 'it''s'", ("param", "x", "=", "it's")),
    ],
)
def test_what_a_clause_means(text: str, want: tuple[Any, ...]) -> None:
    assert one(text) == want


def test_clauses_are_joined_by_and_alone() -> None:
    found = parse_filter("metrics.a = 1 AND params.b LIKE '%' and tags.c != 'x'", RUNS)
    assert [comparison.key for comparison in found] == ["a", "b", "c"]
    assert parse_filter("  ", RUNS) == parse_filter(None, RUNS) == ()


@pytest.mark.parametrize(
    "text",
    [
        "metrics.a > 1 OR metrics.b > 1", "params.a = b", "params.a > 'x'", "metrics.a = 'x'", "params.a = 1", "foo = 'x'",
        "bar.x = 'y'", "tags.x", "= 1", "status > 'a'", "(metrics.a > 1)", "metrics.a > 1; DROP", "run_name IN ('a')",
        "run_id IN ()", "run_id IN (1)", "metrics.a IS NULL", "status IS NULL", "params.a = 'x", "start_time = 'a'",
        "metrics.a LIKE 'b'", "metrics. > 1", "dataset.foo = 'x'", "tags.x = 'a' tags.y = 'b'", "metrics.a > 1a",
        "not metrics.a > 1", "metrics.a > 1 AND", "metrics.a-b > 1", "'a' = 'a'", "1 = 1",
    ],
)  # fmt: skip
def test_what_is_no_filter_is_invalid(text: str) -> None:
    with pytest.raises(InputError):
        parse_filter(text, RUNS)


def test_each_kind_of_thing_has_its_own_words() -> None:
    assert one("experiment_id IN ('1')", EXPERIMENTS) == ("attribute", "id", "IN", ("1",))
    assert one("version_number = '2'", VERSIONS) == ("attribute", "number", "=", 2.0)
    assert one("source_path LIKE 's3%'", VERSIONS)[1] == "source"
    assert one("metrics.acc > 1", LOGGED_MODELS)[0] == "metric"
    for text, language in (("metrics.a > 1", MODELS), ("run_id = 'a'", MODELS), ("params.a = 'x'", VERSIONS)):
        with pytest.raises(InputError):
            parse_filter(text, language)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(InputError):  # nothing else may be raised
        assert all(one.key for one in parse_filter(text, RUNS))


KEYS = st.text(st.characters(blacklist_characters="`\0", blacklist_categories=["Cs"]), min_size=1, max_size=12)


@given(KEYS, st.text(max_size=12), st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_quoted_comes_back(key: str, value: str, number: float) -> None:
    quoted = value.replace("'", "''")
    found = parse_filter(f"params.`{key}` = '{quoted}' AND metrics.`{key}` != {number!r}", RUNS)
    assert [(one.key, one.value) for one in found] == [(key, value), (key, number)]


def test_orders() -> None:
    found = parse_order(["metrics.`a b` DESC", "start_time", "tags.x asc"], RUNS)
    assert found == (
        Ordering(field="metric", key="a b", descending=True),
        Ordering(field="attribute", key="started_at"),
        Ordering(field="tag", key="x"),
    )
    for clause in ("foo", "a b c", "metrics.a up", "dataset.name", "", "metrics."):
        with pytest.raises(InputError):
            parse_order([clause], RUNS)
    with pytest.raises(InputError, match="twice"):
        parse_order(["metrics.a", "metrics.a DESC"], RUNS)


def test_like_heeds_case_and_ilike_does_not() -> None:
    like = Comparison(field="tag", key="a", operator="LIKE", value="A_c%")
    assert [is_true(like, value) for value in ("Abc", "AbcD", "abc", "Ac", None)] == [True, True, False, False, False]
    ilike = Comparison(field="tag", key="a", operator="ILIKE", value="A_c%")
    assert is_true(ilike, "aBCd")


@given(st.lists(st.one_of(st.none(), st.floats(allow_infinity=False)), max_size=12), st.booleans())
def test_absent_values_come_last_in_both_directions(values: list[float | None], descending: bool) -> None:
    order = (Ordering(field="metric", key="m", descending=descending),)
    found = chosen(list(enumerate(values)), (), order, lambda pair, _field, _key: pair[1])
    shown = [value for _, value in found]
    known = sorted((value for value in values if value is not None and value == value), reverse=descending)
    assert shown[: len(known)] == known
    assert len(shown) == len(values)
