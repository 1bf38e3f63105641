"""Columns that give the label away are named; columns that are only good are not."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

ROWS = 1200


@pytest.fixture
def generator():
    return np.random.default_rng(11)


def told(project, columns, **section):
    pl.DataFrame(columns).write_csv(project.folder / "t.csv")
    facts, _ = project.run(**section)
    return [warning for warning in facts["warnings"] if " alone predict" in warning]


def test_a_category_that_is_the_label_in_other_words(project, generator):
    label = generator.choice(["stay", "leave"], p=[0.7, 0.3], size=ROWS)
    reason = np.where(label == "leave", generator.choice(["price", "moved"], ROWS), "none")
    found = told(project, {"age": generator.integers(18, 80, ROWS), "reason": reason, "y": label})
    assert len(found) == 1
    assert found[0].startswith("reason alone predicts y (100 % of ")
    assert "add to data.ignore" in found[0]


def test_a_number_with_a_threshold(project, generator):
    score = generator.normal(size=ROWS)
    # The thresholds seen lie between quantiles of the training rows: a clear gap is one they cannot miss.
    score = np.where(score > 0, score + 1, score - 1)
    label = np.where(score > 0, "high", "low")
    found = told(project, {"score": score, "noise": generator.normal(size=ROWS), "y": label})
    assert [text.split()[0] for text in found] == ["score"]


def test_missing_values_may_give_it_away(project, generator):
    label = generator.choice(["stay", "leave"], size=ROWS)
    closed = [
        None if one == "stay" else int(day) for one, day in zip(label, generator.integers(0, 9, ROWS), strict=True)
    ]
    found = told(project, {"age": generator.integers(18, 80, ROWS), "closed": closed, "y": label})
    assert [text.split()[0] for text in found] == ["closed"]


def test_a_good_column_is_no_giveaway(project, generator):
    label = generator.choice(["a", "b", "c"], size=ROWS)
    seen = np.where(generator.random(ROWS) < 0.1, "a", label)
    assert told(project, {"seen": seen, "noise": generator.normal(size=ROWS), "y": label}) == []


def test_a_rare_class_tells_nothing(project, generator):
    label = np.where(np.arange(ROWS) % 200 == 0, "rare", "usual")
    assert told(project, {"k": label, "noise": generator.normal(size=ROWS), "y": label}, split={"stratify": True}) == []


def test_parts_that_sum_up_to_the_label(project, generator):
    casual, registered = generator.poisson(30, ROWS), generator.poisson(150, ROWS)
    noise = generator.normal(size=ROWS)
    found = told(project, {"t": noise, "casual": casual, "registered": registered, "y": casual + registered})
    assert len(found) == 1
    assert found[0].startswith("registered, casual alone predict y (100 % of ")
    assert (
        told(
            project,
            {
                "t": noise,
                "casual": casual,
                "registered": registered,
                "y": casual + registered + generator.normal(size=ROWS) * 2,
            },
        )
        == []
    )


def test_the_label_in_another_unit(project, generator):
    metres = generator.gamma(3.0, 20.0, ROWS)
    columns = {"feet": metres / 0.3048, "noise": generator.normal(size=ROWS), "y": metres}
    found = told(project, columns)
    assert [text.split()[0] for text in found] == ["feet"]


def test_few_test_rows_say_nothing(project):
    values = {"k": ["u", "v"] * 50, "n": list(range(0, 300, 3)), "y": ["a", "b"] * 50}
    assert told(project, values, split={"test": 20, "validation": 20}) == []


def test_bike_rentals_are_the_sum_of_their_riders(project, test_data):
    source = str(test_data / "bike-sharing" / "hour.csv.gz")
    facts, _ = project.run(source=source, label="cnt")
    assert any(warning.startswith("registered, casual alone predict cnt") for warning in facts["warnings"])
