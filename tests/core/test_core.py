"""Units, references, ids, settings, operations."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core import ids, settings
from millrace.core.errors import InputError, MillraceError, all_errors, from_dict
from millrace.core.operations.table import OPERATIONS
from millrace.core.refs import Ref
from millrace.core.states import RUN_TRANSITIONS, STEP_TRANSITIONS
from millrace.core.types import Event, Run, Step
from millrace.core.units import Share, format_size, parse_duration, parse_size


@given(st.floats(0, 100, allow_nan=False))
def test_percent_and_share_agree(value: float) -> None:
    assert Share.parse(f"{value}%") == pytest.approx(value / 100)
    assert Share.parse(value / 100) == pytest.approx(value / 100)


@pytest.mark.parametrize("value", ["101%", "-1%", "x", "", True, "1 apple", "2"])
def test_what_is_no_share(value: str | bool) -> None:
    with pytest.raises(InputError, match="want a share"):
        Share.parse(value)


@pytest.mark.parametrize(
    ("text", "size"), [("1k", 1000), ("1KiB", 1024), ("2 GB", 2 * 10**9), (17, 17), ("1.5MB", 1500000)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["-1", "MB", "1 PB", "1 2", True])
def test_what_is_no_size(text: str | bool) -> None:
    with pytest.raises(InputError, match="want a size"):
        parse_size(text)


def test_durations() -> None:
    assert [parse_duration(text) for text in ("1h", "2d", 3, "5m")] == [3600, 172800, 3, 300]
    with pytest.raises(InputError):
        parse_duration("soon")


@given(st.integers(0, 10**15))
def test_a_size_is_short(size: int) -> None:
    assert len(format_size(size)) <= 9


_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@given(_NAMES, st.none() | _NAMES, st.none() | _NAMES)
def test_a_reference_is_its_text(name: str, project: str | None, at: str | None) -> None:
    ref = Ref(kind="model", name=name, project=project, at=at)
    assert Ref.parse(str(ref)) == ref


@pytest.mark.parametrize("text", ["", "a b", "../x", "a/b/c", "model:", "a@", "@b", "run:x", "a\x00b", "ä"])
def test_what_is_no_model(text: str) -> None:
    with pytest.raises(InputError):
        Ref.parse(text, kind="model")


def test_ids_are_ordered_and_unique() -> None:
    made = [ids.new_id() for _ in range(2000)]
    assert made == sorted(set(made))
    assert all(len(one) == 32 for one in made)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_equal_values_have_equal_digests(value: dict[str, object]) -> None:
    shuffled = dict(reversed(value.items()))
    assert ids.digest_json(value) == ids.digest_json(shuffled)


def test_settings_come_from_the_nearest_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    (tmp_path / "user" / "millrace").mkdir(parents=True)
    (tmp_path / "user" / "millrace" / "settings.yaml").write_text("gc_keep_runs: 7\ncolor: never\n")
    (tmp_path / "settings.yaml").write_text("gc_keep_runs: 8\n")

    def value(name: str, environ: dict[str, str] | None = None, **flags: object) -> tuple[object, str]:
        found = settings.resolve_settings(flags, environ or {}, tmp_path)[name]
        return found.value, found.origin.split("/")[-1]

    assert value("gc_min_age_s") == (3600.0, "default")
    assert value("color") == ("never", "settings.yaml")
    assert value("gc_keep_runs") == (8, "settings.yaml")
    assert value("gc_keep_runs", {"MILLRACE_GC_KEEP_RUNS": "9"}) == (9, "environment MILLRACE_GC_KEEP_RUNS")
    assert value("gc_keep_runs", {"MILLRACE_GC_KEEP_RUNS": "9"}, gc_keep_runs=10) == (10, "flag --gc-keep-runs")
    with pytest.raises(InputError, match="wants int"):
        value("gc_keep_runs", {"MILLRACE_GC_KEEP_RUNS": "many"})
    (tmp_path / "settings.yaml").write_text("gc_keep_run: 8\n")
    with pytest.raises(InputError, match="unknown setting 'gc_keep_run'"):
        value("color")


def test_the_home_is_found_from_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "millrace.yaml").write_text("")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert settings.find_home(deep, environ={}) == tmp_path / ".millrace"


def test_errors_survive_a_round_trip() -> None:
    for error_type in all_errors():
        error = error_type("what failed", details={"line": 3})
        again = from_dict(error.to_dict())
        assert (type(again), again.message, again.hint, again.details) == (
            error_type, error.message, error.hint, error.details,
        )  # fmt: skip
    assert len({error.code for error in all_errors()}) == len(all_errors())
    assert type(from_dict({"code": "of.the.future", "message": "x"})) is MillraceError


def test_every_state_can_be_left_or_is_final() -> None:
    for table in (RUN_TRANSITIONS, STEP_TRANSITIONS):
        assert {state for targets in table.values() for state in targets} <= set(table)


def test_stored_data_of_a_newer_version_is_read() -> None:
    text = msgspec.json.encode({"id": "1", "run_id": "2", "name": "data", "stage": "data", "of_the_future": 1})
    assert msgspec.json.decode(text, type=Step).name == "data"
    assert Run(id="1").state == "pending"
    assert Event(at=0, actor="a", verb="v", subject="s").seq is None


def test_every_operation_is_whole() -> None:
    for operation in OPERATIONS.values():
        assert operation.summary.endswith(".")
        request = msgspec.convert(operation.example, operation.request)
        assert ":" in operation.subject(request)
        assert operation.path.startswith("/")
    routes = [(operation.method, operation.path) for operation in OPERATIONS.values()]
    assert len(set(routes)) == len(routes)
