"""The proposed spec: valid, short, and what `init --data` promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.core.spec import Evaluate, Monitor, Serve
from millrace.core.spec_errors import parse_spec
from millrace.core.spec_source import parse_yaml
from millrace.data.propose import project_name, propose, quote

CHURN = "customer_id,age,plan,note,churned\n" + "".join(
    f"7590-{i:04d},{i % 50 + 18},{'abc'[i % 3]},café {i % 5},{'Yes' if i % 4 else 'No'}\n" for i in range(200)
)

OPTIONAL = ("encoding", "ignore", "types")
DATA_KEYS = ("source", "label", "encoding", "task", "ignore", "types", "clean")


def test_churn(project):
    file = project.write("My Churn.csv", CHURN)
    text = propose(file, "churned", project.folder)
    value = parse_yaml(text, "millrace.yaml").value
    assert value["project"] == "my-churn"
    assert value["data"]["source"] == "My Churn.csv"
    assert value["data"]["ignore"] == ["customer_id"]
    assert value["data"]["task"] == "classification"
    assert "types" not in value["data"]
    assert '2 classes: "No" 25 %, "Yes" 75 %' in text


def test_what_is_proposed_is_a_spec_that_runs(project):
    file = project.write("t.csv", CHURN)
    facts, reader = project.run_spec(parse_spec(propose(file, "churned", project.folder)))
    assert facts["rows_kept"] == 200
    assert reader.manifest.features("number", "category") == ["age", "plan", "note"]


def test_close_guesses_and_encodings_are_said(project):
    text = CHURN.replace(",30,", ",thirty,", 1)
    file = project.write("t.csv", text.encode("cp1252"))
    value = parse_yaml(propose(file, "churned", project.folder), "millrace.yaml").value
    assert value["data"]["encoding"] == "cp1252"
    assert value["data"]["types"] == {"age": "number"}


PLAIN = "age,plan,churned\n" + "".join(f"{i % 50 + 18},{'abc'[i % 3]},{'Yes' if i % 4 else 'No'}\n" for i in range(200))
MANY = "".join(f"id_{column}," for column in range(30))
WIDE = f"{MANY}x,y\n" + "".join("".join(f"{i}-{c}," for c in range(30)) + f"{i % 7},{i * 0.5}\n" for i in range(100))


@pytest.mark.parametrize(
    ("content", "label", "keys", "defaults"),
    [
        (PLAIN.encode(), "churned", [], ["serve", "monitor", "evaluate"]),
        (CHURN.encode(), "churned", ["ignore"], ["serve", "monitor"]),
        (CHURN.encode("cp1252"), "churned", ["encoding", "ignore"], ["serve"]),
        (CHURN.replace(",30,", ",thirty,", 1).encode("cp1252"), "churned", ["encoding", "ignore", "types"], []),
        (WIDE.encode(), "y", ["ignore"], ["serve", "monitor"]),
    ],
    ids=["plain", "ids", "encoding", "types", "wide"],
)
def test_twelve_lines_for_every_table(project, content, label, keys, defaults):
    text = propose(project.write("2024.csv", content), label, project.folder)
    assert len(text.splitlines()) == 12
    value = parse_yaml(text, "millrace.yaml").value
    assert list(value["data"]) == [key for key in DATA_KEYS if key in keys or key not in OPTIONAL]
    assert list(value)[2:] == ["train", "compress", "register", *defaults]
    spec = parse_spec(text)
    assert spec.project == "2024"
    # What was left out is the default: the spec means the same as if it were there.
    assert (spec.serve, spec.monitor, spec.evaluate) == (Serve(), Monitor(), Evaluate())


def test_twelve_lines_for_real_tables(test_data):
    for path, label in (
        ("housing-california/housing.csv", "median_house_value"),
        ("ai4i-2020/ai4i2020.csv", "Machine failure"),
    ):
        text = propose(test_data / path, label, test_data)
        assert len(text.splitlines()) == 12
        assert parse_spec(text).data.label == label


def test_wrong_label_and_wrong_file(project):
    file = project.write("t.csv", CHURN)
    with pytest.raises(InputError, match="no column 'Churn'") as caught:
        propose(file, "Churn", project.folder)
    assert "did you mean 'churned'" in caught.value.hint
    with pytest.raises(InputError, match="does not exist"):
        propose(project.folder / "other.csv", "y")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_quoted_names_come_back_from_yaml(text):
    assert parse_yaml(f"a: {quote(text)}\n", "x.yaml").value == {"a": text}


@given(st.text(max_size=30).filter(lambda name: "/" not in name and "\0" not in name and name not in ("", ".", "..")))
def test_project_names_are_valid(name):
    value = project_name(Path(name))
    assert value
    assert value[0].isalnum()
    assert all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in value)
