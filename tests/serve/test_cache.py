"""The response cache: equal inputs, however they are sent, are answered once; bounded, timed, never for errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.ports import Runtime
from millrace.core.spec import Cache
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.admission import Admission
from millrace.serve.batching import Batcher, Cost, Job, Packing
from millrace.serve.cache import Answers, CachedPlane, digest_of
from millrace.serve.dataplane import ModelInfo

PREDICT = "/v1/models/prices:predict"
SIGNATURE = Signature(
    task="regression", label="y",
    inputs=[TensorSpec(name="x", dtype="float32", shape=[-1, 2])],
    outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])],
)  # fmt: skip


def read(live: Any) -> dict[str, float]:
    _, text = live.call("GET", "/metrics")
    lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
    return {name.partition("{")[0]: float(value) for name, _, value in lines}


def test_a_live_server_answers_once_and_says_so(observed: Any) -> None:
    before = read(observed)
    row = {"age": 1.25, "income": 2.5, "plan": "a"}
    answers = [observed.call("POST", PREDICT, {"instances": [row]}) for _ in range(3)]
    tensors = [
        {"name": "numbers", "shape": [1, 2], "datatype": "FP32", "data": [1.25, 2.5]},
        {"name": "categories", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]},
    ]
    status, answer = observed.call("POST", "/v2/models/prices/infer", {"inputs": tensors})  # the same, as tensors
    assert answers == [(200, {"predictions": [{"value": 13.75}]})] * 3
    assert (status, answer["outputs"][0]["data"]) == (200, [13.75])
    for _ in range(2):
        assert observed.call("POST", PREDICT, {"instances": [{"age": "x"}]})[0] == 400
    after = read(observed)
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["millrace_cache_hits_total"], grown["millrace_cache_misses_total"]) == (3, 1)
    assert (grown["millrace_rows_total"], grown["millrace_cache_entries"]) == (1, 1)
    assert grown["millrace_request_seconds_count"] == 4
    assert after["millrace_cache_bytes"] > 0
    _, document = observed.call("GET", "/v2/models/prices/stats")
    stats = document["model_stats"][0]["inference_stats"]
    assert stats["cache_hit"]["count"] == after["millrace_cache_hits_total"]
    assert stats["cache_hit"]["ns"] > 0
    assert stats["cache_miss"]["count"] == after["millrace_cache_misses_total"]


def test_off_is_off(table: Any) -> None:
    for _ in range(2):
        table.call("POST", PREDICT, {"instances": [{"age": 5, "income": 2.5, "plan": "a"}]})
    values = read(table)
    assert values["millrace_cache_hits_total"] == values["millrace_cache_entries"] == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_it_is_bounded_and_forgets_what_was_not_used(steps: list[tuple[int, bool]]) -> None:
    answers = Answers(Cache(entries=3), lambda: 0.0)
    kept: list[int] = []  # least recently used first
    for key, is_put in steps:
        found = answers.get(bytes([key]))
        assert (None if found is None else found["y"].tolist()) == ([float(key)] if key in kept else None)
        if key in kept or is_put:
            kept = [one for one in kept if one != key] + [key]
        if is_put:
            answers.put(bytes([key]), {"y": np.array([float(key)])})
        kept = kept[-3:]
        assert len(answers) == len(kept)
        assert answers.size_bytes == len(kept) * (512 + 8)


def test_bytes_and_time_bound_it_too() -> None:
    now = [0.0]
    answers = Answers(Cache(entries=1000, ttl_s=10, max_bytes=64_000), lambda: now[0])
    answers.put(b"huge", {"y": np.zeros(2000)})  # a quarter of all: not worth the others
    assert answers.get(b"huge") is None
    for number in range(50):
        answers.put(bytes([number]), {"y": np.zeros(500)})
        assert answers.size_bytes <= 64_000
    assert len(answers) == 14
    now[0] = 10.0
    assert answers.get(bytes([49])) is None
    assert len(answers) == 13


def test_what_is_kept_is_a_copy_that_nobody_changes() -> None:
    answers, batch = Answers(Cache(entries=9)), np.arange(4.0)
    answers.put(b"a", {"y": batch[1:2]})
    batch[:] = 9
    found = answers.get(b"a")
    assert found is not None
    assert found["y"].tolist() == [1.0]
    with pytest.raises(ValueError, match="read-only"):
        found["y"][0] = 2


def test_digests_tell_inputs_apart() -> None:
    values = np.array([[1, 2]], np.float32)
    packed = Job(None, 0, Packing(name="x", width=2, row_bytes=8), values.tobytes())
    assert digest_of(packed) == digest_of(Job({"x": values}))
    texts = [["ab", "c"], ["a", "bc"], ["abc", ""]]
    others = [
        Job({"x": values.astype(np.float64)}), Job({"y": values}), Job({"x": values.T}), Job({"x": values + 1}),
        *[Job({"x": np.array([text], dtype=object)}) for text in texts],
    ]  # fmt: skip
    assert len({digest_of(job) for job in (packed, *others)}) == 1 + len(others)


class Asked(Job):
    """Remembers what came."""

    __slots__ = ("answers",)

    def __init__(self, value: float, answers: list[Any]) -> None:
        super().__init__({"x": np.full((1, 2), value, np.float32)})
        self.answers = answers

    def done(self) -> None:
        self.answers.append(self.error or self.outputs["value"].item())


def on_plane(body: Callable[[CachedPlane, list[float]], Awaitable[None]]) -> None:
    """Run with a plane that doubles, and fails for negative numbers; the list has what it was called with."""
    calls: list[float] = []

    def infer(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.extend(tensors["x"][:, 0].tolist())
        if (tensors["x"] < 0).any():
            raise ValueError("negative")
        return {"value": tensors["x"][:, :1] * 2}

    async def run() -> None:
        loop = asyncio.get_running_loop()
        batcher = Batcher(infer, Cost(base_s=1e-6, per_row_s=1e-9), 16, loop.call_soon, loop.call_soon_threadsafe)
        info = ModelInfo(name="m", version="1")
        plane = CachedPlane(Cache(entries=9), info, cast(Runtime, None), SIGNATURE, Admission(), batcher)
        await body(plane, calls)

    asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_errors_are_asked_again() -> None:
    async def body(plane: CachedPlane, calls: list[float]) -> None:
        answers: list[Any] = []
        for _ in range(2):
            plane.submit(Asked(-1, answers))
            await settle()
        assert [type(one) for one in answers] == [ValueError, ValueError]
        assert len(plane.answers) == 0
        assert calls.count(-1) == 2

    on_plane(body)


def test_a_hit_is_answered_later_once_and_takes_no_place() -> None:
    async def body(plane: CachedPlane, calls: list[float]) -> None:
        answers: list[Any] = []
        plane.submit(Asked(3, answers))
        await settle()
        plane.submit(Asked(3, answers))
        assert answers == [6.0]  # not from within
        assert plane.admission.waiting == 0
        gone = Asked(3, answers)
        plane.submit(gone)
        plane.cancel(gone)
        await settle()
        assert answers == [6.0, 6.0]
        assert plane.admission.waiting == 0
        assert calls == [3.0]

    on_plane(body)
