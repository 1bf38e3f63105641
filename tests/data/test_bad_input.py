"""Every kind of bad data ends in one clear DataError that names the file, or in counted rejections."""

from __future__ import annotations

import gzip

import numpy as np
import polars as pl
import pytest

from millrace.core.errors import DataError

ROWS = "".join(f"{i},{i % 7},{'ab'[i % 2]}\n" for i in range(40))
GOOD = "a,b,y\n" + ROWS


def refusal(project, **section) -> DataError:
    with pytest.raises(DataError) as caught:
        project.run(**section)
    assert caught.value.message
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["t.csv", "empty"]),
        ("\n\n \n", ["t.csv", "empty"]),
        ("a,b,y\n", ["t.csv", "header but no rows"]),
        ("a,b,y", ["t.csv", "header but no rows"]),
        ("a,a,y\n1,2,3\n", ["t.csv", "two columns named 'a'", "1 and 2"]),
        ("Age,age,y\n1,2,3\n", ["t.csv", "'Age' and 'age'", "case"]),
        ("a,,y\n1,2,3\n", ["t.csv", "column 2"]),
        (GOOD + "1,2\n", ["t.csv row 41", "2 cells", "3"]),
        ("a,b,y\n1,2,a\n1,2,3,b\n" + ROWS, ["t.csv row 2", "4 cells", "3"]),
        (GOOD.encode() + b"1,\xe9,a\n", ["t.csv", "utf-8", "0xe9", "row 41"]),
        (GOOD.encode("utf-16"), ["t.csv", "utf-8"]),
        (GOOD.replace("b\n", "a\n"), ["one class", "'y'", "'a'"]),
        ("a,b,y\n" + "1,2,\n" * 30, ["t.csv", "30 unlabelled"]),
        ("y\n" + "a\nb\n" * 20, ["no column is left"]),
        ("__millrace_row,y\n1,2\n", ["reserved"]),
        ("a,y\n" + "1,x\n2,z\n" * 20 + "3,rare\n", ["'rare'", "t.csv row 41", "missing in the t"]),
        ('a,b,y\n1,2,"a\n' + ROWS, ["t.csv row 1", "quote"]),
        ('a,"b,y\n' + ROWS, ["t.csv row 0", "quote"]),
    ],
)
def test_bad_csv_is_refused_by_name(project, content, words):
    project.write("t.csv", content)
    message = refusal(project).message
    assert all(word in message for word in words), message
    assert len(message) < 500


@pytest.mark.parametrize("content", ["", "\n\n \n", "a,b,y\n", "a,b,y"])
def test_a_file_without_rows_gets_its_own_hint(project, content):
    project.write("t.csv", content)
    assert "written to its end" in refusal(project).hint


def test_a_long_name_does_not_make_a_long_message(project):
    name = "x" * 1_000_000
    project.write("t.csv", f"{name},{name},y\n1,2,3\n")
    assert len(refusal(project).message) < 500
    project.write("t.csv", f"{name},b,y\n" + ROWS)
    error = refusal(project, label="z")
    assert len(error.message) + len(error.hint) < 1000


SAID = ('He said "ok', '"Well" she', '"all of it"', "none")
PLAIN = "label\ttext\tn\n" + "".join(f"{'ham' if i % 3 else 'spam'}\t{SAID[i % 4]}\t{i % 7}\n" for i in range(60))


def test_quotes_that_cannot_quote_belong_to_the_text(project):
    project.write("t.tsv", PLAIN)
    facts, reader = project.run(source="t.tsv", label="label", types={"text": "category"})
    assert facts["rows_kept"] == 60
    assert "t.tsv: 45 rows hold quotes that belong to the text: read without quoting" in facts["warnings"]
    texts = {value for split in ("train", "test") for value in reader.table(split, ["text"]).column("text").to_pylist()}
    assert texts == set(SAID)


def test_quotes_that_quote_still_do(project):
    lines = "".join(f'{"ham" if i % 3 else "spam"}\t"a ""b""\tc\nd"\t{i % 7}\n' for i in range(60))
    project.write("t.tsv", "label\ttext\tn\n" + lines)
    facts, reader = project.run(source="t.tsv", label="label", types={"text": "category"})
    assert facts["rows_kept"] == 60
    assert not any("quot" in warning for warning in facts["warnings"])
    assert set(reader.table("test", ["text"]).column("text").to_pylist()) == {'a "b"\tc\nd'}


def test_a_quote_among_ragged_lines_is_still_refused_by_row(project):
    project.write("t.tsv", PLAIN + "ham\tx\n")
    error = refusal(project, source="t.tsv", label="label")
    assert "t.tsv row 2 opens a quote" in error.message
    assert "quotes are text where every line has as many cells as the header" in error.hint


def test_public_text_messages(project, test_data):
    text = (test_data / "sms-spam" / "SMSSpamCollection.tsv").read_text(encoding="utf-8")
    project.write("sms.tsv", "label\ttext\n" + text)
    facts, _ = project.run(source="sms.tsv", label="label", types={"text": "category"})
    assert facts["rows_in"] == 5574
    assert "sms.tsv: 145 rows hold quotes that belong to the text: read without quoting" in facts["warnings"]


INDEXED = ",a,b,y\n" + "".join(f"{i % 5},{i},{i % 7},{'ab'[i % 2]}\n" for i in range(40))


def test_a_first_column_without_a_name_is_an_index(project):
    project.write("t.csv", INDEXED)
    facts, reader = project.run()
    assert any(
        warning.startswith("t.csv: the first column has no name: called 'index'") for warning in facts["warnings"]
    )
    assert {column.name: column.role for column in reader.manifest.columns}["index"] == "ignored"
    assert "index" not in reader.signature_inputs()[0].columns
    _, used = project.run(types={"index": "number"})
    assert "index" in used.signature_inputs()[0].columns


def test_the_index_of_many_files_and_a_name_that_is_taken(project):
    for part in range(6):
        project.write(f"p{part}.csv", INDEXED.replace("b,y", "Index,y"))
    facts, reader = project.run(source="p*.csv")
    assert reader.manifest.columns[0].name == "index_2"
    notes = [warning for warning in facts["warnings"] if "no name" in warning or "more notes" in warning]
    assert len(notes) == 5
    assert notes[-1] == "2 more notes of this kind on other files"
    project.write("t.csv", ",y\n1,2\n")
    assert "no column is left" in refusal(project, source="p0.csv", ignore=["a", "Index"]).message


def test_missing_file_is_named_with_what_is_there(project):
    project.write("other.csv", GOOD)
    error = refusal(project)
    assert "'t.csv' does not exist" in error.message
    assert "other.csv" in error.hint


def test_misspelt_label_gets_a_suggestion(project):
    project.write("t.csv", GOOD.replace("a,b,y", "a,b,churned"))
    error = refusal(project, label="churnd")
    assert "'churnd'" in error.message
    assert "did you mean 'churned'" in error.hint


@pytest.mark.parametrize("key", ["ignore", "types", "clean", "time", "key"])
def test_misspelt_columns_are_named(project, key):
    project.write("t.csv", GOOD)
    sections = {
        "ignore": {"ignore": ["bb"]},
        "types": {"types": {"bb": "number"}},
        "clean": {"clean": [{"range": {"columns": "bb", "min": 0}}]},
        "time": {"split": {"time": "bb"}},
        "key": {"split": {"key": "bb"}},
    }
    error = refusal(project, **sections[key])
    assert "'bb'" in error.message
    assert "columns: a, b, y" in error.hint


def test_wrong_encoding_is_read_once_it_is_named(project):
    project.write("t.csv", b"a,name,y\n" + b"".join(b"%d,r\xe9 %d,%d\n" % (i, i % 3, i % 2) for i in range(30)))
    assert "cp1252" in refusal(project).hint
    facts, _ = project.run(encoding="latin-1")
    assert facts["rows_kept"] == 30
    assert "nonsense" in refusal(project, encoding="nonsense").message


def test_truncated_gzip_and_not_gzip(project):
    packed = gzip.compress(GOOD.encode())
    project.write("t.csv.gz", packed)
    assert project.run(source="t.csv.gz")[0]["rows_in"] == 40
    project.write("t.csv.gz", packed[:-20])
    assert "t.csv.gz is cut off" in refusal(project, source="t.csv.gz").message
    project.write("t.csv.gz", b"plain text, no gzip")
    assert "t.csv.gz is not a gzip file" in refusal(project, source="t.csv.gz").message
    flipped = bytearray(packed)
    flipped[30] ^= 0xFF
    project.write("t.csv.gz", bytes(flipped))
    assert "t.csv.gz" in refusal(project, source="t.csv.gz").message


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_parquet_that_is_not_one(project, content):
    project.write("t.parquet", content)
    assert "t.parquet is not a Parquet file" in refusal(project, source="t.parquet").message


def test_parquet_without_rows_and_with_odd_columns(project):
    frame = pl.DataFrame({"a": [1.0], "y": ["a"], "odd": [[1, 2]]})
    frame.clear().write_parquet(project.folder / "t.parquet")
    assert "no rows" in refusal(project, source="t.parquet").message
    many = pl.concat(
        [frame.with_columns(pl.lit(name).alias("y"), pl.lit(float(i)).alias("a")) for i in range(20) for name in "ab"]
    )
    many.write_parquet(project.folder / "t.parquet")
    facts, reader = project.run(source="t.parquet")
    assert any(warning.startswith("odd has no values") for warning in facts["warnings"])
    assert reader.arrays("test")["numbers"].shape[1] == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "row 3 is not JSON"),
        ("[1]", "row 3: want a JSON object, got list"),
        ('{"a": [1]}', "row 3: 'a' holds a list"),
    ],
)
def test_bad_json_lines_name_the_row(project, line, words):
    project.write("t.jsonl", '{"a": 1, "y": 0}\n\n{"a": 2, "y": 1}\n' + line + "\n")
    assert words in refusal(project, source="t.jsonl").message


def test_all_null_column_is_ignored_with_a_warning(project):
    project.write("t.csv", "a,empty,y\n" + "".join(f"{i % 13},,{'ab'[i % 2]}\n" for i in range(40)))
    facts, reader = project.run()
    assert "empty has no values: ignored" in facts["warnings"]
    assert [column.role for column in reader.manifest.columns if column.name == "empty"] == ["ignored"]


def test_nan_is_missing_and_infinite_is_rejected(project):
    values = ["NaN", "inf", "-inf", "1e300", "1e999"] + [str(i * 0.5) for i in range(40)]
    project.write("t.csv", "a,y\n" + "".join(f"{v},{'ab'[i % 2]}\n" for i, v in enumerate(values)))
    facts, reader = project.run()
    assert facts["rejected_by_reason"] == {"range": 4}
    numbers = np.concatenate([reader.arrays(split)["numbers"] for split in ("train", "validation", "test")])
    assert np.isnan(numbers).sum() == 1
    assert not np.isinf(numbers).any()


def test_nan_in_parquet_numbers_and_label(project):
    frame = pl.DataFrame(
        {
            "a": [float("nan"), float("inf"), *map(float, range(60))],
            "y": [0.5, 0.5, float("nan"), *(i / 7 for i in range(59))],
        }
    )
    frame.write_parquet(project.folder / "t.parquet")
    facts, _ = project.run(source="t.parquet")
    assert facts["task"] == "regression"
    assert facts["rejected_by_reason"] == {"range": 1, "unlabelled": 1}


def test_mixed_types_reject_the_few_and_keep_the_many(project):
    project.write("t.csv", "a,y\n" + "".join(f"{'oops' if i == 7 else i * 0.1},{'ab'[i % 2]}\n" for i in range(40)))
    facts, _ = project.run()
    assert facts["rejected_by_reason"] == {"type": 1}
    sample = facts["samples"][0]
    assert (sample["file"], sample["row"], sample["column"], sample["value"]) == ("t.csv", 8, "a", "oops")


def test_million_character_cell(project):
    huge = "x" * 1_000_000
    project.write(
        "t.csv", "a,c,y\n" + "".join(f"{i},{huge if i == 3 else 'uv'[i % 2]},{'ab'[i % 2]}\n" for i in range(40))
    )
    facts, _ = project.run()
    assert facts["rejected_by_reason"] == {"too long": 1}
    assert facts["samples"][0]["value"] == "x" * 170 + "… (1000000 characters)"
    assert facts["samples"][0]["row"] == 4
    project.write("t.csv", "a,y\n" + "".join(f"{i},{huge if i == 3 else 'ab'[i % 2]}\n" for i in range(40)))
    assert project.run()[0]["rejected_by_reason"] == {"too long": 1}


def test_files_of_one_source_must_agree(project):
    project.write("t1.csv", GOOD)
    project.write("t2.csv", "a,c,y\n1,2,3\n")
    error = refusal(project, source="t*.csv")
    assert "t2.csv" in error.message
    assert "'b'" in error.message
    project.write("t2.parquet", b"")
    assert "mixes formats" in refusal(project, source=["t1.csv", "t2.parquet"]).message
    project.write("t.xyz", "hello")
    assert "no known format" in refusal(project, source="t.xyz").message


def test_text_label_cannot_be_regressed_and_identifier_cannot_be_classes(project):
    project.write("t.csv", GOOD)
    assert "regression wants numbers" in refusal(project, task="regression").message
    project.write("t.csv", "a,y\n" + "".join(f"{i % 5},name{i}\n" for i in range(1200)))
    assert "1200 classes" in refusal(project).message


def test_too_few_rows(project):
    project.write("t.csv", "a,y\n1,a\n2,b\n")
    assert "left to train" in refusal(project).message
