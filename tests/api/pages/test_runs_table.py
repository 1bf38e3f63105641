"""The table of runs: everything in its URL."""

from __future__ import annotations

import re
from html import unescape
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from millrace.api.pages.runs_table import TableState, likely_columns, read_state, to_order, to_query
from millrace.core.errors import InputError
from millrace.core.search import FoundRun, RunValues
from millrace.core.types import MetricPoint, Run

NAMES = st.text(min_size=1, max_size=12).filter(lambda text: text == text.strip())
STATES = st.builds(
    TableState,
    q=st.one_of(st.just(""), NAMES),
    project=st.one_of(st.just(""), NAMES),
    state=st.sampled_from(["", "failed", "running"]),
    sort=st.sampled_from(["-started_at", "name", "-metrics.a b", "params.x/y"]),
    columns=st.lists(NAMES, max_size=4, unique=True).map(tuple),
    page=st.integers(1, 1000),
    size=st.sampled_from([50, 100, 500]),
)


def asked(url: str) -> Request:
    query = urlsplit(url).query.encode()
    return Request({"type": "http", "method": "GET", "path": "/", "query_string": query, "headers": []})


@given(STATES)
def test_the_url_remembers_everything(state: TableState) -> None:
    assert read_state(asked(state.url())) == state


@pytest.mark.parametrize("query", ["page=0", "page=-1", "page=x", "page=99999999999999999999", "size=501", "size=²"])
def test_a_page_that_makes_no_sense_is_refused(query: str) -> None:
    with pytest.raises(InputError):
        read_state(asked(f"/?{query}"))


def test_plain_words_look_into_names_and_the_rest_is_the_filter_language() -> None:
    (name,) = to_query(TableState(q="digits 2")).where
    assert (name.key, name.operator, name.value) == ("name", "ILIKE", "%digits 2%")
    metric, param, state = to_query(TableState(q="metrics.acc > 0.9 and params.lr = '0.1'", state="failed")).where
    assert (metric.field, param.field, state.key, state.value) == ("metric", "param", "state", "failed")


@pytest.mark.parametrize("sort", ["", "nothing", "-", "metrics.", "versions.a"])
def test_an_unknown_order_is_refused(sort: str) -> None:
    with pytest.raises(InputError, match="to sort by"):
        to_order(sort)


def test_the_columns_shown_first_are_common_metrics_and_parameters_that_differ() -> None:
    found = [
        FoundRun(
            run=Run(id=str(number), facts={"params": {"own": number}}),
            values=RunValues(
                metrics={"acc": MetricPoint(str(number), "acc", 0, 1.0, 0.0)} | ({"rare": MetricPoint("0", "rare", 0, 1.0, 0.0)} if number == 0 else {}),
                params={"same": "1", "lr": str(number % 2)},
            ),
        )
        for number in range(8)
    ]  # fmt: skip
    assert [column.name for column in likely_columns(found)] == ["metrics.acc", "params.own", "params.lr"]


def rows(page: httpx.Response) -> list[str]:
    assert page.status_code == 200, page.text
    return re.findall(r'<tr id="r([0-9a-f]{32})"', page.text)


def test_filter_sort_and_pages_are_done_by_the_server(web: httpx.Client, filled: Any) -> None:
    best = list(reversed(filled.sweep))
    assert rows(web.get("/runs?project=vision&sort=-metrics.acc")) == best
    assert rows(web.get("/runs?project=vision&sort=metrics.acc")) == filled.sweep
    assert rows(web.get("/runs", params={"q": "metrics.acc > 0.7", "sort": "-metrics.acc"})) == best[:5]
    assert rows(web.get("/runs", params={"q": "params.lr = '0.1' and tags.owner = 'ada'"})) == filled.sweep[1::2][::-1]
    assert rows(web.get("/runs?q=SWEEP-0&state=failed")) == [filled.sweep[3]]
    pages = [rows(web.get(f"/runs?project=vision&sort=metrics.acc&size=5&page={number}")) for number in (1, 2, 3, 4)]
    assert pages == [filled.sweep[:5], filled.sweep[5:10], filled.sweep[10:], []]


def test_links_keep_what_was_chosen(web: httpx.Client) -> None:
    url = TableState(
        q="params.lr = '0.1'", project="vision", sort="-metrics.acc", columns=("metrics.acc",), size=5
    ).url()
    html = web.get(url).text
    links = {unescape(link) for link in re.findall(r'href="(/runs\?[^"]+)"', html)}
    table = [read_state(asked(link)) for link in links]
    assert {state.sort for state in table} >= {"metrics.acc", "-started_at", "name"}
    assert all((state.q, state.project, state.size) != ("", "", 100) for state in table)
    assert 'aria-sort="descending"' in html
    assert html.count('name="column"') >= 2
    assert re.search(r'rel="next" href="[^"]*page=2', html)
