"""From a dataset's raw tensors to the features a model sees: in NumPy for training, as ONNX nodes for the graph.

Both do the same float32 operations in the same order, so that they agree bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from millrace.core.errors import DataError
from millrace.formats.dataset import ColumnSchema, Manifest, tensors

PREFIX = "preprocess/"
MAX_CATEGORIES = 64  # a column's rarer values are all zeros, as unknown ones are


class Preprocess(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to raw tensors. Statistics are of the training rows only.

    Numbers: a missing one becomes `fill`, then (x − mean) · scale; columns in `indicators` also give
    1.0 where they are missing. Categories: one-hot in the order of `categories`; missing and unknown
    values are all zeros. Pixels: one mean and scale; [rows, values] becomes `image` = [channels,
    height, width] unless that is empty.
    """

    pixels: int = 0
    image: list[int] = []
    mean: list[float] = []
    scale: list[float] = []
    fill: list[float] = []
    indicators: list[int] = []
    categories: list[list[str]] = []

    @property
    def shape(self) -> list[int]:
        """The features' shape without the rows: [features], or [channels, height, width]."""
        if self.pixels:
            return self.image or [self.pixels]
        return [len(self.fill) + len(self.indicators) + sum(len(words) for words in self.categories)]

    def transform(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Features of some rows.

        Args:
            arrays: The dataset's tensors by name (`pixels`, or `numbers` and `categories`).

        Returns:
            float32 [rows, *shape], contiguous.

        Example:
            >>> plan = Preprocess(mean=[1.0], scale=[2.0], fill=[1.0], indicators=[0], categories=[["a", "b"]])
            >>> plan.transform({"numbers": np.array([[np.nan]], np.float32), "categories": np.array([["b"]], object)})
            array([[0., 1., 0., 1.]], dtype=float32)
        """
        mean, scale = np.asarray(self.mean, np.float32), np.asarray(self.scale, np.float32)
        if self.pixels:
            flat = (np.asarray(arrays["pixels"], np.float32) - mean) * scale
            return self._as_image(flat)
        parts = []
        if self.fill:
            numbers = np.asarray(arrays["numbers"], np.float32)
            missing = np.isnan(numbers)
            parts.append((np.where(missing, np.asarray(self.fill, np.float32), numbers) - mean) * scale)
            parts.append(missing[:, self.indicators].astype(np.float32))
        for column, words in enumerate(self.categories):
            parts.append((arrays["categories"][:, column, None] == np.array(words, object)).astype(np.float32))
        return np.ascontiguousarray(np.concatenate(parts, axis=1, dtype=np.float32))

    def _as_image(self, flat: np.ndarray) -> np.ndarray:
        if not self.image:
            return flat
        channels, height, width = self.image
        if channels == 1:
            return flat.reshape(-1, 1, height, width)
        return np.ascontiguousarray(flat.reshape(-1, height, width, channels).transpose(0, 3, 1, 2))


def plan_preprocess(manifest: Manifest, arrays: Mapping[str, np.ndarray], flat: bool = False) -> Preprocess:
    """Decide the preprocessing from the manifest's statistics.

    Args:
        manifest: Of the dataset.
        arrays: The training rows' tensors, for the counts of categories.
        flat: Keep an image's pixels side by side, for models that read a table.

    Raises:
        DataError: There is nothing a model could read.
    """
    by_name = {column.name: column for column in manifest.columns}
    if manifest.image is not None:
        mean, deviation = _pixel_statistics(manifest, by_name)
        height, width, channels = [*manifest.image, 1][:3]
        return Preprocess(
            pixels=len(manifest.image_columns),
            image=[] if flat else [channels, height, width],
            mean=[mean],
            scale=[1.0 / deviation],
        )
    plan: dict[str, Any] = {}
    for spec in tensors(manifest):
        columns = [by_name[name] for name in spec.columns]
        if spec.name == "numbers":
            means = [_finite(column.mean, 0.0) for column in columns]
            plan["mean"] = plan["fill"] = means
            plan["scale"] = [1.0 / _deviation(column.sd) for column in columns]
            plan["indicators"] = [index for index, column in enumerate(columns) if column.missing]
        else:
            plan["categories"] = [
                _words(column, arrays["categories"][:, index]) for index, column in enumerate(columns)
            ]
    preprocess = Preprocess(**plan)
    if not sum(preprocess.shape):
        raise DataError(
            "no column can be a feature: every one is ignored, text, a date, or without a value in the training rows",
            hint="give types under data.types, or other data",
        )
    return preprocess


def _finite(value: float | None, default: float) -> float:
    return float(value) if value is not None and math.isfinite(value) else default


def _deviation(value: float | None) -> float:
    """A standard deviation to divide by: 1 for a constant column, so that it becomes zeros."""
    found = _finite(value, 1.0)
    return found if found > 1e-30 else 1.0


def _pixel_statistics(manifest: Manifest, by_name: Mapping[str, ColumnSchema]) -> tuple[float, float]:
    columns = [by_name[name] for name in manifest.image_columns if name in by_name]
    known = [(column.mean, column.sd) for column in columns if column.mean is not None and column.sd is not None]
    if not known:
        return 0.0, 1.0
    mean = math.fsum(value for value, _ in known) / len(known)
    variance = math.fsum(sd * sd + (value - mean) ** 2 for value, sd in known) / len(known)
    return mean, _deviation(math.sqrt(variance))


def _words(column: ColumnSchema, values: np.ndarray) -> list[str]:
    words = [word for word in column.categories if word != ""]
    if len(words) <= MAX_CATEGORIES:
        return words
    counts = Counter(values.tolist())
    return sorted(sorted(words, key=lambda word: (-counts[word], word))[:MAX_CATEGORIES])


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes that turn the graph's inputs into one tensor of features."""

    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]


def prefix_nodes(preprocess: Preprocess, output: str) -> Prefix:
    """The ONNX nodes of `Preprocess.transform`; their names start with `preprocess/`.

    Args:
        preprocess: What to do.
        output: The name of the features' tensor.
    """
    builder = _Builder()
    if preprocess.pixels:
        builder.pixels(preprocess, output)
    else:
        builder.table(preprocess, output)
    return Prefix(nodes=builder.nodes, initializers=builder.initializers)


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), PREFIX + name))
        return PREFIX + name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = output if output.startswith(PREFIX) else f"{PREFIX}{op.lower()}_out"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def standardised(self, source: str, preprocess: Preprocess, output: str) -> str:
        centred = self.node("Sub", [source, self.constant("mean", preprocess.mean, np.float32)], PREFIX + "centred")
        return self.node("Mul", [centred, self.constant("scale", preprocess.scale, np.float32)], output)

    def pixels(self, preprocess: Preprocess, output: str) -> None:
        if not preprocess.image:
            self.standardised("pixels", preprocess, output)
            return
        channels, height, width = preprocess.image
        flat = self.standardised("pixels", preprocess, PREFIX + "scaled")
        shape = [0, 1, height, width] if channels == 1 else [0, height, width, channels]  # 0: as many rows as there are
        target = output if channels == 1 else PREFIX + "image"
        self.node("Reshape", [flat, self.constant("shape", shape, np.int64)], target)
        if channels > 1:
            self.node("Transpose", [target], output, perm=[0, 3, 1, 2])

    def table(self, preprocess: Preprocess, output: str) -> None:
        parts = []
        if preprocess.fill:
            missing = self.node("IsNaN", ["numbers"], PREFIX + "missing")
            fill = self.constant("fill", preprocess.fill, np.float32)
            filled = self.node("Where", [missing, fill, "numbers"], PREFIX + "filled")
            parts.append(self.standardised(filled, preprocess, PREFIX + "numbers"))
        if preprocess.indicators:
            flags = self.node("Cast", [PREFIX + "missing"], PREFIX + "flags", to=TensorProto.FLOAT)
            chosen = self.constant("indicators", preprocess.indicators, np.int64)
            parts.append(self.node("Gather", [flags, chosen], PREFIX + "indicated", axis=1))
        for index, words in enumerate(preprocess.categories):
            if words:
                column = self.constant(f"column_{index}", index, np.int64)
                value = self.node("Gather", ["categories", column], f"{PREFIX}category_{index}", axis=1)
                encoded = f"{PREFIX}one_hot_{index}"
                parts.append(
                    self.node("OneHotEncoder", [value], encoded, domain="ai.onnx.ml", cats_strings=list(words), zeros=1)
                )
        self.node("Concat", parts, output, axis=1)
