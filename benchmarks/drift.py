"""The drift profile of 1M rows × 20 columns on one thread, beside a two-sample test per column (SciPy)."""

from __future__ import annotations

import statistics
import time

import numpy as np
from scipy.stats import ks_2samp

from millrace.formats.signature import Signature, TensorSpec
from millrace.stats.drift import build_reference, judge
from millrace.stats.histogram import Histograms, layout_from_reference

ROWS, COLUMNS, ROUNDS = 1_000_000, 20, 3


def main() -> None:
    """Print one table."""
    generator = np.random.default_rng(0)
    signature = Signature(
        task="regression",
        inputs=[TensorSpec(name="x", dtype="float32", shape=[-1, COLUMNS], columns=[f"c{i}" for i in range(COLUMNS)])],
        outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])],
        label="y",
    )
    held_out = generator.standard_normal((5000, COLUMNS)).astype(np.float32)
    reference = build_reference({"x": held_out}, {"value": held_out[:, :1]}, signature)
    rows = generator.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        window = Histograms(layout_from_reference(reference))
        window.add({"x": rows}, {"value": rows[:, :1]})
        judge(reference, window)
        ours.append(time.process_time() - start)
        start = time.process_time()
        for column in range(COLUMNS):
            ks_2samp(held_out[:, column], rows[:, column], method="asymp")
        theirs.append(time.process_time() - start)
    mine, baseline = statistics.median(ours), statistics.median(theirs)
    print(f"{'what':<42}{'CPU s':>8}{'ratio':>8}{'aim s':>8}")
    print(f"{'profile and verdict, 1M rows x 20 columns':<42}{mine:>8.2f}{mine / baseline:>8.2f}{1.5:>8}")
    print(f"{'SciPy ks_2samp per column':<42}{baseline:>8.2f}{1.0:>8.2f}{'-':>8}")


if __name__ == "__main__":
    main()
