"""Aliases, roll-back, the gate: by table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.control.commits import move_alias
from millrace.control.gate import judge_challenger
from millrace.control.models import rollback_target
from millrace.core.errors import ConflictError
from millrace.core.ports import Records
from millrace.core.spec import Register
from millrace.core.types import Alias
from millrace.store.records_sql import open_records


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    opened = open_records(tmp_path / "records.db")
    yield opened
    opened.close()


def move(records: Records, number: int, reason: str = "", expect: int | None = None) -> Alias:
    with records.transaction() as transaction:
        return move_alias(transaction, "digits", "champion", number, at=1.0, reason=reason, expect=expect)


def test_an_alias_remembers_and_is_compared_before_it_moves(records: Records) -> None:
    move(records, 1)
    move(records, 2, expect=1)
    with pytest.raises(ConflictError, match="is at version 2, not 1"):
        move(records, 3, expect=1)
    alias = move(records, 3)
    assert [entry["to"] for entry in alias.history] == [1, 2, 3]


def test_rolling_back_twice_goes_back_twice(records: Records) -> None:
    for number in (1, 2, 3):
        alias = move(records, number)
    assert rollback_target(alias) == 2
    alias = move(records, 2, reason="rollback: bad")
    assert rollback_target(alias) == 1
    alias = move(records, 1, reason="rollback: worse")
    assert rollback_target(alias) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_rollback_never_goes_to_the_present_move(numbers: list[int]) -> None:
    history = [{"to": number, "reason": ""} for number in numbers]
    alias = Alias(id="m/a", model="m", name="a", number=numbers[-1], history=history)
    moves = [number for number, before in zip(numbers, [None, *numbers], strict=False) if number != before]
    assert rollback_target(alias) == (moves[-2] if len(moves) > 1 else None)


def gate(rule: Register, right: np.ndarray, champion: np.ndarray, looks: int = 1):  # type: ignore[no-untyped-def]
    """Two-class answers from what is right: labels are all 1."""

    def outputs(is_right: np.ndarray) -> dict[str, np.ndarray]:
        share = np.where(is_right, 0.9, 0.1)
        return {"probabilities": np.stack([1 - share, share], axis=1)}

    labels = np.ones(len(right), np.int64)
    return judge_challenger(
        rule, "classification", labels, challenger=outputs(right), champion=outputs(champion),
        champion_name="digits v1", looks=looks, confidence=0.95,
    )  # fmt: skip


def rights(rows: int, wrong: int) -> np.ndarray:
    found = np.ones(rows, bool)
    found[:wrong] = False
    return found


@pytest.mark.parametrize(
    ("promote_if", "rows", "challenger_wrong", "champion_wrong", "verdict"),
    [
        ("not_worse", 2000, 20, 20, "promoted"),
        ("not_worse", 2000, 10, 20, "promoted"),
        ("not_worse", 2000, 200, 20, "kept"),
        ("not_worse", 60, 3, 1, "undecided"),
        ("better", 2000, 20, 20, "kept"),
        ("better", 2000, 20, 200, "promoted"),
        ("always", 2000, 2000, 0, "promoted"),
        ("never", 2000, 0, 2000, "kept"),
    ],
)
def test_the_gates_table(promote_if: str, rows: int, challenger_wrong: int, champion_wrong: int, verdict: str) -> None:
    rule = Register(promote_if=promote_if)  # type: ignore[arg-type]
    facts = gate(rule, rights(rows, challenger_wrong), rights(rows, champion_wrong))
    assert facts.verdict == verdict
    assert facts.wins + facts.losses + facts.ties == rows
    assert facts.explanation
    if verdict == "undecided":
        assert facts.rows_needed is not None
        assert facts.rows_needed > rows
        assert "rows needed" in facts.explanation


def test_looks_at_the_same_rows_are_said() -> None:
    facts = gate(Register(), rights(2000, 20), rights(2000, 20), looks=3)
    assert "judged 3 times" in facts.explanation


def test_regression_is_judged_by_absolute_errors() -> None:
    generator = np.random.default_rng(0)
    labels = generator.normal(size=1000).astype(np.float32)
    champion = labels + generator.normal(scale=0.5, size=1000)
    for factor, verdict in ((0.9, "promoted"), (1.5, "kept")):
        challenger = labels + (champion - labels) * factor
        facts = judge_challenger(
            Register(), "regression", labels, challenger={"value": challenger[:, None]},
            champion={"value": champion[:, None]}, champion_name="m v1", looks=1, confidence=0.95,
        )  # fmt: skip
        assert facts.verdict == verdict
