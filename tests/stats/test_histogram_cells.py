"""What one request may carry must not cost the server its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.stats.histogram import Feature, Histograms, Layout, edges_of, top_categories

COLOUR = Layout(inputs=[Feature(name="c", kind="category", tensor="c", categories=["blue", "red"])])


def test_a_cell_of_a_million_characters_costs_its_own_size_only() -> None:
    cells = np.array(["red"] * 999 + ["x" * 1_000_000], object).reshape(-1, 1)
    histograms = Histograms(COLOUR)
    tracemalloc.start()
    histograms.add({"c": cells}, {})
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert histograms.counts[0].tolist() == [0, 999, 1, 0]
    assert peak_bytes < 5_000_000  # an array of fixed-width strings takes 4 GB


def test_none_is_missing_as_the_empty_text_is() -> None:
    histograms = Histograms(COLOUR)
    histograms.add({"c": np.array([[None], [""], ["red"], ["green"]], object)}, {})
    assert histograms.counts[0].tolist() == [0, 1, 1, 2]


@given(st.lists(st.sampled_from(["a", "b", "c", "", "x" * 300]) | st.none(), max_size=60))
def test_known_categories_are_short_and_present(values: list[str | None]) -> None:
    known = top_categories(np.array(values, object), most=2)
    assert len(known) <= 2
    assert known == sorted(known)
    assert set(known) <= {value for value in values if value} - {"x" * 300}
    assert not {"a", "b", "c"} & set(values) or known


def test_doubles_beyond_float32_are_counted_at_the_ends() -> None:
    edges = edges_of(np.array([-1e300, 0.0, 1e300]))
    assert np.isfinite(edges).all()
    histograms = Histograms(Layout(inputs=[Feature(name="x", kind="number", tensor="x", edges=[0.0])]))
    histograms.add({"x": np.array([[1e300], [-1e300], [np.nan], [np.inf]])}, {})
    assert histograms.counts[0].tolist() == [1, 2, 1]
    assert np.isfinite(histograms.sums).all()
