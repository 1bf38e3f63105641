"""Answers for files: CSV, JSON lines, Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.batch.files import predict_file
from millrace.batch.rows import CHUNK_ROWS, read_chunks, whole
from millrace.core.errors import InputError
from millrace.formats.bundle import open_bundle

CSV = "id,plan,age,income\n1,a,1.5,2\n2,,NA,5\n3,b, 3 ,true\n"
ANSWERS = [{"value": 13.5}, {"value": 5.0}, {"value": 4.0}]


def answers(bundle: Path, path: Path) -> list[dict[str, Any]]:
    return list(predict_file(open_bundle(bundle), "fp32", path))


def test_csv(table_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ufeff" + CSV, encoding="utf-8")  # as spreadsheets write it
    assert answers(table_bundle, path) == ANSWERS
    tabs = tmp_path / "rows.tsv"
    tabs.write_text(CSV.replace(",", "\t"), encoding="utf-8")
    assert answers(table_bundle, tabs) == ANSWERS


def test_jsonl(table_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"age": 1.5, "income": 2, "plan": "a", "x": []}\n\n{"age": null, "income": 5, "plan": null}\n')
    assert answers(table_bundle, path) == ANSWERS[:2]


def test_parquet(table_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"age": [1.5, None], "plan": ["a", None], "income": [2, 5], "more": [1, 2]}), path)
    assert answers(table_bundle, path) == ANSWERS[:2]


def test_many_chunks_keep_their_order(digits_bundle: Path, tmp_path: Path) -> None:
    rows = 2 * CHUNK_ROWS + 3
    pixels = np.random.default_rng(0).integers(0, 17, (rows, 64))
    path = tmp_path / "rows.csv"
    header = ",".join(f"p{i}" for i in range(64))
    path.write_text(header + "\n" + "\n".join(",".join(map(str, row)) for row in pixels.tolist()) + "\n")
    found = answers(digits_bundle, path)
    assert len(found) == rows
    single = tmp_path / "one.csv"
    single.write_text(header + "\n" + ",".join(map(str, pixels[-1].tolist())) + "\n")
    (last,) = answers(digits_bundle, single)
    assert found[-1]["label"] == last["label"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "age,plan\n1,a\n", "a.csv: lacks 1 of 3 columns that the model reads: income"),
        ("a.csv", "", "a.csv: is empty"),
        ("a.csv", "age,income,plan\n", "a.csv: has no rows"),
        ("a.csv", "age,income,plan\n1,2,a\nold,2,a\n", "a.csv row 2: age: want a number, got 'old'"),
        ("a.csv", "age,income,plan\n1,2,a\n1,2\n", "a.csv row 2: has 2 cells, the header has 3"),
        ("a.csv", "age,income,plan\ninf,2,a\n", "a.csv row 1: age: want a number, got 'inf'"),
        ("a.jsonl", "{\n", "a.jsonl row 1: is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl row 1: want an object by column"),
        ("a.jsonl", '{"age": 1}\n', "a.jsonl: lacks 2 of 3 columns that the model reads: income, plan"),
        (
            "a.jsonl",
            '{"age": 1, "income": 2, "plan": "a"}\n{"age": 1, "plan": "a"}\n',
            "a.jsonl row 2: income: missing",
        ),
        ("a.parquet", "not parquet", "a.parquet: cannot be read as Parquet"),
        ("a.xls", "", "a.xls: want a file that ends in .csv"),
    ],
)
def test_bad_files_name_file_and_row(table_bundle: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        answers(table_bundle, path)
    assert raised.value.message.startswith(message)


def test_a_wrong_encoding_and_a_missing_file(table_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("age,income,plan\n1,2,é\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.csv: cannot be read as UTF-8 CSV"):
        answers(table_bundle, path)
    with pytest.raises(InputError, match="does not exist"):
        answers(table_bundle, tmp_path / "absent.csv")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120))
def test_any_csv_is_answered_or_refused(
    table_bundle: Path, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.csv"
    path.write_text("age,income,plan\n" + text, encoding="utf-8", errors="surrogatepass")
    bundle = open_bundle(table_bundle)
    rows, message = [], "a.csv"
    try:
        rows = [number for chunk in read_chunks(bundle.signature, whole(path)) for number in chunk.numbers]
        found = list(predict_file(bundle, "fp32", path))
    except InputError as error:
        message, found = error.message, rows
    assert message.startswith("a.csv")
    assert len(found) == len(rows)
