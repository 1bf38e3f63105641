"""What is said of the test rows agrees with the stored predictions."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.core.facts import EvaluateFacts
from millrace.formats.dataset import open_dataset
from millrace.train.evaluate import _groups, evaluate
from millrace.train.export import export
from millrace.train.stage import train


def run(project: Any, model: str = "linear", **section: Any) -> tuple[EvaluateFacts, dict[str, np.ndarray]]:
    spec = project.spec(train={"model": model}, evaluate=section)
    train(spec, project.context("train"))
    export(spec, project.context("export"))
    facts = msgspec.convert(evaluate(spec, project.context("evaluate")), EvaluateFacts)
    with np.load(project.context("x").input("evaluate.predictions") / "test.npz") as stored:
        return facts, dict(stored)


def test_images(digits: Any) -> None:
    facts, stored = run(digits, metrics=["macro_f1", "accuracy", "auc"], slices=["digit"], confidence=0.9)
    labels = open_dataset(digits.context("x").input("data.dataset")).labels("test")
    assert np.array_equal(stored["expected"], labels)
    assert stored["expected"].dtype == stored["answers"].dtype == np.int64
    assert stored["probabilities"].shape == (600, 10)
    assert [value.name for value in facts.metrics] == ["macro_f1", "accuracy", "auc"]
    assert all(value.low <= value.value <= value.high for value in facts.metrics)
    right = stored["expected"] == stored["answers"]
    assert facts.metrics[1].value == pytest.approx(right.mean())
    assert np.trace(np.array(facts.confusion)) == right.sum()
    assert np.sum(facts.confusion) == facts.rows == 600
    assert [part.value for part in facts.slices] == [str(digit) for digit in range(10)]
    assert sum(part.rows for part in facts.slices) == 600
    assert facts.confidence == 0.9
    assert facts.baseline is not None
    assert facts.baseline < 0.1 < facts.metrics[0].value
    sure = [mistake.confidence for mistake in facts.mistakes]
    assert sure == sorted(sure, reverse=True)
    assert 0 < len(sure) == min(12, int((~right).sum()))
    for mistake in facts.mistakes:
        assert mistake.expected == facts.classes[stored["expected"][mistake.row]] != mistake.predicted
        assert mistake.pixels is not None
        assert len(mistake.pixels) == 64
        assert mistake.record == {}


def test_a_table_with_slices_of_each_kind(cancer: Any) -> None:
    facts, stored = run(cancer, slices=["size", "n03", "target"])
    by_column: dict[str, list[str]] = {}
    for part in facts.slices:
        by_column.setdefault(part.column, []).append(part.value)
    assert by_column["size"] == ["large", "small", "missing"]
    assert len(by_column["n03"]) == 4
    assert by_column["n03"][0].startswith("< ")
    assert by_column["target"] == ["benign", "malignant"]
    for mistake in facts.mistakes:
        assert mistake.pixels is None
        assert mistake.record["target"] == mistake.expected
    overall = (stored["expected"] == stored["answers"]).mean()
    total = sum(part.score * part.rows for part in facts.slices if part.column == "size")
    assert total / facts.rows == pytest.approx(overall)


def test_numbers(diabetes: Any) -> None:
    facts, stored = run(diabetes, slices=["n1"])
    assert "probabilities" not in stored
    assert stored["answers"].dtype == stored["expected"].dtype == np.float32
    assert [value.name for value in facts.metrics] == ["mae", "rmse", "r2"]
    assert [value.higher_is_better for value in facts.metrics] == [False, False, True]
    worst = [abs(mistake.expected - mistake.predicted) for mistake in facts.mistakes]
    assert len(worst) == 12
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(float(np.abs(stored["expected"] - stored["answers"]).max()))
    assert facts.baseline is not None
    assert facts.metrics[0].value < facts.baseline
    assert facts.confusion == []


def test_the_same_twice(cancer: Any) -> None:
    first, _ = run(cancer, metrics=["macro_f1", "auc"], slices=["size"])
    again = evaluate(
        cancer.spec(evaluate={"metrics": ["macro_f1", "auc"], "slices": ["size"]}), cancer.context("evaluate")
    )
    assert again == msgspec.to_builtins(first)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"metrics": ["mae"]}, "no classification metric 'mae'"),
        ({"slices": ["nothing"]}, "no column 'nothing'"),
        ({"slices": ["p07"]}, "part of an image"),
    ],
)
def test_what_does_not_exist_is_named(section: dict[str, Any], words: str, digits: Any) -> None:
    spec = digits.spec(train={"model": "linear"})
    train(spec, digits.context("train"))
    export(spec, digits.context("export"))
    with pytest.raises(InputError, match=words):
        evaluate(digits.spec(evaluate=section), digits.context("evaluate"))


@given(
    st.lists(st.none() | st.floats(-1e3, 1e3), min_size=1, max_size=200)
    | st.lists(st.none() | st.sampled_from("abcd"), min_size=1)
    | st.lists(st.none() | st.booleans(), min_size=1)
)
def test_groups_share_the_rows(values: list[Any]) -> None:
    rows = [row for _, group in _groups(values) for row in group.tolist()]
    assert sorted(rows) == list(range(len(values)))
