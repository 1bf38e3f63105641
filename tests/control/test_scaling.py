"""How many replicas: what each kind of load needs, no flapping over a day, waits that stay short."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.control.scaling import UTILISATION, Bounds, Load, Meter, Scaler, need
from millrace.serve.telemetry import TelemetryFrame

FIXED: dict[str, Any] = {"in_flight": 10.0, "window_s": 10.0, "down_s": 60.0, "zero_s": 30.0, "queue_s": 1.0}
IDLE = Load(replicas=1)


def scaler(least: int, most: int, replicas: int = 1) -> Scaler:
    return Scaler(Bounds(least=least, most=most, **FIXED), 0.0, replicas)


@pytest.mark.parametrize(
    ("load", "in_flight", "rows_per_s", "wanted"),
    [
        (Load(), 0.0, 0.0, 1),
        (Load(), 10.0, 0.0, 1),
        (Load(), 10.5, 0.0, 1),  # within the tolerance
        (Load(), 12.0, 0.0, 2),
        (Load(row_s=0.1), 0.0, 7.0, 1),  # 0.7 of its time
        (Load(row_s=0.1), 0.0, 20.0, 3),
        (Load(waiting=10, row_s=0.1), 0.0, 0.0, 2),  # 1 s of work waits, half of it may
        (Load(waiting=10, row_s=0.1, requests=5, rows=20), 0.0, 0.0, 8),  # each has 4 rows
        (Load(waiting=10, row_s=0.1), 45.0, 2.0, 5),  # the largest of the three
    ],
)
def test_what_a_load_needs(load: Load, in_flight: float, rows_per_s: float, wanted: int) -> None:
    assert need(load, in_flight, rows_per_s, Bounds(most=64, **FIXED)) == wanted


def test_up_at_once_but_only_twofold_and_when_the_last_step_serves() -> None:
    one = scaler(1, 16)
    busy = Load(running=200, requests=1)
    found = []
    for now_s, serving in ((1, 1), (2, 1), (3, 2), (4, 4), (5, 6), (6, 8), (7, 16)):
        found.append(one.decide(float(now_s), Load(running=busy.running, requests=1, replicas=serving)))
    assert found == [2, 2, 4, 8, 8, 16, 16]


def test_down_only_to_what_nothing_within_the_time_needed() -> None:
    one = scaler(1, 16, replicas=1)
    for now_s in range(1, 4):
        one.decide(float(now_s), Load(running=40, replicas=one.replicas))
    assert one.replicas == 4
    at = {now_s: one.decide(float(now_s), Load(running=0, replicas=4)) for now_s in range(4, 90)}
    assert at[62] == 4
    assert at[75] == 1
    assert sorted(at.values(), reverse=True) == list(at.values())


def test_none_only_where_none_may_be_and_nobody_asked() -> None:
    one, kept = scaler(0, 4), scaler(1, 4)
    assert [one.decide(now_s, IDLE) for now_s in (10.0, 29.0, 30.0)] == [1, 1, 0]
    assert [kept.decide(now_s, IDLE) for now_s in (10.0, 29.0, 30.0)] == [1, 1, 1]
    assert one.decide(40.0, Load()) == 0
    assert one.decide(41.0, Load(knocks=True)) == 1
    assert one.decide(42.0, Load(knocks=True)) == 1  # it has not yet loaded
    assert one.decide(60.0, Load(running=1, replicas=1)) == 1  # a long request keeps it
    assert [one.decide(now_s, IDLE) for now_s in (89.0, 90.0)] == [1, 0]


def test_what_is_new_to_serve_starts_one() -> None:
    one = scaler(0, 4)
    assert one.decide(30.0, IDLE) == 0
    one.touch(31.0)
    assert [one.decide(now_s, IDLE) for now_s in (32.0, 60.0, 61.0)] == [1, 1, 0]


def test_other_bounds_count_at_once() -> None:
    one = scaler(1, 8, replicas=8)
    one.bounds = Bounds(least=1, most=3, **FIXED)
    assert one.decide(1.0, Load(replicas=8)) == 3
    one.bounds = Bounds(least=5, most=6, **FIXED)
    assert one.decide(2.0, Load(replicas=3)) == 5


def test_replicas_that_are_gone_wait_for_nobody() -> None:
    meter = Meter()
    meter.take(7, TelemetryFrame(version="1", waiting=5, running=1, row_s=0.2))
    meter.take(7, TelemetryFrame(version="2", waiting=2, row_s=0.4, counters={"rows": 8, "answered": 4, "failed": 2}))
    meter.take(8, TelemetryFrame(version="1", running=1, row_s=0.3, counters={"rows": 2, "answered": 1}))
    load = meter.read(2)
    assert (load.waiting, load.running, load.requests, load.rows, load.replicas) == (7, 2, 7, 14, 2)
    assert load.row_s == pytest.approx(0.3)
    meter.forget(7)
    after = meter.read(1)
    assert (after.waiting, after.running, after.requests, after.rows) == (0, 1, 0, 0)
    meter.forget(8)
    assert meter.read(0).row_s == 0.3  # what a row costs is still known


@settings(max_examples=60, deadline=None)
@given(
    least=st.integers(0, 3), more=st.integers(0, 8),
    loads=st.lists(
        st.tuples(st.floats(0.1, 40), st.integers(0, 100), st.floats(0, 200), st.booleans(), st.integers(0, 12)),
        min_size=1, max_size=30,
    ),
)  # fmt: skip
def test_within_bounds_and_never_more_than_twofold(
    least: int, more: int, loads: list[tuple[float, int, float, bool, int]]
) -> None:
    most = max(1, least + more)
    one, now_s = scaler(least, most, max(least, 1)), 0.0
    for pause_s, waiting, rows, knocks, serving in loads:
        now_s += pause_s
        load = Load(waiting=waiting, requests=rows, rows=rows, row_s=0.05, replicas=serving, knocks=knocks)
        before = one.replicas
        after = one.decide(now_s, load)
        assert least <= after <= most
        assert after <= max(2 * before, 1, least)
        assert after > 0 or not load.is_asked


class Day:
    """Requests come in waves, as over a day; replicas answer them in order. Seconds, not threads."""

    def __init__(self, one: Scaler, row_s: float, start_s: float) -> None:
        self.scaler, self.row_s, self.start_s = one, row_s, start_s
        self.backlog, self.replicas = 0.0, one.replicas
        self.starts: list[float] = []  # when those that were started serve
        self.waits: list[float] = []  # of each request, by and by
        self.counts = [one.replicas]

    def second(self, now_s: float, arrivals: int) -> None:
        self.starts, ready = [at for at in self.starts if at > now_s], sum(at <= now_s for at in self.starts)
        self.replicas += ready
        speed = self.replicas / self.row_s
        self.waits += [self.backlog / speed if speed else self.start_s] * arrivals
        answered = min(self.backlog + arrivals, speed)
        self.backlog += arrivals - answered
        load = Load(
            waiting=int(self.backlog), running=min(arrivals, self.replicas), requests=arrivals, rows=arrivals,
            row_s=self.row_s, replicas=self.replicas, knocks=not self.replicas and arrivals > 0,
        )  # fmt: skip
        wanted = self.scaler.decide(now_s, load)
        coming = self.replicas + len(self.starts)
        self.starts += [now_s + self.start_s] * (wanted - coming)
        if wanted < coming:
            self.starts = self.starts[: max(0, wanted - self.replicas)]
            self.replicas = min(self.replicas, wanted)
        if wanted != self.counts[-1]:
            self.counts.append(wanted)


def test_a_day_of_waves_moves_it_few_times_and_nobody_waits_long() -> None:
    day_s, row_s, peak = 7200, 0.02, 150.0  # 3 s of work a second at noon: with room, 5 replicas
    day = Day(Scaler(Bounds(least=1, most=8, down_s=300.0), 0.0, 1), row_s, start_s=2.0)
    chance = np.random.default_rng(7)
    rates = [peak * (1 - math.cos(2 * math.pi * now_s / day_s)) / 2 for now_s in range(day_s)]
    for now_s, rate in enumerate(rates):
        day.second(float(now_s), int(chance.poisson(rate)))
    peak_need = math.ceil(peak * row_s / UTILISATION)
    assert peak_need <= max(day.counts) <= peak_need + 1
    assert day.counts[-1] == 1
    assert len(day.counts) <= 2 * max(day.counts) + 2  # up once and down once, not up and down again
    waits = np.array(day.waits)
    assert float(np.quantile(waits, 0.99)) < 0.5
    assert float(waits.max()) < 2.0


def test_a_burst_out_of_nothing_is_answered_and_then_there_is_none() -> None:
    day = Day(Scaler(Bounds(least=0, most=8, zero_s=60.0, down_s=60.0), 0.0, 1), 0.02, start_s=2.0)
    for now_s in range(400):
        day.second(float(now_s), 120 if 100 <= now_s < 130 else 0)
    assert day.counts == [1, 0, 1, 2, 4, 8, 6, 5, 4, 0]
    assert len(day.waits) == 120 * 30
    assert day.backlog == 0
    assert max(day.waits) < 8.0
