"""Columns that give the label away: what is learnt from them alone on training rows is right on test rows too.

Such a column is often known only after the answer is (`reason_of_leaving`), or the label is made from it
(`casual` + `registered` = `cnt`). Both are warnings: some labels really are that easy.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from millrace.data.roles import Clean
from millrace.data.split import TEST, TRAIN

GIVEAWAY = 0.999  # of the test rows, or of the label's variance in them
EXACT = 0.99999  # of the variance, by a sum of several columns
_TRIVIAL = 0.99  # answering the commonest class is right so often: nothing can be told
_MIN_TEST_ROWS = 50
_MAX_ROWS = 20_000  # of either split
_MAX_COLUMNS = 200
_MAX_SUM_COLUMNS = 64
_BINS = 64
_NAMED = 5
_CLEAR = 0.01  # of a sum, what a column adds to be named


def giveaways(clean: Clean, places: np.ndarray) -> list[str]:
    """A warning for every column that alone predicts the label on test rows, or for columns that sum up to it.

    Args:
        clean: The kept rows. Images are not looked into.
        places: int8 [rows] of 0 train, 1 validation, 2 test.

    Returns:
        Sentences that begin with the columns' names; none with fewer than 50 test rows.
    """
    train, test = (np.flatnonzero(places == place)[:_MAX_ROWS] for place in (TRAIN, TEST))
    columns = [name for name in clean.features if clean.types.get(name) != "image"][:_MAX_COLUMNS]
    if len(test) < _MIN_TEST_ROWS or not columns:
        return []
    frame = clean.frame.select([*columns, clean.label_column])
    learn, judge = frame[train], frame[test]
    if clean.label.task == "regression":
        return _of_numbers(learn, judge, columns, clean.label_column)
    return _of_classes(learn, judge, columns, clean.label_column)


def _told(columns: list[str], label: str, share: float, rows: int) -> str:
    names = ", ".join(columns[:_NAMED]) + (f" and {len(columns) - _NAMED} more" if len(columns) > _NAMED else "")
    verb, pronoun = ("predicts", "it") if len(columns) == 1 else ("predict", "they")
    percent = int(share * 1000) / 10  # never rounded up
    return (
        f"{names} alone {verb} {label} ({percent:g} % of {rows} test rows): "
        f"if {pronoun} {'is' if len(columns) == 1 else 'are'} known only afterwards, add to data.ignore"
    )


def _of_classes(learn: pl.DataFrame, judge: pl.DataFrame, columns: list[str], label: str) -> list[str]:
    common = learn[label].mode().sort()[0]
    if (judge[label] == common).mean() >= _TRIVIAL:  # type: ignore[operator]
        return []
    found = []
    for name in columns:
        values, asked = _keys(learn[name], judge[name])
        answers = (
            pl.DataFrame({"key": values, "label": learn[label]})
            .group_by("key", "label")
            .len()
            .sort("len", "label", descending=[True, False])
            .unique("key", keep="first")
        )
        given = pl.DataFrame({"key": asked}).join(answers, on="key", how="left", maintain_order="left")["label"]
        right = float((given.fill_null(common) == judge[label]).mean())  # type: ignore[arg-type]
        if right > GIVEAWAY:
            found.append(_told([name], label, right, judge.height))
    return found


def _keys(learn: pl.Series, judge: pl.Series) -> tuple[pl.Series, pl.Series]:
    """A category's values as they are; many different numbers in bins between quantiles. Missing is a value."""
    if not learn.dtype.is_numeric() or learn.n_unique() <= _BINS:
        return tuple(values.cast(pl.String).fill_null("") for values in (learn, judge))  # type: ignore[return-value]
    present = learn.drop_nulls().to_numpy()
    edges = np.unique(np.quantile(present, np.linspace(0, 1, _BINS + 1)[1:-1]))
    learned, judged = (np.searchsorted(edges, values.fill_null(np.nan).to_numpy()) for values in (learn, judge))
    return pl.Series(learned).cast(pl.String), pl.Series(judged).cast(pl.String)


def _of_numbers(learn: pl.DataFrame, judge: pl.DataFrame, columns: list[str], label: str) -> list[str]:
    numbers = [name for name in columns if learn.schema[name].is_numeric() and learn[name].n_unique() > 2]
    wanted, asked = (part[label].cast(pl.Float64).to_numpy() for part in (learn, judge))
    x, z = _standard(learn, judge, numbers)
    found, single = [], []
    for index, name in enumerate(numbers):
        explained = _explained(x[:, [index]], wanted, z[:, [index]], asked)[0]
        if explained > GIVEAWAY:
            single.append(name)
            found.append(_told([name], label, explained, judge.height))
    if single or not 2 <= len(numbers) <= _MAX_SUM_COLUMNS:
        return found
    explained, weights = _explained(x, wanted, z, asked)
    share = np.abs(weights) / max(float(np.abs(weights).sum()), 1e-300)
    parts = [numbers[index] for index in np.argsort(-share, kind="stable") if share[index] > _CLEAR]
    return [_told(parts, label, explained, judge.height)] if explained > EXACT and parts else []


def _standard(learn: pl.DataFrame, judge: pl.DataFrame, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Training and test values by the training rows' mean and deviation, [rows, names]; missing ones are the mean."""
    x, z = (part.select(pl.col(names).cast(pl.Float64).fill_null(np.nan)).to_numpy() for part in (learn, judge))
    mean, sd = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
    return tuple(np.nan_to_num((part - mean) / np.where(sd > 0, sd, 1.0)) for part in (x, z))  # type: ignore[return-value]


def _explained(x: np.ndarray, wanted: np.ndarray, z: np.ndarray, asked: np.ndarray) -> tuple[float, np.ndarray]:
    """The share of the test rows' variance that a line through the training rows explains, and its weights."""
    spread = float(np.square(asked - asked.mean()).sum())
    if spread == 0.0:
        return 0.0, np.zeros(x.shape[1])
    middle = wanted.mean()
    weights = np.linalg.lstsq(x, wanted - middle, rcond=None)[0]
    return 1.0 - float(np.square(asked - middle - z @ weights).sum()) / spread, weights
