"""Curves: at most a thousand points that look like all of them."""

from __future__ import annotations

import math
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from millrace.api.pages.curves import Curve, ordered, thinned
from millrace.core.types import MetricPoint

VALUES = st.one_of(st.none(), st.floats(-1e6, 1e6, width=32))
POINTS = st.lists(
    st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=True), st.floats(0, 2e9)), max_size=80
)


@given(st.lists(VALUES, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_ends_the_extremes_and_the_order(values: list[float | None], most: int) -> None:
    curve = Curve([float(at) for at in range(len(values))], values)
    made = thinned(curve, most)
    assert len(made.x) == len(made.y) <= max(most, 0)
    assert made.x == sorted(set(made.x))
    for x, y in zip(made.x, made.y, strict=True):
        value = values[int(x)]
        assert y is None if value is None else y is not None and math.isclose(y, value, rel_tol=1e-6, abs_tol=1e-30)
    if values:
        assert (made.x[0], made.x[-1]) == (0.0, float(len(values) - 1))
    known = [value for value in values if value is not None]
    shown = [value for value in made.y if value is not None]
    if known:
        assert math.isclose(max(known), max(shown), rel_tol=1e-6, abs_tol=1e-30)
        assert math.isclose(min(known), min(shown), rel_tol=1e-6, abs_tol=1e-30)


@given(POINTS, st.sampled_from(["step", "time"]))
def test_order_is_strict_and_the_last_point_of_a_place_counts(
    points: list[tuple[int, float, float]], axis: str
) -> None:
    made = ordered([MetricPoint("r", "m", step, value, at) for step, value, at in points], axis, 0.0)
    assert all(left < right for left, right in zip(made.x, made.x[1:], strict=False))
    assert len(made.x) == len({step if axis == "step" else round(at, 3) for step, _, at in points})
    assert all(y is None or math.isfinite(y) for y in made.y)
    if points and axis == "step":
        step, value, _ = points[-1]
        assert made.y[made.x.index(step)] == (value if math.isfinite(value) else None)


def test_the_data_of_a_curve(web: httpx.Client, filled: Any) -> None:
    runs = ",".join(filled.sweep[:2])
    answer = web.get("/pages/data/curves", params={"metric": "acc", "runs": runs})
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert [one["run"] for one in found["series"]] == filled.sweep[:2]
    assert found["series"][0]["x"] == list(range(30))
    assert found["series"][1]["y"][0] == 0.525
    timed = web.get("/pages/data/curves", params={"metric": "acc", "runs": runs, "x": "time"}).json()
    assert timed["series"][0]["x"][1] - timed["series"][0]["x"][0] == 1.0


def test_what_is_no_number_is_counted_and_leaves_a_gap(web: httpx.Client, filled: Any) -> None:
    page = web.get("/pages/data/curves", params={"runs": filled.hostile, "metric": filled.text}).json()
    (series,) = page["series"]
    assert (series["points"], series["missing"]) == (20, 4)
    assert series["y"][5] is None


def test_what_cannot_be_asked_is_a_problem_document(web: httpx.Client, filled: Any) -> None:
    for query, status in (
        ("", 400),
        ("metric=acc", 400),
        (f"metric=acc&runs={filled.pipeline}&x=sideways", 400),
        ("metric=acc&runs=nosuchrun", 404),
        ("metric=acc&runs=" + ",".join(str(number) for number in range(60)), 400),
    ):
        answer = web.get(f"/pages/data/curves?{query}")
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), query
    assert (
        web.get("/pages/data/curves", params={"metric": "none", "runs": filled.pipeline}).json()["series"][0]["x"] == []
    )
