"""Whatever bytes come in: rows in = kept + rejected, or one DataError. Never another exception."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import DataError
from millrace.core.spec import Data
from millrace.data.tables import read_csv

_spec = importlib.util.spec_from_file_location("data_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_conftest)

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
cells = st.one_of(
    st.sampled_from(
        [
            "",
            "NA",
            "nan",
            "inf",
            "-inf",
            "1e308",
            "1e39",
            "0",
            "-0.0",
            "true",
            "no",
            "2024-02-30",
            "2024-01-01",
            " x ",
            "é",
            "?",
        ]
    ),
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=True).map(str),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
names = st.lists(st.sampled_from(["a", "A", "b", "c", "y", "é", "", " y", "id"]), min_size=1, max_size=5)
rules = st.lists(
    st.sampled_from(
        [
            "drop_duplicates",
            {"drop_missing": {"columns": "*"}},
            {"range": {"columns": "*", "min": 0, "max": 10}},
            {"range": {"columns": "*", "max": 5, "action": "clip"}},
            {"outliers": {"columns": "*"}},
            {"outliers": {"columns": "*", "method": "zscore"}},
            {"cast": {"columns": "*", "type": "integer"}},
            {"cast": {"columns": "*", "type": "date"}},
            {"unit": {"columns": "*", "factor": 2.0}},
            {"normalize_text": {"columns": "*", "lower": True}},
            {"pattern": {"columns": "*", "regex": "^[a-z0-9]*$"}},
            {"allowed": {"columns": "*", "values": [1, "a", True]}},
            {"date": {"columns": "*", "formats": ["%d.%m.%Y"]}},
        ]
    ),
    max_size=3,
)


def check(name: str, content: bytes, **section: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = _conftest.Project(Path(folder))
        project.write(name, content)
        try:
            facts, reader = project.run(source=name, **section)
        except DataError as error:
            refused = error
        else:
            refused = None
        if refused is not None:
            assert 0 < len(refused.message) < 2000
            assert refused.hint
            return
        for split, rows in facts["split"].items():
            assert rows > 0
            for values in reader.arrays(split).values():
                assert len(values) == rows
                assert values.dtype == object or not np.isinf(values).any()
            labels = reader.labels(split)
            assert len(labels) == rows
            assert facts["task"] == "regression" or labels.max() < len(facts["classes"])


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_as_any_format(content):
    for name in ("t.csv", "t.parquet", "t.jsonl", "t.npz", "t-images-idx3-ubyte", "t.csv.gz", "t/a/b.png"):
        check(name, content)


@QUICK
@given(st.text(st.sampled_from('a1,;"\n\r\t y.\0é'), max_size=120), st.integers(0, 60))
def test_any_text_as_csv(text, repeats):
    check("t.csv", ("a,y\n" + "1,0\n2,1\n" * repeats + text).encode())


@QUICK
@given(
    st.one_of(names, st.just(["a", "b", "c", "y"]), st.just(["y", "id", "b"])),
    st.lists(st.lists(cells, min_size=5, max_size=5), min_size=1, max_size=12),
    st.integers(1, 6),
    rules,
)
def test_any_table(columns, rows, repeats, clean):
    rows = rows * repeats
    lines = [columns, *(row[: len(columns)] for row in rows)]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines]
    check("t.csv", "\n".join(quoted).encode(), clean=clean)


@QUICK
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b", "y"]),
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(),
                st.text(max_size=5),
                st.lists(st.integers(), max_size=1),
            ),
        ),
        max_size=40,
    )
)
def test_any_json_lines(records):
    frame = "\n".join(json.dumps(record) for record in records)
    check("t.jsonl", frame.encode())


@QUICK
@given(
    st.lists(st.floats(width=64), min_size=30, max_size=60),
    st.sampled_from([pl.Float32, pl.Float64, pl.String]),
    st.integers(1, 6),
    rules,
)
def test_any_parquet_numbers(values, dtype, classes, clean):
    frame = pl.DataFrame(
        {"a": pl.Series(values, strict=False).cast(dtype), "y": [i % classes for i in range(len(values))]}
    )
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        frame.write_parquet(file.name)
        check("t.parquet", Path(file.name).read_bytes(), clean=clean)


@QUICK
@given(
    st.lists(cells, min_size=20, max_size=60),
    st.sampled_from(["number", "category", "text", "date", "boolean", "image"]),
)
def test_any_type_override(values, kind):
    rows = [f'"{v.replace(chr(34), "")}",{i % 2},{i}' for i, v in enumerate(values)]
    check("t.csv", ("a,y,k\n" + "\n".join(rows)).encode(), types={"a": kind})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from('ab" ,;|'), min_size=1, max_size=6).filter(str.strip)] * 2),
        min_size=1,
        max_size=12,
    )
)
def test_quotes_in_lines_of_tabs_never_swallow_a_line(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.tsv"
        path.write_text("x\ty\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        reading = read_csv(path, "t.tsv", Data(source="t.tsv", label="y"))
        assert reading.frame.height == len(rows)
        if reading.notes:  # without quoting, every character is kept
            assert reading.frame.rows() == [tuple(cell.strip() for cell in row) for row in rows]
