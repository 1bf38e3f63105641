"""Batches: exact shares, isolation of errors, bounds, and nobody waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import StageError
from millrace.serve.admission import Admission
from millrace.serve.batching import Batcher, Cost, Job, calibrate

QUICK = Cost(base_s=1e-6, per_row_s=1e-8)
SLOW = Cost(base_s=1e-2, per_row_s=1e-4)


class Collected(Job):
    """A job that keeps what it was told."""

    __slots__ = ("told",)

    def __init__(self, values: list[float]) -> None:
        super().__init__({"x": np.array(values, dtype=np.float32).reshape(-1, 1)})
        self.told = 0

    def done(self) -> None:
        self.told += 1

    def answer(self) -> list[float]:
        assert self.told == 1
        assert self.error is None
        return self.outputs["y"].reshape(-1).tolist()


class Doubler:
    """Twice the input; fails on negative numbers; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()

    def __call__(self, tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        values = tensors["x"]
        self.batches.append(len(values))
        self.threads.add(threading.current_thread().name)
        if (values < 0).any():
            raise StageError("negative")
        return {"y": values * 2}


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001 if _ > 100 else 0)
    raise AssertionError("it never happened")


def run(jobs: list[Collected], infer: Any, cost: Cost = QUICK, max_batch: int = 8, runners: int = 1) -> None:
    """Submit all jobs in one tick and wait for them."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher(infer, cost, max_batch, loop.call_soon, loop.call_soon_threadsafe, runners)
        for job in jobs:
            batcher.submit(job)
            assert job.told == 0, "a job is never told from within submit"
        await until(lambda: all(job.told for job in jobs))
        batcher.close()

    asyncio.run(main())


@pytest.mark.parametrize("cost", [QUICK, SLOW])
def test_requests_of_one_tick_share_calls(cost: Cost) -> None:
    infer = Doubler()
    jobs = [Collected([float(i)]) for i in range(20)]
    run(jobs, infer, cost)
    assert [job.answer() for job in jobs] == [[2.0 * i] for i in range(20)]
    assert sum(infer.batches) == 20
    assert max(infer.batches) <= 8
    if cost is QUICK:
        assert infer.batches == [8, 8, 4]
        assert infer.threads == {"MainThread"}
    else:
        assert "MainThread" not in infer.threads


def test_a_single_request_does_not_wait_for_others() -> None:
    infer = Doubler()
    run([Collected([3.0])], infer)
    assert infer.batches == [1]


@pytest.mark.parametrize("cost", [QUICK, SLOW])
def test_one_bad_request_never_fails_its_batch(cost: Cost) -> None:
    infer = Doubler()
    jobs = [Collected([float(i)]) for i in range(6)]
    jobs[2].tensors["x"] = np.array([[-1.0]], dtype=np.float32)
    run(jobs, infer, cost)
    assert isinstance(jobs[2].error, StageError)
    assert [job.answer() for i, job in enumerate(jobs) if i != 2] == [[2.0 * i] for i in range(6) if i != 2]


def test_a_large_request_runs_in_slices() -> None:
    infer = Doubler()
    job = Collected([float(i) for i in range(21)])
    run([job], infer)
    assert job.answer() == [2.0 * i for i in range(21)]
    assert infer.batches == [8, 8, 5]


@pytest.mark.parametrize("error", [AttributeError, AssertionError, RuntimeWarning])
def test_whatever_a_model_raises_ends_in_an_answer(error: type[Exception]) -> None:
    def infer(tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        raise error("odd")

    jobs = [Collected([1.0]), Collected([2.0])]
    run(jobs, infer)
    assert [type(job.error) for job in jobs] == [error, error]


def test_rows_of_different_shapes_are_batched_with_their_like() -> None:
    double = Doubler()
    jobs = [Collected([float(n)]) for n in range(6)]
    for job in jobs[::2]:
        job.tensors["x"] = np.repeat(job.tensors["x"], 3, axis=1)
    run(jobs, double)
    assert [job.answer() for job in jobs] == [[2.0 * n] * (3 if n % 2 == 0 else 1) for n in range(6)]
    assert double.batches == [3, 3]


def test_outputs_without_one_row_per_row_fail_the_request_alone() -> None:
    jobs = [Collected([1.0]), Collected([2.0])]
    run(jobs, lambda tensors: {"y": np.zeros((3, 1), np.float32)})
    assert all(isinstance(job.error, ValueError) for job in jobs)


def test_a_cancelled_job_is_skipped_and_not_told() -> None:
    infer = Doubler()
    jobs = [Collected([1.0]), Collected([2.0])]
    jobs[0].is_cancelled = True

    async def main() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher(infer, QUICK, 8, loop.call_soon, loop.call_soon_threadsafe)
        for job in jobs:
            batcher.submit(job)
        await until(lambda: jobs[1].told == 1)

    asyncio.run(main())
    assert jobs[0].told == 0
    assert infer.batches == [1]


def test_a_slow_model_takes_what_came_meanwhile() -> None:
    """While the first call runs, others queue: they are the next batch."""
    entered, go_on = threading.Event(), threading.Event()
    inner = Doubler()

    def infer(tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        if not inner.batches:
            entered.set()
            assert go_on.wait(20)
        return inner(tensors)

    first, rest = Collected([0.0]), [Collected([float(i)]) for i in range(1, 6)]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher(infer, SLOW, 8, loop.call_soon, loop.call_soon_threadsafe)
        batcher.submit(first)
        await until(entered.is_set)
        for job in rest:
            batcher.submit(job)
        go_on.set()
        await until(lambda: all(job.told for job in rest))
        batcher.close()

    asyncio.run(main())
    assert inner.batches == [1, 5]
    assert [job.answer() for job in rest] == [[2.0 * i] for i in range(1, 6)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    bad=st.sets(st.integers(0, 29), max_size=3),
    max_batch=st.integers(1, 10),
)
def test_every_job_gets_exactly_its_rows(sizes: list[int], bad: set[int], max_batch: int) -> None:
    jobs = []
    for index, size in enumerate(sizes):
        values = [float(index * 100 + k) for k in range(size)]
        jobs.append(Collected([-1.0] * size if index in bad else values))
    infer = Doubler()
    run(jobs, infer, max_batch=max_batch)
    assert max(infer.batches) <= max_batch
    for index, (job, size) in enumerate(zip(jobs, sizes, strict=True)):
        if index in bad:
            assert isinstance(job.error, StageError)
        else:
            assert job.answer() == [2.0 * (index * 100 + k) for k in range(size)]


def test_the_calibration_measures_both_ends() -> None:
    infer = Doubler()
    cost = calibrate(infer, {"x": np.ones((1, 1), np.float32)}, max_batch=16)
    assert set(infer.batches) == {1, 2, 4, 8, 16}
    assert cost.is_inline
    assert cost.predict_s(16) >= cost.predict_s(1) >= 0
    assert not SLOW.is_inline


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=60))
def test_admission_never_exceeds_its_bounds(steps: list[tuple[bool, int]]) -> None:
    admission = Admission(limit=5, max_bytes=150)
    held: list[int] = []
    for is_arrival, size in steps:
        if is_arrival:
            refusal = admission.admit(size)
            if refusal is None:
                held.append(size)
            else:
                assert refusal.status == 503
                assert refusal.retry_after_s >= 1
                assert len(held) == 5 or sum(held) + size > 150
        elif held:
            admission.release(held.pop())
        assert admission.waiting == len(held) <= 5
        assert admission.waiting_bytes == sum(held)


def test_one_connection_does_not_take_the_whole_queue() -> None:
    admission = Admission(limit=4, share=0.5)
    assert admission.admit(1, held_by_connection=0) is None
    assert admission.admit(1, held_by_connection=1) is None
    refusal = admission.admit(1, held_by_connection=2)
    assert refusal is not None
    assert refusal.status == 429
    assert admission.admit(1, held_by_connection=0) is None


def test_a_batch_is_no_larger_than_where_a_row_is_cheapest() -> None:
    """Some graphs fall out of the cache: then larger calls only make everybody wait."""

    def infer(tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        rows = len(tensors["x"])
        busy_until = time.perf_counter() + (40e-6 * rows if rows <= 2 else 200e-6 * rows)
        while time.perf_counter() < busy_until:
            pass
        return {"y": tensors["x"]}

    cost = calibrate(infer, {"x": np.ones((1, 1), np.float32)}, max_batch=8)
    assert cost.best_rows in (1, 2)
    seen = Doubler()
    jobs = [Collected([float(i)]) for i in range(6)]
    run(jobs, seen, Cost(base_s=1e-6, per_row_s=1e-8, best_rows=2))
    assert seen.batches == [2, 2, 2]


def test_a_slow_model_is_ready_after_one_call() -> None:
    seen: list[int] = []

    def infer(tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        seen.append(len(tensors["x"]))
        time.sleep(0.03)
        return {"y": tensors["x"]}

    cost = calibrate(infer, {"x": np.ones((1, 1), np.float32)}, max_batch=8)
    assert set(seen) == {1}
    assert not cost.is_inline
    assert cost.best_rows is None
