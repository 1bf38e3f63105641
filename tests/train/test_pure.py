"""Orders, batches, schedules, the table of frameworks: pure functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.core.extras import load
from millrace.core.spec import Train
from millrace.train import EVALUATE, EXPORT, TRAIN
from millrace.train.class_weights import class_weights
from millrace.train.frameworks_table import extras_of, framework_of
from millrace.train.rows import batch_bounds, row_order, step_seed
from millrace.train.schedules import SCHEDULES, learning_rate


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), rows=st.integers(0, 300))
def test_an_order_is_a_permutation_and_repeats(seed: int, epoch: int, rows: int) -> None:
    order = row_order(seed, epoch, rows)
    assert np.array_equal(np.sort(order), np.arange(rows))
    assert np.array_equal(order, row_order(seed, epoch, rows))


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {tuple(row_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_an_order_never_changes_between_releases() -> None:
    assert row_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@given(rows=st.integers(0, 500), size=st.integers(1, 70))
def test_batches_cover_every_row_once_and_none_but_the_only_has_one_row(rows: int, size: int) -> None:
    bounds = batch_bounds(rows, size)
    assert [row for start, end in bounds for row in range(start, end)] == list(range(rows))
    if size > 1 and rows > 1:
        assert all(end - start >= 2 for start, end in bounds)


@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 10**9), min_size=2, max_size=20, unique=True))
def test_steps_have_seeds_of_their_own_that_torch_takes(seed: int, steps: list[int]) -> None:
    seeds = [step_seed(seed, step) for step in steps]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@given(steps=st.integers(1, 400))
def test_schedules_stay_between_zero_and_the_peak(name: str, steps: int) -> None:
    rates = [learning_rate(name, 0.5, step, steps) for step in range(steps)]
    assert all(-1e-12 <= rate <= 0.5 + 1e-12 for rate in rates)


def test_schedules_have_their_shapes() -> None:
    assert [round(learning_rate("step", 1.0, step, 10), 3) for step in (0, 2, 3, 6, 9)] == [1, 1, 0.1, 0.01, 0.001]
    assert learning_rate("cosine", 1.0, 50, 101) == pytest.approx(0.5)
    assert learning_rate("linear", 1.0, 25, 101) == pytest.approx(0.75)
    assert learning_rate("one_cycle", 1.0, 30, 101) == pytest.approx(1.0)
    assert learning_rate("one_cycle", 1.0, 100, 101) < 1e-5


def test_frameworks_by_model() -> None:
    assert framework_of(Train(model="boosting")) == "sklearn"
    assert framework_of(Train(model="boosting", framework="lightgbm")) == "lightgbm"
    assert framework_of(Train(model="model.py:build", framework="sklearn")) == "sklearn"
    assert ("lightgbm", "sklearn") in extras_of(Train())
    assert ("tensorboardX", "torch") in extras_of(Train(model="m.py:build", tensorboard=True))


@pytest.mark.parametrize(
    "train",
    [Train(model="nonsense"), Train(framework="torch"), Train(model="linear", framework="lightgbm")],
)
def test_impossible_frameworks_are_refused(train: Train) -> None:
    with pytest.raises(InputError, match=r"train\.model"):
        framework_of(train)


def test_class_weights_by_name() -> None:
    weights = class_weights({"b": 3.0}, ["a", "b"], np.array([0, 1]))
    assert weights is not None
    assert weights.tolist() == [1.0, 3.0]
    with pytest.raises(InputError, match="no class 'c'"):
        class_weights({"c": 3.0}, ["a", "b"], np.array([0, 1]))


@pytest.mark.parametrize("stage", [TRAIN, EXPORT, EVALUATE])
def test_descriptors_name_what_exists(stage) -> None:  # type: ignore[no-untyped-def]
    assert callable(load(stage.implementation))
