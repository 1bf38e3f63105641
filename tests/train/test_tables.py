"""scikit-learn and LightGBM: training, choosing, and graphs that answer as they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import DataError, InputError, StageError
from millrace.formats.dataset import open_dataset
from millrace.formats.feed import Feed
from millrace.formats.session import open_session
from millrace.formats.signature import TensorSpec
from millrace.train.automl import choose, fold_numbers
from millrace.train.convert import float32_thresholds
from millrace.train.evaluate import evaluate
from millrace.train.export import compare, export
from millrace.train.frameworks import Table, fit_boosting, fit_linear
from millrace.train.graphs import Answer, assemble
from millrace.train.preprocess import Preprocess, plan_preprocess
from millrace.train.stage import train
from millrace.train.table_training import make_table


def run(project: Any, **section: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    spec = project.spec(train=section)
    return (
        train(spec, project.context("train")),
        export(spec, project.context("export")),
        evaluate(spec, project.context("evaluate")),
    )


@pytest.mark.parametrize("model", ["auto", "linear", "boosting"])
def test_numbers_and_categories_with_holes(model: str, cancer: Any) -> None:
    trained, exported, evaluated = run(cancer, model=model)
    assert exported["answers_equal"] == exported["rows"] > 100
    assert exported["max_difference"] < 1e-5
    accuracy = evaluated["metrics"][0]
    assert accuracy["name"] == "accuracy"
    assert accuracy["value"] > 0.93 > evaluated["baseline"]
    names = [line["name"] for line in trained["candidates"]]
    assert names == (["linear", "boosting"] if model == "auto" else [model])
    assert sum(line["chosen"] for line in trained["candidates"]) == 1
    inputs = open_session(cancer.context("x").input("export.onnx") / "model.onnx").inputs
    assert {spec.name: spec.dtype for spec in inputs} == {"numbers": "float32", "categories": "string"}


@pytest.mark.parametrize("model", ["auto", "linear", "boosting"])
def test_a_number_far_from_zero(model: str, diabetes: Any) -> None:
    trained, exported, evaluated = run(diabetes, model=model)
    assert exported["answers_equal"] == exported["rows"]
    assert evaluated["task"] == "regression"
    assert evaluated["metrics"][0]["name"] == trained["metric"] == "mae"
    assert evaluated["metrics"][0]["value"] < 0.85 * evaluated["baseline"]
    assert 30_000 < trained["best_score"] < 65_000
    assert len(evaluated["scatter"]) == evaluated["rows"]


def test_pixels_without_code(digits: Any) -> None:
    trained, exported, evaluated = run(digits, model="boosting", params={"n_estimators": 30})
    assert evaluated["metrics"][0]["value"] > 0.9
    assert exported["exporter"] == "onnxmltools"
    assert trained["framework"] == "lightgbm"
    assert trained["epochs"][-1]["loss"] < trained["epochs"][0]["loss"]


ESTIMATORS = {
    "forest": (
        "from sklearn.ensemble import RandomForestClassifier\n"
        "def build(ctx): return RandomForestClassifier(21, random_state=0)"
    ),
    "pipeline": (
        "from sklearn.pipeline import make_pipeline\nfrom sklearn.preprocessing import StandardScaler\n"
        "from sklearn.svm import SVC\nfrom sklearn.neural_network import MLPClassifier\n"
        "def build(ctx): return make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=2000, random_state=0))"
    ),
    "lightgbm": (
        "from lightgbm import LGBMClassifier\ndef build(ctx): return LGBMClassifier(n_estimators=20, verbose=-1)"
    ),
}


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_ones_own_estimator(name: str, cancer: Any) -> None:
    (cancer.folder / "model.py").write_text(ESTIMATORS[name])
    trained, exported, evaluated = run(
        cancer, model="model.py:build", framework="sklearn", class_weights="balanced" if name == "forest" else None
    )
    assert trained["framework"] == "sklearn"
    assert exported["answers_equal"] == exported["rows"]
    assert evaluated["metrics"][0]["value"] > 0.9


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("def build(ctx): return 7", InputError, "without fit"),
        ("from sklearn.svm import LinearSVC\ndef build(ctx): return LinearSVC()", InputError, "predict_proba"),
        (
            "from sklearn.naive_bayes import GaussianNB\nclass Own(GaussianNB): pass\ndef build(ctx): return Own()",
            StageError,
            "Own cannot be converted",
        ),
        (
            "from sklearn.pipeline import make_pipeline\nfrom lightgbm import LGBMClassifier\n"
            "def build(ctx): return make_pipeline('passthrough', LGBMClassifier(n_estimators=2, verbose=-1))",
            StageError,
            "inside a Pipeline",
        ),
    ],
)
def test_estimators_that_cannot_be_used_are_named(code: str, error: type[Exception], words: str, cancer: Any) -> None:
    (cancer.folder / "model.py").write_text(code)
    with pytest.raises(error, match=words):
        train(cancer.spec(train={"model": "model.py:build", "framework": "sklearn"}), cancer.context("train"))


def test_a_parameter_that_lightgbm_refuses(cancer: Any) -> None:
    with pytest.raises(InputError, match=r"train\.params"):
        train(cancer.spec(train={"model": "boosting", "params": {"num_leaves": -3}}), cancer.context("train"))


def test_the_same_data_and_seed_give_the_same_bytes(cancer: Any) -> None:
    found = []
    for _ in range(2):
        train(cancer.spec(), cancer.context("train"))
        folder = cancer.context("x").input("train.model")
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]


def table(features: np.ndarray, answers: np.ndarray, classes: int, **more: Any) -> Table:
    task = "classification" if classes else "regression"
    return Table(features, answers, task, present=list(range(classes)), **more)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.sampled_from([0, 2, 3]))
def test_rows_on_a_threshold_stay_on_their_side(seed: int, classes: int) -> None:
    """Values that are neighbours in float32: a threshold rounded to the nearest would move some."""
    random = np.random.default_rng(seed)
    steps = random.integers(0, 4, (400, 3))
    features = np.full((400, 3), 16777.125, np.float32)
    for _ in range(3):
        features = np.where(steps > 0, np.nextafter(features, np.float32(np.inf)), features)
        steps = steps - 1
    total = features.astype(np.float64).sum(axis=1)
    answers = np.argsort(np.argsort(total)) * classes // 400 if classes else (total - total.mean()) * 1000
    fitted = fit_boosting(table(features, answers, classes, params={"n_estimators": 10}))
    core, output = fitted.graph()
    kind = "probabilities" if classes else "value"
    answer = Answer(kind=kind, classes=classes, present=list(range(classes)))
    spec = TensorSpec(name="numbers", dtype="float32", shape=[-1, 3])
    plan = Preprocess(mean=[0.0] * 3, scale=[1.0] * 3, fill=[0.0] * 3)
    graph = assemble(core, [spec], plan, answer, output)
    found = compare(graph, {"numbers": features}, answer.finish(fitted.predict(features)))
    assert found.is_good
    assert found.max_difference < 1e-5


def test_thresholds_become_float32_and_answers_stay() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(500, 4)).astype(np.float32)
    fitted = fit_boosting(table(features, (features[:, 0] > 0.1).astype(int), 2))
    booster = fitted._booster
    rounded = float32_thresholds(booster)

    def thresholds(node: dict[str, Any]) -> list[float]:
        if "threshold" not in node:
            return []
        return [node["threshold"], *thresholds(node["left_child"]), *thresholds(node["right_child"])]

    found = [value for tree in rounded.dump_model()["tree_info"] for value in thresholds(tree["tree_structure"])]
    assert len(found) > 10
    assert all(float(np.float32(value)) == value for value in found)
    assert np.array_equal(rounded.predict(features), fitted.predict(features)[:, 1])


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_constant_features_do_not_break(classes: int) -> None:
    features = np.zeros((60, 3), np.float32)
    answers = np.arange(60) % classes if classes else np.arange(60.0)
    for fit in (fit_linear, fit_boosting):
        fitted = fit(table(features, answers, classes))
        core, output = fitted.graph()
        kind = "probabilities" if classes else "value"
        answer = Answer(kind=kind, classes=classes, present=list(range(classes)))
        plan = Preprocess(mean=[0.0] * 3, scale=[1.0] * 3, fill=[0.0] * 3)
        spec = TensorSpec(name="numbers", dtype="float32", shape=[-1, 3])
        graph = assemble(core, [spec], plan, answer, output)
        assert compare(graph, {"numbers": features}, answer.finish(fitted.predict(features))).is_good


@given(st.lists(st.integers(0, 3), min_size=10, max_size=80), st.integers(2, 5))
def test_folds_share_the_classes_evenly(answers: list[int], folds: int) -> None:
    labels = np.array(answers)
    numbers = fold_numbers(labels, folds, 0, True)
    sizes = np.bincount(numbers, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for label in set(answers):
        counts = np.bincount(numbers[labels == label], minlength=folds)
        assert counts.max() - counts.min() <= 1


def test_many_validation_rows_decide_and_few_are_cross_validated() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(900, 2)).astype(np.float32)
    curved = ((features**2).sum(axis=1) > 1.4).astype(int)  # no line separates these
    seen: list[str] = []
    for rows, how in ((300, "validation"), (40, "5-fold")):
        data = table(
            features[:600],
            curved[:600],
            2,
            validation_features=features[600 : 600 + rows],
            validation_answers=curved[600 : 600 + rows],
        )
        name, _, lines = choose(data, "accuracy", ["linear", "boosting"], lambda _, text: seen.append(text))
        assert name == "boosting"
        assert {line["how"] for line in lines} == {how}
        assert lines[1]["score"] > lines[0]["score"] + 0.2
    straight = (features[:, 0] + features[:, 1] > 0).astype(int)
    data = table(features[:600], straight[:600], 2)
    assert choose(data, "log_loss", ["linear", "boosting"], lambda *_: None)[0] == "linear"
    assert seen[0] == "linear"


def test_a_class_without_training_rows_keeps_its_place(digits: Any) -> None:
    reader = open_dataset(digits.context("x").input("data.dataset"))
    arrays, labels = reader.arrays("train"), reader.labels("train")
    kept = np.flatnonzero(labels != 4)
    plan = plan_preprocess(reader.manifest, arrays, flat=True)
    feed = Feed({"pixels": arrays["pixels"][kept]}, labels[kept], len(kept))
    held = Feed(reader.arrays("validation"), reader.labels("validation"), 150)
    data, answer = make_table(digits.spec(), digits.context("x"), reader, plan, feed, held)
    assert answer.present == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert data.validation_answers is not None
    assert len(data.validation_answers) == int((held.labels != 4).sum())
    fitted = fit_linear(data)
    core, output = fitted.graph()
    graph = assemble(core, reader.signature_inputs(), plan, answer, output)
    test = reader.arrays("test")
    expected = answer.finish(fitted.predict(plan.transform(test)))
    assert expected.shape == (600, 10)
    assert not expected[:, 4].any()
    assert compare(graph, test, expected).is_good
    right = expected.argmax(1) == reader.labels("test")
    assert right[reader.labels("test") != 4].mean() > 0.9


def test_one_class_in_the_training_rows_is_one_clear_error(digits: Any) -> None:
    reader = open_dataset(digits.context("x").input("data.dataset"))
    feed = Feed(reader.arrays("train"), np.full(1047, 3), 1047)
    plan = plan_preprocess(reader.manifest, feed.arrays, flat=True)
    with pytest.raises(DataError, match="every training row has the label '3'"):
        make_table(digits.spec(), digits.context("x"), reader, plan, feed, feed)
