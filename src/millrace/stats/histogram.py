"""Mergeable histograms of a model's inputs and outputs: memory does not grow with the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np

CHUNK_ROWS = 65_536
BINS = 12
MAX_CATEGORIES = 20
MAX_CATEGORY_LENGTH = 256  # a longer value is counted among the others: a profile stays small
_LARGEST = float(np.finfo(np.float32).max)
PREDICTION = "prediction"
CONFIDENCE = "confidence"


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted of one column: a number's bins between `edges`, or a category's known values.

    A number has len(edges) + 1 bins and one for missing; a category one per value, one for others, one for missing.
    """

    name: str
    kind: Literal["number", "category"]
    tensor: str
    column: int = 0
    edges: list[float] = []
    categories: list[str] = []

    @property
    def size(self) -> int:
        """How many bins."""
        return len(self.edges) + 2 if self.kind == "number" else len(self.categories) + 2


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted: features of the inputs, and of the outputs."""

    inputs: list[Feature] = []
    outputs: list[Feature] = []

    @property
    def features(self) -> list[Feature]:
        """Inputs, then outputs."""
        return [*self.inputs, *self.outputs]


class Histograms:
    """Counts and moments of every feature of a layout. `merge` is associative and commutative. One thread at a time.

    Args:
        layout: What to count.

    Example:
        >>> layout = Layout(inputs=[Feature(name="x", kind="number", tensor="x", edges=[0.0, 1.0])])
        >>> histograms = Histograms(layout)
        >>> histograms.add({"x": np.array([[-1.0], [0.5], [2.0], [np.nan]])}, {})
        >>> histograms.rows, histograms.counts[0].tolist()
        (4, [1, 1, 1, 1])
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.rows = 0
        self.counts = [np.zeros(feature.size, np.int64) for feature in layout.features]
        self.sums = np.zeros(len(self.counts))
        self.squares = np.zeros(len(self.counts))
        self._categories = [
            {value: index for index, value in enumerate(feature.categories)} for feature in layout.features
        ]
        self._edges = [np.asarray(feature.edges, np.float32) for feature in layout.features]

    def add(self, tensors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Count rows.

        Args:
            tensors: Inputs by name, [rows, columns].
            outputs: Outputs by name: `probabilities` [rows, classes] or a value [rows, 1].
        """
        given = next(iter(tensors.values()), None)
        total = len(given) if given is not None else len(next(iter(outputs.values())))
        for start in range(0, total, CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            self._add_inputs({name: array[part] for name, array in tensors.items()})
            self._add_outputs({name: array[part] for name, array in outputs.items()})
        self.rows += total

    def _add_inputs(self, tensors: Mapping[str, np.ndarray]) -> None:
        for index, feature in enumerate(self.layout.inputs):
            array = tensors.get(feature.tensor)
            if array is not None:
                flat = array.reshape(len(array), -1)
                self._count(index, feature, flat[:, feature.column])

    def _add_outputs(self, outputs: Mapping[str, np.ndarray]) -> None:
        offset = len(self.layout.inputs)
        for index, feature in enumerate(self.layout.outputs):
            array = outputs.get(feature.tensor)
            if array is None:
                continue
            flat = array.reshape(len(array), -1)
            if feature.kind == "category":
                answers = flat.argmax(axis=1)
                known = len(feature.categories)
                self.counts[offset + index] += np.bincount(np.minimum(answers, known), minlength=known + 2)
            else:
                self._count(offset + index, feature, flat.max(axis=1) if flat.shape[1] > 1 else flat[:, 0])

    def _count(self, index: int, feature: Feature, values: np.ndarray) -> None:
        if feature.kind == "category":
            self._count_categories(index, values)
            return
        with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite: it is in the outermost bin
            numbers = np.ascontiguousarray(values, np.float32)
        missing = np.isnan(numbers)
        if missing.any():
            self.counts[index][-1] += int(missing.sum())
            numbers = numbers[~missing]
        bins = np.searchsorted(self._edges[index], numbers, side="right")
        self.counts[index] += np.bincount(bins, minlength=len(self.counts[index]))
        finite = numbers if np.isfinite(numbers).all() else numbers[np.isfinite(numbers)]
        self.sums[index] += float(finite.sum(dtype=np.float64))
        self.squares[index] += float(np.einsum("i,i->", finite, finite, dtype=np.float64))

    def _count_categories(self, index: int, values: np.ndarray) -> None:
        known, counts = self._categories[index], self.counts[index]
        for value, number in category_counts(values).items():
            counts[-1 if value == "" else known.get(value, -2)] += number

    def merge(self, other: Histograms) -> None:
        """Add another one's rows.

        Raises:
            ValueError: It counts other features.
        """
        if other.layout != self.layout:
            raise ValueError("histograms of different layouts cannot be merged")
        for mine, theirs in zip(self.counts, other.counts, strict=True):
            mine += theirs
        self.rows += other.rows
        self.sums += other.sums
        self.squares += other.squares

    def moments(self, index: int) -> tuple[float, float]:
        """Mean and standard deviation of a number; zeros when there are no values."""
        count = int(self.counts[index][:-1].sum())
        if count == 0:
            return 0.0, 0.0
        mean = self.sums[index] / count
        return float(mean), float(np.sqrt(max(self.squares[index] / count - mean * mean, 0.0)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layout": msgspec.to_builtins(self.layout),
            "rows": self.rows,
            "counts": [counts.tolist() for counts in self.counts],
            "sums": self.sums.tolist(),
            "squares": self.squares.tolist(),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Histograms:
        """The inverse of `to_dict`.

        Raises:
            ValueError: The value is not of that form.
        """
        made = cls(msgspec.convert(value["layout"], Layout))
        counts = [np.asarray(one, np.int64) for one in value["counts"]]
        if [len(one) for one in counts] != [len(one) for one in made.counts]:
            raise ValueError("the counts do not fit the layout")
        made.rows, made.counts = int(value["rows"]), counts
        made.sums, made.squares = np.asarray(value["sums"], float), np.asarray(value["squares"], float)
        return made


def layout_from_reference(reference: Mapping[str, Any]) -> Layout:
    """The layout that a reference profile was made with; empty for an empty profile.

    Example:
        >>> layout_from_reference({}).features
        []
    """
    histograms = reference.get("histograms")
    return msgspec.convert(histograms["layout"], Layout) if histograms else Layout()


def category_counts(values: np.ndarray) -> Counter[str]:
    """How often each value occurs; None is missing, as "" is.

    Python's own strings, not an array of fixed-width ones: there one cell of a million characters takes 4 MB a row.

    Example:
        >>> dict(category_counts(np.array(["a", None, "a", ""], object)))
        {'a': 2, '': 2}
    """
    counts: Counter[str] = Counter()
    for value, number in Counter(values.tolist()).items():
        counts["" if value is None else str(value)] += number
    return counts


def top_categories(values: np.ndarray, most: int = MAX_CATEGORIES) -> list[str]:
    """The commonest values in alphabetical order; a missing one is none of them, nor is a cell of text.

    Example:
        >>> top_categories(np.array(["b", "a", "b", "", "c" * 1000], object))
        ['a', 'b']
    """
    counts = category_counts(values)
    found = [value for value in counts if value != "" and len(value) <= MAX_CATEGORY_LENGTH]
    return sorted(sorted(found, key=lambda value: (-counts[value], value))[:most])


def edges_of(values: np.ndarray, bins: int = BINS) -> list[float]:
    """Inner edges at quantiles, fewer where values repeat; around the value where all are equal.

    Args:
        values: Numbers, [rows]; not-finite ones are left out.
        bins: How many bins to aim at.

    Example:
        >>> edges_of(np.zeros(5))
        [-0.001, 0.001]
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if len(finite) == 0:
        return [0.0]
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        width = max(abs(low) * 1e-3, 1e-3)
        return [max(low - width, -_LARGEST), min(low + width, _LARGEST)]
    inner = np.quantile(finite, np.linspace(0, 1, bins + 1)[1:-1])
    span = (high - low) * 0.05
    # Repeated values sit between edges, not on them; beyond the seen range are bins of their own.
    candidates = np.clip(np.concatenate([[low - span], inner + 1e-9, [high + span]]), -_LARGEST, _LARGEST)
    return [float(edge) for edge in np.unique(candidates.astype(np.float32))]
