"""The quick count of whole tensors against the histograms that count column by column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.stats.histogram import Feature, Histograms, Layout
from millrace.stats.tally import LayoutTally

NUMBER = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.5, np.nan, np.inf, -np.inf])


def number(name: str, column: int, edges: list[float], tensor: str = "x") -> Feature:
    return Feature(name=name, kind="number", tensor=tensor, column=column, edges=edges)


def check(layout: Layout, parts: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """The same bins exactly; the same moments but for the order of the sums."""
    tally, wanted = LayoutTally(layout), Histograms(layout)
    for tensors, outputs in parts:
        tally.add(tensors, outputs)
        wanted.add(tensors, outputs)
    taken = tally.take()
    assert taken.rows == wanted.rows
    assert [counts.tolist() for counts in taken.counts] == [counts.tolist() for counts in wanted.counts]
    scale = np.sqrt(np.maximum(wanted.squares, 1.0) * max(wanted.rows, 1))  # of sums that cancel
    np.testing.assert_allclose(taken.sums / scale, wanted.sums / scale, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(taken.squares, wanted.squares, rtol=1e-6)
    again = tally.take()
    assert again.rows == 0
    assert not any(counts.any() for counts in again.counts)
    assert not again.sums.any()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(NUMBER, min_size=3, max_size=3), max_size=40),
    edges=st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5, unique=True), min_size=3, max_size=3),
    cut=st.integers(0, 40),
)
@pytest.mark.filterwarnings("ignore:overflow encountered")  # squares of the largest numbers, on both sides
def test_numbers_of_any_kind(rows: list[list[float]], edges: list[list[float]], cut: int) -> None:
    features = [number(f"f{k}", k, sorted(one)) for k, one in enumerate(edges)]
    values = np.array(rows, np.float32).reshape(-1, 3)
    parts = [({"x": part}, {}) for part in (values[:cut], values[cut:])]
    check(Layout(inputs=features), parts)


@pytest.mark.parametrize("count", [1, 7, 255, 256, 1020, 5000])
@pytest.mark.parametrize("columns", [1, 3, 64, 700])
def test_any_size(count: int, columns: int) -> None:
    """Around the sizes at which the comparison is cut into parts."""
    rng = np.random.default_rng(count)
    features = [number(f"f{k}", k, sorted(rng.normal(size=1 + k % 4).tolist())) for k in range(columns)]
    values = rng.normal(size=(count if columns < 100 else min(count, 300), columns)).astype(np.float32)
    check(Layout(inputs=features), [({"x": values}, {})])


def test_some_columns_of_several_tensors_with_texts_between() -> None:
    layout = Layout(
        inputs=[
            number("b", 1, [0.0, 1.0]),
            Feature(name="plan", kind="category", tensor="c", categories=["a", "b"]),
            number("d", 0, [5.0], tensor="y"),
            number("image", 3, [0.5], tensor="z"),
        ],
        outputs=[
            Feature(name="prediction", kind="category", tensor="p", categories=["n", "y"]),
            number("confidence", 0, [0.5, 0.9], tensor="p"),
        ],
    )
    rng = np.random.default_rng(3)
    tensors = {
        "x": rng.normal(size=(50, 3)).astype(np.float32),
        "c": rng.choice(np.array(["a", "c", ""], object), (50, 1)),
        "y": rng.normal(5, 1, (50, 1)),
        "z": rng.random((50, 2, 2)).astype(np.float32),
    }
    tensors["y"][4] = 1e300
    check(layout, [(tensors, {"p": rng.random((50, 2)).astype(np.float32)})])
    check(Layout(), [({"x": tensors["x"]}, {})])
