"""The meter on a fake clock: interleaving, ratios, intervals, budgets. No real time is measured."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.formats.meter import Budget, choose_clock, measure_interleaved, median_interval


class Machine:
    """Calls that take as long as told, on a clock that only they move; `load` slows everything down."""

    def __init__(self) -> None:
        self.now = 0
        self.load = 1.0
        self.calls: list[str] = []

    def clock(self) -> int:
        return self.now

    def call(self, name: str, cost_ns: int):
        def run() -> None:
            self.calls.append(name)
            self.now += int(cost_ns * self.load)

        return run


def test_speedups_are_ratios_to_the_base() -> None:
    machine = Machine()
    calls = {"fp32": machine.call("fp32", 200_000), "int8": machine.call("int8", 100_000)}
    timings = measure_interleaved(calls, "fp32", Budget(), machine.clock)
    assert timings["fp32"].speedup == 1.0
    assert timings["int8"].speedup == pytest.approx(2.0, rel=1e-6)
    assert timings["int8"].p50_s == pytest.approx(1e-4, rel=1e-6)
    assert timings["int8"].low <= timings["int8"].speedup <= timings["int8"].high


def test_a_load_that_comes_and_goes_cancels_out() -> None:
    machine = Machine()
    rng = np.random.default_rng(0)

    def noisy(name: str, cost_ns: int):
        inner = machine.call(name, cost_ns)

        def run() -> None:
            if name == "fp32":
                machine.load = float(rng.uniform(1, 20))  # the same disturbance for the round that follows
            inner()

        return run

    calls = {"fp32": noisy("fp32", 400_000), "other": noisy("other", 300_000)}
    timings = measure_interleaved(calls, "fp32", Budget(max_rounds=100), machine.clock)
    assert timings["other"].low <= 4 / 3 <= timings["other"].high


def test_everybody_takes_turns_and_nobody_is_always_first() -> None:
    machine = Machine()
    calls = {name: machine.call(name, 1_000_000) for name in ("a", "b", "c")}
    measure_interleaved(calls, "a", Budget(min_rounds=20, max_rounds=20), machine.clock)
    rounds = np.array(machine.calls[-120:]).reshape(20, 3, 2)  # each slot: one untimed call, one timed
    assert (rounds[:, :, 0] == rounds[:, :, 1]).all()
    assert all(set(row) == {"a", "b", "c"} for row in rounds[:, :, 0])
    assert set(rounds[:, 0, 0]) == {"a", "b", "c"}
    assert len({tuple(row) for row in rounds[:, :, 0]}) >= 4


def test_short_calls_are_repeated_within_a_slot() -> None:
    machine = Machine()
    calls = {"a": machine.call("a", 1_000)}
    timing = measure_interleaved(calls, "a", Budget(max_rounds=9), machine.clock)["a"]
    assert len(machine.calls) > 9 * 100
    assert timing.p50_s == pytest.approx(1e-6)


def test_precise_measurements_stop_early_and_noisy_ones_at_the_limit() -> None:
    steady = Machine()
    calls = {"a": steady.call("a", 300_000), "b": steady.call("b", 200_000)}
    assert measure_interleaved(calls, "a", Budget(time_s=60), steady.clock)["b"].rounds <= 16
    rng = np.random.default_rng(1)
    noisy = Machine()

    def run() -> None:
        noisy.now += int(rng.uniform(100_000, 10_000_000))

    rounds = measure_interleaved({"a": run, "b": run}, "a", Budget(time_s=60, max_rounds=50), noisy.clock)["a"].rounds
    assert rounds == 50


def test_out_of_time_still_gives_the_least_number_of_rounds() -> None:
    machine = Machine()
    budget = Budget(time_s=0.0, min_rounds=9)
    assert measure_interleaved({"a": machine.call("a", 1000)}, "a", budget, machine.clock)["a"].rounds == 9


def test_the_base_must_be_measured_too() -> None:
    with pytest.raises(InputError, match="not among the calls"):
        measure_interleaved({"a": lambda: None}, "b")


def test_one_thread_is_timed_by_its_processor_time() -> None:
    assert choose_clock(1) is time.thread_time_ns
    assert choose_clock(2) is time.perf_counter_ns


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_encloses_the_median(values: list[float]) -> None:
    middle, low, high = median_interval(np.array(values))
    assert min(values) <= low <= middle <= high <= max(values)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        _, low, high = median_interval(rng.lognormal(0.0, 1.0, size=25))
        covered += low <= 1.0 <= high
    assert 0.93 <= covered / 1000 <= 0.99
