"""Each cleaning rule: what it rejects, counts and transforms."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import DataError
from millrace.core.spec import CleanRule, Range
from millrace.data.rules import RULES, Scope, compile_rule, match_columns


def rows(values: list[Any], extra: int = 40) -> str:
    lines = [f"{value},{'ab'[i % 2]},{i * 0.5}" for i, value in enumerate(values)]
    return "a,y,k\n" + "\n".join(lines) + "\n"


def column(reader, name: str) -> list[Any]:
    return [
        v for split in ("train", "validation", "test") for v in reader.table(split, [name]).column(name).to_pylist()
    ]


BASE = [str(i % 10) for i in range(40)]


@pytest.mark.parametrize(
    ("values", "rule", "reasons"),
    [
        (BASE, {"range": {"columns": "a", "min": 0, "max": 8}}, {"range": 4}),
        (BASE, {"range": {"columns": "a", "min": 2}}, {"range": 8}),
        ([*BASE, "", "NA"], {"drop_missing": {"columns": "a"}}, {"missing": 2}),
        (["u", "v"] * 20 + ["w"], {"allowed": {"columns": "a", "values": ["u", "v"]}}, {"category": 1}),
        (BASE, {"allowed": {"columns": "a", "values": [0, 1, 2, 3, 4, 5, 6, 7, 8.0]}}, {"category": 4}),
        ([*BASE, "x", "1.5"], {"cast": {"columns": "a", "type": "integer"}}, {"type": 2}),
        (["yes", "no"] * 20 + ["maybe"], {"cast": {"columns": "a", "type": "boolean"}}, {"type": 1}),
        (["12 kg", "7.5kg", "3"] * 14 + ["heavy"], {"unit": {"columns": "a", "factor": 1000}}, {"type": 1}),
        (
            ["24.12.2023", "2023/12/25"] * 20 + ["31.02.2023"],
            {"date": {"columns": "a", "formats": ["%d.%m.%Y", "%Y/%m/%d"]}},
            {"date": 1},
        ),
        ([*BASE, "1000"], {"outliers": {"columns": "a"}}, {"outlier": 1}),
        ([*BASE, "1000"], {"outliers": {"columns": "a", "method": "zscore", "k": 4}}, {"outlier": 1}),
        (["ab1", "cd2"] * 20 + ["3x"], {"pattern": {"columns": "a", "regex": "^[a-z]+[0-9]$"}}, {"pattern": 1}),
    ],
)
def test_rule_rejects_with_its_reason(project, values, rule, reasons):
    project.write("t.csv", rows(values))
    facts, reader = project.run(clean=[rule], types={"k": "number"})
    assert facts["rejected_by_reason"] == reasons
    assert facts["samples"][0]["rule"] == next(iter(rule))
    assert facts["samples"][0]["column"] == "a"
    rejected = pl.read_parquet(reader.folder / "rejected" / "part-00000.parquet")
    assert rejected.height == sum(reasons.values())


def test_every_rule_of_the_language_is_in_the_table():
    assert set(RULES) == set(CleanRule.__struct_fields__)


def test_duplicates_keep_the_first(project):
    project.write("t.csv", "a,b,y\n" + "".join(f"{i % 10},{i % 3},{'ab'[i % 2]}\n" for i in range(90)))
    facts, _ = project.run(clean=["drop_duplicates"])
    assert facts["rejected_by_reason"] == {"duplicate": 60}
    assert facts["samples"][0]["row"] == 31


def test_rows_without_a_label_are_unlabelled_by_rule_or_not(project):
    project.write("t.csv", "a,y\n" + "".join(f"{i % 7},{'ab'[i % 2]}\n" for i in range(40)) + "1,\n2,?\n")
    assert project.run()[0]["rejected_by_reason"] == {"unlabelled": 2}
    assert project.run(clean=[{"drop_missing": {"columns": "y"}}])[0]["rejected_by_reason"] == {"unlabelled": 2}


def test_clip_unit_and_text_transform(project):
    project.write(
        "t.csv", "a,b,c,y\n" + "".join(f"{i},{i} km,  Ü\u0308 {'xy'[i % 2]},{'ab'[i % 2]}\n" for i in range(40))
    )
    clean = [
        {"range": {"columns": "a", "min": 5, "max": 10, "action": "clip"}},
        {"unit": {"columns": "b", "factor": 1000, "offset": 1}},
        {"normalize_text": {"columns": "c", "lower": True}},
    ]
    facts, reader = project.run(clean=clean, types={"b": "number"})
    assert facts["rejected"] == 0
    assert (min(column(reader, "a")), max(column(reader, "a"))) == (5, 10)
    assert sorted(column(reader, "b")) == [i * 1000 + 1 for i in range(40)]
    assert len(set(column(reader, "c"))) == 2


@pytest.mark.parametrize(("strategy", "want"), [("mean", None), ("median", None), ("mode", None), ("value", 77)])
def test_fill_uses_training_rows_only(project, strategy, want):
    project.write(
        "t.csv", "a,y,k\n" + "".join(f"{'' if i % 9 == 0 else i * 1.5},{'ab'[i % 2]},{i}\n" for i in range(90))
    )
    rule = {"columns": "a", "strategy": strategy} | ({"value": want} if want else {})
    _, reader = project.run(clean=[{"fill_missing": rule}, {"drop_missing": {"columns": "a"}}])
    raw, _ = project.run()
    assert raw["columns"][0]["missing"] == 10
    fill = next(entry.fill for entry in reader.manifest.columns if entry.name == "a")
    assert fill is not None
    assert want is None or fill == want
    assert None not in column(reader, "a")
    if strategy in ("mean", "median"):
        train = pl.DataFrame(pl.from_arrow(reader.table("train", ["a", "k"])))
        original = train.filter(pl.col("k") % 9 != 0)["a"]
        assert fill == pytest.approx(original.mean() if strategy == "mean" else original.median())


def test_fill_refuses_labels_and_text_in_numbers(project):
    project.write("t.csv", rows(BASE))
    for rule in ({"columns": "y"}, {"columns": "a", "value": "x"}, {"columns": "a", "strategy": "value"}):
        with pytest.raises(DataError, match="fill_missing"):
            project.run(clean=[{"fill_missing": rule}])


def test_wrong_expression_and_wrong_type(project):
    project.write("t.csv", rows(BASE))
    with pytest.raises(DataError, match="regular expression"):
        project.run(clean=[{"pattern": {"columns": "a", "regex": "("}}])
    project.write("t.csv", "a,y\n" + "".join(f"2024-01-{i % 28 + 1:02d},{'ab'[i % 2]}\n" for i in range(40)))
    with pytest.raises(DataError, match="wants number columns"):
        project.run(clean=[{"range": {"columns": "a", "min": 0}}])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=50),
    st.floats(-100, 0),
    st.floats(0, 100),
)
def test_range_rejects_exactly_what_lies_outside(values, low, high):
    frame = pl.DataFrame({"a": pl.Series(values, dtype=pl.Float64)})
    _, compiled = compile_rule(CleanRule(range=Range(columns="a", min=low, max=high)), Scope(frame, "y"))
    rejected = pl.any_horizontal([reject.mask.fill_null(False) for reject in compiled.rejects])
    assert frame.select(rejected).to_series().to_list() == [v is not None and not low <= v <= high for v in values]


def test_columns_by_glob_list_and_brackets():
    names = ["p0", "p1", "speed [rpm]", "q"]
    assert match_columns(["p*", "speed [rpm]"], names, "x") == ["p0", "p1", "speed [rpm]"]
    assert match_columns("*", names, "x") == names
    with pytest.raises(DataError, match="'z\\*'"):
        match_columns("z*", names, "x")
