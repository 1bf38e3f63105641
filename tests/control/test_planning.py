"""Steps, keys and the reasons of reruns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.control.planning import (
    KeyMaker,
    cache_key,
    check_before_work,
    explain,
    flatten,
    plan_steps,
)
from millrace.core.errors import ExtraMissingError, MillraceError, NotFoundError
from millrace.core.ports import StageDescriptor
from millrace.core.spec import Spec
from millrace.core.spec_errors import parse_spec
from millrace.core.types import Artifact
from millrace.wiring import STAGES

MINIMAL = "data: {source: a.csv, label: y}\n"


def spec_of(more: str = "") -> Spec:
    return parse_spec(MINIMAL + more)


def test_the_default_pipeline_is_in_order() -> None:
    names = [plan.name for plan in plan_steps(spec_of(), STAGES)]
    assert names == ["data", "train", "export", "evaluate", "compress", "register", "serve", "monitor"]


def test_own_steps_take_their_place_and_a_matrix_multiplies() -> None:
    spec = parse_spec(
        "steps:\n- {name: report, uses: s.py:report, needs: [sweep]}\n"
        "- {name: sweep, uses: s.py:sweep, matrix: {a: [1, 2], b: [x, y]}}\n"
    )
    plans = plan_steps(spec, STAGES)
    assert [plan.name for plan in plans] == ["sweep-0", "sweep-1", "sweep-2", "sweep-3", "report"]
    assert plans[3].params["values"] == {"a": 2, "b": "y"}
    assert set(plans[4].needs) == {"sweep-0", "sweep-1", "sweep-2", "sweep-3"}


def keys(folder: Path, more: str = "", step: str = "train") -> dict[str, str]:
    spec = spec_of(more)
    plan = next(plan for plan in plan_steps(spec, STAGES) if plan.name == step)
    inputs = {name: Artifact(digest="sha256:1", size_bytes=1) for name in plan.inputs}
    return KeyMaker(spec, folder, STAGES).parts(plan, inputs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "model.py").write_text("from part import size\ndef build(ctx): ...\n")
    (tmp_path / "part.py").write_text("size = 3\n")
    (tmp_path / "other.py").write_text("")
    return tmp_path


def test_a_key_changes_with_what_matters_only(folder: Path) -> None:
    own = 'train: {model: "model.py:build", epochs: 8}\n'
    before = keys(folder, own)
    assert keys(folder, own) == before
    assert keys(folder, own + "serve: {port: 9}\n") == before
    (folder / "other.py").write_text("changed = 1")
    assert keys(folder, own) == before
    (folder / "part.py").write_text("size = 4\n")
    after = keys(folder, own)
    assert cache_key(after) != cache_key(before)
    assert explain(before, after) == "part.py changed"


def test_the_reason_names_the_key_of_the_spec(folder: Path) -> None:
    before = keys(folder, "train: {epochs: 8}\n")
    assert explain(before, keys(folder, "train: {epochs: 5}\n")) == "train.epochs 8 → 5"


def test_changed_data_changes_the_data_step(folder: Path) -> None:
    before = keys(folder, step="data")
    (folder / "a.csv").write_text("x,y\n1,3\n")
    assert explain(before, keys(folder, step="data")) == "a.csv changed"


def test_missing_files_and_extras_are_found_before_work(folder: Path) -> None:
    spec = spec_of('train: {model: "modell.py:build"}\n')
    with pytest.raises(NotFoundError, match=r"train\.model: there is no file modell\.py"):
        check_before_work(spec, plan_steps(spec, STAGES), STAGES, folder)
    spec = parse_spec("data: {source: nothing.csv, label: y}")
    with pytest.raises(MillraceError, match=r"nothing\.csv"):
        check_before_work(spec, plan_steps(spec, STAGES), STAGES, folder)
    lacking = StageDescriptor(
        name="data", implementation="m:f", version="1", sections=("data",), extras=(("no_such_module", "data"),)
    )
    spec = spec_of()
    stages = {**STAGES, "data": lacking}
    with pytest.raises(ExtraMissingError, match="no_such_module") as caught:
        check_before_work(spec, plan_steps(spec, stages), stages, folder)
    assert caught.value.hint == "pip install 'millrace-ai[data]'"


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=8))
def test_a_key_does_not_depend_on_the_order(parts: dict[str, str]) -> None:
    assert cache_key(parts) == cache_key(dict(reversed(parts.items())))


@given(st.dictionaries(st.sampled_from("abcd"), st.integers() | st.dictionaries(st.sampled_from("xy"), st.booleans())))
def test_flatten_keeps_every_leaf(value: dict[str, object]) -> None:
    leaves = sum(max(1, len(item)) if isinstance(item, dict) else 1 for item in value.values())
    assert len(flatten(value, "s")) == max(1, leaves)
