"""scikit-learn and LightGBM behind one interface: fit on a table of features, predict, become a graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import lightgbm
import numpy as np
import onnx
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline

from millrace.core.errors import InputError, StageError
from millrace.core.facts import EpochFacts, Task
from millrace.train.convert import convert_booster, convert_estimator

_ROUNDS = 300
_PATIENCE = 30
_CURVE_POINTS = 50


@dataclass(frozen=True)
class Table:
    """Rows to learn from. `answers` are indices into `present` (the classes with training rows), or values.

    Values are in `unit`s of the label: answers · unit = label − its mean.
    """

    features: np.ndarray  # float32 [rows, features]
    answers: np.ndarray
    task: Task
    present: list[int] = field(default_factory=list)
    unit: float = 1.0
    weights: np.ndarray | None = None
    validation_features: np.ndarray | None = None
    validation_answers: np.ndarray | None = None
    seed: int = 0
    threads: int = 1
    params: dict[str, Any] = field(default_factory=dict)

    def part(self, rows: np.ndarray, held_out: np.ndarray | None = None) -> Table:
        """Some rows, with others held out for early stopping."""
        return replace(
            self,
            features=self.features[rows],
            answers=self.answers[rows],
            weights=None if self.weights is None else self.weights[rows],
            validation_features=None if held_out is None else self.features[held_out],
            validation_answers=None if held_out is None else self.answers[held_out],
        )


class Fitted(Protocol):
    """A trained model of any framework."""

    parameters: int
    epochs: list[EpochFacts]
    exporter: str

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The framework's own answers: probabilities [rows, present classes], or values [rows]."""
        ...

    def graph(self) -> tuple[onnx.ModelProto, str]:
        """The ONNX graph of features → answers, and the name of its output."""
        ...


class FittedEstimator:
    """A scikit-learn estimator or pipeline."""

    exporter = "skl2onnx"

    def __init__(self, estimator: Any, table: Table) -> None:
        self.epochs: list[EpochFacts] = []
        self._estimator = estimator
        self._is_classifier = table.task == "classification"
        self._width = table.features.shape[1]
        found = [np.size(getattr(estimator, name, 0)) for name in ("coef_", "intercept_") if hasattr(estimator, name)]
        self.parameters = int(sum(found))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The estimator's own answers."""
        if not self._is_classifier:
            return np.asarray(self._estimator.predict(features), np.float64).reshape(-1)
        return np.asarray(self._estimator.predict_proba(features), np.float64)

    def graph(self) -> tuple[onnx.ModelProto, str]:
        """By skl2onnx."""
        return convert_estimator(self._estimator, self._width, self._is_classifier)


class FittedBooster:
    """A LightGBM booster."""

    exporter = "onnxmltools"

    def __init__(self, booster: lightgbm.Booster, table: Table, epochs: list[EpochFacts] | None = None) -> None:
        self.epochs = epochs or []
        self._booster = booster
        self._is_classifier = table.task == "classification"
        self._width = table.features.shape[1]
        self.parameters = sum(tree["num_leaves"] for tree in booster.dump_model()["tree_info"])

    @property
    def rounds(self) -> int:
        """How many rounds of trees answer."""
        return self._booster.best_iteration or self._booster.current_iteration()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The booster's own answers."""
        found = np.asarray(self._booster.predict(features), np.float64)
        return np.stack([1 - found, found], axis=1) if self._is_classifier and found.ndim == 1 else found

    def graph(self) -> tuple[onnx.ModelProto, str]:
        """By onnxmltools."""
        return convert_booster(self._booster, self._width)


def fit_linear(table: Table) -> FittedEstimator:
    """Logistic regression, or ridge regression; `params` may set `C` or `alpha`.

    Example:
        >>> x = np.arange(20, dtype=np.float32).reshape(-1, 1)
        >>> model = fit_linear(Table(x, (x[:, 0] > 9).astype(int), "classification", present=[0, 1]))
        >>> model.predict(x).argmax(axis=1).tolist()[8:12]
        [0, 0, 1, 1]
    """
    if table.task == "classification":
        estimator: Any = LogisticRegression(max_iter=1000, random_state=table.seed, **_known(table, "C"))
    else:
        estimator = Ridge(random_state=table.seed, **_known(table, "alpha"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline: 1000 iterations are enough
        estimator.fit(table.features, table.answers, sample_weight=table.weights)
    return FittedEstimator(estimator, table)


def _known(table: Table, *names: str) -> dict[str, Any]:
    return {name: table.params[name] for name in names if name in table.params}


def fit_boosting(table: Table) -> FittedBooster:
    """Gradient boosting by LightGBM, stopped early on held-out rows where there are some.

    `params` are LightGBM's, and `n_estimators` for the rounds.

    Raises:
        InputError: LightGBM refuses a parameter.
    """
    params = dict(table.params)
    rounds = int(params.pop("n_estimators", _ROUNDS))
    rows = len(table.features)
    settings = {**_objective(table), **_fixed(table, rows), **params}
    answers = np.ascontiguousarray(table.answers)  # LightGBM warns about slices
    train_set = lightgbm.Dataset(np.ascontiguousarray(table.features), answers, weight=table.weights)
    curves: dict[str, dict[str, list[float]]] = {}
    callbacks: list[Callable[..., Any]] = [lightgbm.record_evaluation(curves)]
    sets, names = [train_set], ["train"]
    held_out, held_answers = table.validation_features, table.validation_answers
    if held_out is not None and held_answers is not None and len(held_out):
        held_out, held_answers = np.ascontiguousarray(held_out), np.ascontiguousarray(held_answers)
        sets.append(lightgbm.Dataset(held_out, held_answers, reference=train_set))
        names.append("validation")
        callbacks.append(lightgbm.early_stopping(_PATIENCE, verbose=False))
    try:
        booster = lightgbm.train(
            settings, train_set, num_boost_round=rounds, valid_sets=sets, valid_names=names, callbacks=callbacks
        )
    except lightgbm.basic.LightGBMError as error:
        raise InputError(f"train.params: LightGBM refuses them: {error}") from error
    return FittedBooster(booster, table, _curve(curves))


def _objective(table: Table) -> dict[str, Any]:
    if table.task == "regression":
        return {"objective": "regression", "metric": "l2"}
    classes = len(table.present)
    if classes == 2:
        return {"objective": "binary", "metric": "binary_logloss"}
    return {"objective": "multiclass", "num_class": classes, "metric": "multi_logloss"}


def _fixed(table: Table, rows: int) -> dict[str, Any]:
    return {
        "learning_rate": 0.1,
        "num_leaves": 31 if rows >= 2000 else 15,
        "min_data_in_leaf": min(20, max(1, rows // 40)),
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": table.threads,
        "seed": table.seed,
        "verbose": -1,
    }


def _curve(curves: dict[str, dict[str, list[float]]]) -> list[EpochFacts]:
    """At most fifty points of the losses by round."""
    losses = next(iter(curves.get("train", {}).values()), [])
    held_out = next(iter(curves.get("validation", {}).values()), [])
    every = max(1, -(-len(losses) // _CURVE_POINTS))
    return [
        EpochFacts(
            epoch=index + 1,
            loss=float(losses[index]),
            validation_loss=float(held_out[index]) if held_out else None,
        )
        for index in range(0, len(losses), every)
    ]


def fit_own(estimator: Any, table: Table, reference: str) -> Fitted:
    """A user's own estimator.

    Args:
        estimator: With `fit`, and `predict_proba` (classification) or `predict`.
        table: What to learn from.
        reference: `model.py:build`, for messages.

    Raises:
        InputError: It is no estimator, or a classifier without probabilities.
        StageError: It is LightGBM inside a pipeline, which has no converter.
    """
    wanted = ("fit", "predict_proba") if table.task == "classification" else ("fit", "predict")
    missing = [name for name in wanted if not callable(getattr(estimator, name, None))]
    if missing:
        raise InputError(
            f"{reference} must return an estimator with {' and '.join(wanted)}, got {type(estimator).__name__} "
            f"without {missing[0]}",
            hint="SVC wants probability=True; others can be wrapped in CalibratedClassifierCV",
        )
    estimator.fit(table.features, table.answers, **_weight_argument(estimator, table))
    if isinstance(estimator, lightgbm.LGBMModel):
        return FittedBooster(estimator.booster_, table)
    if isinstance(estimator, Pipeline) and any(isinstance(step, lightgbm.LGBMModel) for _, step in estimator.steps):
        raise StageError(
            f"{reference}: LightGBM inside a Pipeline has no converter", hint="return the LGBM model alone"
        )
    return FittedEstimator(estimator, table)


def _weight_argument(estimator: Any, table: Table) -> dict[str, Any]:
    if table.weights is None:
        return {}
    if isinstance(estimator, Pipeline):
        name, last = estimator.steps[-1]
        return {f"{name}__sample_weight": table.weights} if _takes_weights(last) else {}
    return {"sample_weight": table.weights} if _takes_weights(estimator) else {}


def _takes_weights(estimator: Any) -> bool:
    return "sample_weight" in inspect.signature(estimator.fit).parameters


FITS: dict[str, Callable[[Table], Fitted]] = {"linear": fit_linear, "boosting": fit_boosting}
