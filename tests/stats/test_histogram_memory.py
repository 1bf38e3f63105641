"""A profile is as large after a million rows as after ten."""

from __future__ import annotations

import msgspec
import numpy as np

from millrace.stats.histogram import Feature, Histograms, Layout

LAYOUT = Layout(
    inputs=[Feature(name="a", kind="number", tensor="x", column=0, edges=[-1.0, 0.0, 1.0])],
    outputs=[Feature(name="prediction", kind="category", tensor="y", categories=["n", "y"])],
)


def test_its_size_does_not_grow_with_the_rows() -> None:
    generator, histograms = np.random.default_rng(0), Histograms(LAYOUT)
    cells = [counts.size for counts in histograms.counts]
    for rows in (10, 100_000, 900_000):
        tensors = {"x": generator.normal(size=(rows, 1)).astype(np.float32)}
        histograms.add(tensors, {"y": generator.random((rows, 2)).astype(np.float32)})
        assert [counts.size for counts in histograms.counts] == cells
    assert histograms.rows == 1_000_010
    assert len(msgspec.json.encode(histograms.to_dict())) < 2_000
