"""Built-in sets: real rows without a file, the same digest every time, misspelt names helped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

from millrace.core.errors import DataError, ExtraMissingError
from millrace.core.spec import Data
from millrace.core.spec_errors import load_spec
from millrace.data import builtin
from millrace.data.builtin import BUILTINS, builtin_of, bundled_files
from millrace.data.builtin_rows import read_builtin
from millrace.data.propose import propose
from millrace.data.source_files import source_digests

LOADED = {
    "breast_cancer": load_breast_cancer,
    "diabetes": lambda: load_diabetes(scaled=False),
    "digits": load_digits,
    "iris": load_iris,
    "wine": load_wine,
}


@pytest.mark.parametrize("name", BUILTINS)
def test_every_set_runs_with_its_own_label(name, project):
    wanted = LOADED[name]()
    facts, reader = project.run(source=f"builtin:{name}", label=BUILTINS[name].label)
    assert (facts["rows_in"], facts["rejected"]) == (len(wanted.data), 0)
    assert facts["task"] == BUILTINS[name].task
    assert facts["files"] == [f"builtin:{name}"]
    assert reader.arrays("train")["numbers"].shape[1] == wanted.data.shape[1]
    if facts["task"] == "classification":
        names = [str(one) for one in wanted.target_names]
        assert facts["classes"] == {label: int(np.sum(wanted.target == names.index(label))) for label in sorted(names)}
    again, _ = project.run(source=f"builtin:{name}", label=BUILTINS[name].label)
    assert again["content_digest"] == facts["content_digest"]


@pytest.mark.parametrize("name", BUILTINS)
def test_rows_are_those_of_the_library(name):
    frame, wanted = read_builtin(name), LOADED[name]()
    assert frame.columns[-1] == BUILTINS[name].label
    np.testing.assert_array_equal(frame.drop(BUILTINS[name].label).to_numpy(), wanted.data)
    assert all(column.replace("_", "").replace("/", "").isalnum() for column in frame.columns)


def test_digits_can_be_images(project):
    facts, reader = project.run(source="builtin:digits", label="digit", image={"columns": "p*", "shape": [8, 8]})
    assert facts["image"] == [8, 8]
    assert reader.arrays("test")["pixels"].max() == 16.0


@pytest.mark.parametrize("name", BUILTINS)
def test_the_digests_are_of_the_bundled_files(name):
    digests = source_digests(Data(source=f"builtin:{name}", label="y"), Path("nowhere"))
    assert [key.split()[0] for key in digests] == [f"builtin:{name}"] * len(BUILTINS[name].files)
    assert all(digest.startswith("sha256:") for digest in digests.values())
    assert digests == source_digests(Data(source=f"builtin:{name}", label="y"), Path("elsewhere"))


def test_unknown_names_get_a_suggestion_and_the_list(project):
    for ask in (lambda: project.run(source="builtin:irsi"), lambda: builtin_of(["builtin:irsi"])):
        with pytest.raises(DataError, match="there is no built-in set 'irsi'") as caught:
            ask()
        assert caught.value.hint.startswith("did you mean 'iris'? built-in sets: ")
        assert all(name in caught.value.hint for name in BUILTINS)


def test_a_misspelt_label_lists_the_columns(project):
    with pytest.raises(DataError, match="builtin:iris does not have") as caught:
        project.run(source="builtin:iris", label="specis")
    assert "did you mean 'species'" in caught.value.hint


def test_a_set_stands_alone(project):
    project.write("t.csv", "a,y\n1,2\n")
    with pytest.raises(DataError, match="a built-in set stands alone"):
        project.run(source=["builtin:iris", "t.csv"])
    assert project.run(source=["builtin:iris"], label="species")[0]["rows_in"] == 150


def test_what_is_missing_is_said_before_any_work(monkeypatch):
    monkeypatch.setitem(BUILTINS, "gone", builtin.Builtin("y", "classification", ("no-such-file.csv",)))
    with pytest.raises(DataError, match=r"the built-in set gone is not in scikit-learn .*no-such-file"):
        bundled_files("gone")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match="the built-in set iris needs sklearn") as caught:
        bundled_files("iris")
    assert "millrace-ai[sklearn]" in caught.value.hint


def test_init_writes_a_spec_for_a_builtin_set(tmp_path: Path) -> None:
    text = propose(Path("builtin:iris"), "species", tmp_path)
    assert "project: iris" in text
    (tmp_path / "millrace.yaml").write_text(text)
    spec, _ = load_spec(tmp_path / "millrace.yaml")
    assert (spec.data.source, spec.data.label) == ("builtin:iris", "species")
