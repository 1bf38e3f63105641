"""The spec: defaults, every problem at once, overrides, YAML 1.2, bombs."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from millrace.core.errors import MillraceError, NotFoundError, SpecError
from millrace.core.spec import Share, Spec
from millrace.core.spec_errors import load_spec, parse_spec, spec_schema
from millrace.core.spec_source import parse_yaml

DIGITS = """project: digits
data:
  source: digits.csv
  label: digit
  image: {columns: "p*", shape: [8, 8]}
  clean: [drop_duplicates, {drop_missing: digit}, {range: {columns: "p*", min: 0, max: 16}}]
  expect: {rows: ">=1000", classes: 10}
  split: {test: 600, validation: 150, stratify: true}
train: {model: "model.py:build", epochs: 8, batch_size: 32, optimizer: {name: adamw, lr: 2e-3}, schedule: one_cycle}
evaluate: {metrics: [accuracy, macro_f1], confidence: 0.95, slices: [digit]}
compress: {variants: auto, max_drop: 1pp, max_changed: 5%, batch_sizes: [1, 32]}
register: {model: digits, alias: champion, promote_if: not_worse}
serve: {port: 8080, threads: 1}
monitor: {false_alarms: 2%}
"""


def problems(text: str) -> list[dict[str, object]]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "millrace.yaml")
    return caught.value.details["problems"]


def test_the_template_spec_is_understood() -> None:
    spec = parse_spec(DIGITS)
    assert spec.data is not None
    assert [rule.chosen()[0] for rule in spec.data.clean] == ["drop_duplicates", "drop_missing", "range"]
    assert spec.train.optimizer.lr == 0.002
    assert spec.compress.max_drop == Share(0.01)
    assert spec.compress.batch_sizes == (1, 32)


def test_source_and_label_are_enough() -> None:
    spec = parse_spec("data: {source: a.csv, label: y}")
    assert spec.train.model == "auto"
    assert spec.compress.max_changed == Share(0.05)


def test_every_problem_is_reported_at_once_with_its_place() -> None:
    found = problems(
        "project: Digits\ndata:\n  source: 5\n  label: y\n  clean: [drop_duplicate]\n"
        "train: {epochs: ten, schedule: cosin}\ncompress: {max_drop: 500%}\ntrian: 3\n"
    )
    by_key = {problem["key"]: problem for problem in found}
    assert set(by_key) == {
        "project", "data.source", "data.clean[0].drop_duplicate", "train.epochs", "train.schedule",
        "compress.max_drop", "trian",
    }  # fmt: skip
    assert by_key["train.epochs"]["received"] == "'ten'"
    assert (by_key["train.epochs"]["line"], by_key["train.epochs"]["column"]) == (6, 17)
    assert by_key["train.schedule"]["hint"] == "did you mean 'cosine'?"
    assert by_key["trian"]["hint"] == "did you mean 'train'?"
    assert by_key["data.clean[0].drop_duplicate"]["hint"] == "did you mean 'drop_duplicates'?"


@pytest.mark.parametrize(
    ("text", "key", "rule"),
    [
        ("data: {source: a, label: y, split: {group: g, time: t}}", "data.split.group", "by group or by time"),
        ("data: {source: a, label: y, task: regression, split: {stratify: true}}", "data.split.stratify", "classes"),
        ("data: {source: a, label: y, ignore: [y]}", "data.ignore", "label"),
        ("data: {source: a, label: y}\ntrain: {precision: fp16, device: cpu}", "train.precision", "fp16"),
        ("data: {source: a, label: y, clean: [{range: {columns: a}}]}", "data.clean[0]", "min, max or both"),
        ("data: {source: a, label: y, expect: {rows: many}}", "data.expect.rows", "comparison"),
        ("data: {source: a, label: y, split: {test: 1.5}}", "data.split.test", "share"),
        ("steps: [{name: a, uses: s.py:f, needs: [b]}, {name: b, uses: s.py:f, needs: [a]}]", "steps", "circle"),
        ("steps: [{name: a, uses: s.py:f, needs: [c]}]", "steps[0].needs", "name of a step"),
        ("data: {source: a, label: y}\nlimits: {memory: lots}", "limits.memory", "size"),
        ("", "", "'data' is required"),
    ],
)
def test_impossible_combinations(text: str, key: str, rule: str) -> None:
    found = problems(text)
    assert [problem["key"] for problem in found] == [key]
    assert rule in str(found[0]["rule"])


def test_overrides_win_and_are_named_in_problems() -> None:
    spec = parse_spec(DIGITS, overrides=["train.epochs=5", "compress.max_drop=2pp", "data.ignore=[p00]"])
    assert (spec.train.epochs, spec.compress.max_drop) == (5, Share(0.02))
    assert spec.data is not None
    assert spec.data.ignore == ["p00"]
    with pytest.raises(SpecError, match=r"--set train\.epoch=5: train\.epoch: unknown key \(did you mean 'epochs'"):
        parse_spec(DIGITS, overrides=["train.epoch=5"])
    with pytest.raises(SpecError, match=r"want --set section\.key=value"):
        parse_spec(DIGITS, overrides=["nonsense"])


def test_yaml_is_1_2() -> None:
    value = parse_yaml("a: 1e-3\nb: no\nc: 2020-01-01\nd: 0o17\ne: 1_000\nf: 07\ng: ~\nh: true\ni: '5'\n", "x").value
    assert value == {
        "a": 0.001, "b": "no", "c": "2020-01-01", "d": "0o17", "e": "1_000", "f": 7, "g": None, "h": True, "i": "5",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [ls]",
        "a: &a [*a]",
        "a: &x [1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y]\n"
        "d: &w [*z,*z,*z,*z,*z,*z,*z,*z]\ne: [*w,*w,*w,*w,*w,*w,*w,*w]",
        "a: 1\na: 2",
        "[",
        "? [a, b]\n: c",
        "5",
        "[" * 200,
    ],
)
def test_bombs_tags_and_rubbish_end_in_one_clear_error(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "millrace.yaml")
    assert caught.value.details["problems"][0]["file"] == "millrace.yaml"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    try:
        assert isinstance(parse_spec(text), Spec)
    except SpecError as error:
        found = error.details["problems"]
        if not found:
            raise


_KEYS = ["data", "train", "source", "label", "clean", "split", "test", "epochs", "model", "steps", "x"]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(_JSON)
def test_any_value_is_a_spec_or_a_spec_error(value: object) -> None:
    try:
        parse_spec(json.dumps(value))
    except SpecError as error:
        found = error.details["problems"]
        if not found:
            raise


def test_the_published_schema_accepts_what_we_accept() -> None:
    validator = Draft202012Validator(spec_schema())
    validator.check_schema(spec_schema())
    assert validator.is_valid({"data": {"source": "a.csv", "label": "y"}, "compress": {"max_drop": "1pp"}})
    assert not validator.is_valid({"data": {"source": "a.csv"}})


def test_defaults_survive_a_round_trip() -> None:
    spec = parse_spec(DIGITS)
    text = msgspec.json.encode(spec, enc_hook=float)
    assert msgspec.json.decode(text, type=Spec, dec_hook=lambda _, value: Share.parse(value)) == spec


def test_a_missing_spec_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        load_spec(tmp_path / "millrace.yaml")
    assert "millrace init" in caught.value.hint
    (tmp_path / "millrace.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(MillraceError, match="not UTF-8"):
        load_spec(tmp_path / "millrace.yaml")
