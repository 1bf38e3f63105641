"""The digits example's CSV: scikit-learn's real digits, damaged openly and reproducibly.

The original is clean, so there would be nothing to reject. Added copies are damaged; all 1,797
original rows stay as they are, in a shuffled order.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

DUPLICATES = 25
UNLABELLED = 9
OUT_OF_RANGE = 9
_LARGEST = 16


def write_digits_csv(path: Path) -> int:
    """Write 1,840 rows: 1,797 real ones, 25 duplicates, 9 without a label, 9 with a pixel above 16.

    Columns `p00` to `p63` (row by row, 0 to 16) and `digit`. The same bytes every time.

    Args:
        path: The CSV to write.

    Returns:
        How many rows were written.

    Source: UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin, Kaynak, 1998, CC BY 4.0),
    as shipped in scikit-learn.
    """
    values, labels = load_digits(return_X_y=True)
    pixels = np.asarray(values, dtype=int)
    rows = [[*row.tolist(), int(label)] for row, label in zip(pixels, np.asarray(labels), strict=True)]
    random = np.random.default_rng(1797)
    # The original is ordered by writer, and writers differ: the first rows alone would look like drift.
    rows = [rows[index] for index in random.permutation(len(rows))]
    chosen = random.permutation(len(rows))[: DUPLICATES + UNLABELLED + OUT_OF_RANGE]
    damaged: list[tuple[int, list[int | str]]] = []
    for index, source in enumerate(chosen.tolist()):
        copy: list[int | str] = list(rows[source])
        if index >= DUPLICATES + UNLABELLED:
            copy[int(random.integers(len(copy) - 1))] = int(random.integers(_LARGEST + 1, 256))
        elif index >= DUPLICATES:
            copy[-1] = ""
        damaged.append((int(random.integers(source + 1, len(rows) + 1)), copy))
    merged: list[list[int | str]] = [list(row) for row in rows]
    for place, copy in sorted(damaged, key=lambda pair: pair[0], reverse=True):
        merged.insert(place, copy)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*(f"p{index:02d}" for index in range(pixels.shape[1])), "digit"])
        writer.writerows(merged)
    return len(merged)
