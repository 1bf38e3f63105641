"""Two layouts of a heavy model: which is used when, and that going over from one to another loses nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import CapacityError
from millrace.serve import layouts, trials
from millrace.serve.batching import Batcher, Cost, Job
from millrace.serve.layouts import Layout, Plan, Switch, layouts_of
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.trials import Sessions

COST = Cost(base_s=0.0, per_row_s=0.01)


class Told(Job):
    """A job that is counted."""

    __slots__ = ("told",)

    def __init__(self, value: float) -> None:
        super().__init__({"x": np.full((1, 1), value, dtype=np.float32)})
        self.told = 0

    def done(self) -> None:
        self.told += 1


class Layered:
    """Twice the input, after a while; remembers who was called and how many at once."""

    def __init__(self, name: str, seen: list[str], delay_s: float = 0.002) -> None:
        self.name, self.seen, self.delay_s = name, seen, delay_s
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __call__(self, tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        with self._lock:
            self.seen.append(self.name)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.delay_s)
        with self._lock:
            self._now -= 1
        return {"y": tensors["x"] * 2}


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


def test_alone_the_quick_layout_many_the_deep_one_and_back() -> None:
    seen: list[str] = []
    shallow, deep = Layered("shallow", seen), Layered("deep", seen)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher(shallow, COST, 1, loop.call_soon, loop.call_soon_threadsafe)
        batcher.adopt(Plan(shallow, COST, 1), Plan(deep, COST, 1, callers=3))
        for _ in range(3):
            job = Told(1.0)
            batcher.submit(job)
            await until(lambda job=job: job.told == 1)
        assert seen == ["shallow"] * 3
        jobs = [Told(float(i)) for i in range(30)]
        for job in jobs:
            batcher.submit(job)
        await until(lambda: all(job.told for job in jobs))
        assert [job.outputs["y"].item() for job in jobs] == [2.0 * i for i in range(30)]
        assert seen.count("deep") >= 24
        assert deep.most == 3, "all its callers worked"
        job = Told(1.0)
        batcher.submit(job)
        await until(lambda: job.told == 1)
        assert seen[-1] == "shallow"
        batcher.close()

    asyncio.run(main())
    assert shallow.most == 1


def test_a_new_plan_loses_no_request_and_mixes_none_up() -> None:
    seen: list[str] = []
    infers = [Layered(str(number), seen, 0.0005) for number in range(6)]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher(infers[0], COST, 4, loop.call_soon, loop.call_soon_threadsafe)
        jobs = []
        for number, infer in enumerate(infers):
            for value in range(20):
                jobs.append(Told(float(number * 100 + value)))
                batcher.submit(jobs[-1])
            await asyncio.sleep(0.002)
            batcher.adopt(Plan(infer, COST, 2), Plan(infer, COST, 1 + number, callers=1 + number % 3))
        await until(lambda: all(job.told for job in jobs))
        batcher.close()
        assert all(job.told == 1 and job.error is None for job in jobs)
        assert [job.outputs["y"].item() for job in jobs] == [2 * job.tensors["x"].item() for job in jobs]

    asyncio.run(main())
    assert len(set(seen)) > 2


@given(st.integers(1, 8), st.lists(st.booleans(), max_size=80))
def test_the_switch_never_exceeds_its_callers_and_never_starves(callers: int, steps: list[bool]) -> None:
    infer = Layered("", [])
    switch = Switch(Plan(infer, COST, 1), Plan(infer, COST, 1, callers=callers))
    waiting = busy = 0
    for is_arrival in steps:
        if is_arrival:
            waiting += 1
        elif busy:
            busy -= 1
        while waiting and (plan := switch.next(waiting, busy)) is not None:
            assert busy < plan.callers
            waiting, busy = waiting - 1, busy + 1
        assert busy or not waiting, "something waits and nothing runs"


def test_what_waits_is_spread_over_the_callers() -> None:
    infer = Layered("", [])
    assert Plan(infer, COST, 16, callers=4).limit(8) == 2
    assert Plan(infer, COST, 16, callers=4).limit(1000) == 16
    assert Plan(infer, COST, 16).limit(2) == 16


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16, 64])
def test_no_layout_uses_more_than_the_processors(cores: int) -> None:
    found = layouts_of(cores)
    assert found[0] == Layout()
    assert len(set(map(str, found))) == len(found) <= 8
    assert all(one.threads * one.callers <= cores for one in found)


def test_processors_are_those_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(layouts, "_CPU_MAX", limit)
    without = layouts.cores()
    limit.write_text("100000 100000\n")
    assert layouts.cores() == 1
    for text in ("max 100000\n", "nonsense"):
        limit.write_text(text)
        assert layouts.cores() == without


def test_sessions_share_the_runtime_and_refuse_where_memory_is_short(
    digits_bundle: Path, kit: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnnxRuntime(digits_bundle)
    runtime.load()
    sessions = Sessions(runtime, runtime.bundle.signature)
    row = runtime.sample()
    wanted = sessions.infer(Layout(callers=4))(row)
    two = sessions.infer(Layout(threads=2, is_spinning=True))
    assert two is sessions.infer(Layout(threads=2, is_spinning=True)), "opened once"
    np.testing.assert_allclose(two(row)["probabilities"], wanted["probabilities"], rtol=1e-5)
    monkeypatch.setattr(trials, "free_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"2 threads wants about .* more"):
        sessions.infer(Layout(threads=2))
    sessions.close()
    assert runtime.is_ready
