"""The rows of the built-in sets, with column names that need no quotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

from millrace.data.builtin import BUILTINS

_LOADERS: dict[str, Callable[[], Any]] = {
    "breast_cancer": load_breast_cancer,
    "diabetes": lambda: load_diabetes(scaled=False),
    "digits": load_digits,
    "iris": load_iris,
    "wine": load_wine,
}


def read_builtin(name: str) -> pl.DataFrame:
    """A set as one table: Float64 features, and a label of names or numbers in the last column.

    Digits have columns `p00` to `p63`, row by row from 0 to 16; diabetes is in its original units.

    Args:
        name: A key of `BUILTINS`.

    Example:
        >>> frame = read_builtin("iris")
        >>> frame.height, frame.columns
        (150, ['sepal_length', 'sepal_width', 'petal_length', 'petal_width', 'species'])

    Source: UCI Machine Learning Repository (iris, wine, breast cancer Wisconsin, optical recognition of handwritten
    digits: CC BY 4.0) and Efron et al., "Least angle regression", 2004 (diabetes), as shipped in scikit-learn.
    """
    loaded = _LOADERS[name]()
    values = np.asarray(loaded.data, dtype=np.float64)
    if name == "digits":
        names = [f"p{index:02d}" for index in range(values.shape[1])]
        labels = pl.Series(np.asarray(loaded.target, dtype=np.int64))
    else:
        names = [str(column).removesuffix(" (cm)").replace(" ", "_") for column in loaded.feature_names]
        labels = pl.Series(_labels(name, loaded))
    frame = pl.DataFrame({column: values[:, index] for index, column in enumerate(names)})
    return frame.with_columns(labels.alias(BUILTINS[name].label))


def _labels(name: str, loaded: Any) -> list[Any]:
    if BUILTINS[name].task == "regression":
        return [float(value) for value in loaded.target]
    return [str(loaded.target_names[index]) for index in loaded.target]
