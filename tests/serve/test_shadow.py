"""A shadow gets copies, is compared, and holds up nobody: its queue is bounded, and its own thread rests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import StageError
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.batching import Call, Job
from millrace.serve.dataplane import DataPlane
from millrace.serve.revisions import Revision
from millrace.serve.server import ServerConfig, build_plane
from millrace.serve.shadow import DUTY, MAX_BYTES, MAX_CALLS, Shadow, Shadows, compare

SIGNATURE = Signature(
    task="regression",
    inputs=[TensorSpec(name="x", dtype="float32", shape=[-1, 1], columns=["x"])],
    outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])],
    label="y",
)
LIKELY = Signature(
    task="classification",
    inputs=SIGNATURE.inputs,
    outputs=[TensorSpec(name="p", dtype="float32", shape=[-1, 2], semantic="probabilities")],
    label="y",
    classes=["a", "b"],
)


class Adding:
    """x + more; waits for its gate, and refuses negative rows where it is asked to."""

    def __init__(self, more: float = 1.0, refuses: bool = False, took_s: float = 0.0) -> None:
        self.more, self.refuses, self.took_s = more, refuses, took_s
        self.is_ready = True
        self.gate = threading.Event()
        self.gate.set()

    def load(self) -> None:
        pass

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.gate.wait(20)
        time.sleep(self.took_s)
        if self.refuses and (tensors["x"] < 0).any():
            raise StageError("a negative row")
        return {"value": tensors["x"] + self.more}

    def unload(self) -> None:
        self.is_ready = False


class Asked(Job):
    """A request that keeps when it was answered."""

    __slots__ = ("answered",)

    def done(self) -> None:
        self.answered.set_result(self.outputs["value"].reshape(-1).tolist())


async def ask(plane: DataPlane, *values: float) -> list[float]:
    job = Asked({"x": np.array(values, dtype=np.float32).reshape(-1, 1)})
    job.answered = asyncio.get_running_loop().create_future()
    assert plane.submit(job) is None
    return await job.answered


def plane_of(runtime: Adding, version: str) -> DataPlane:
    config = ServerConfig(name="m", version=version, max_batch=4)
    return build_plane(config, runtime, SIGNATURE, asyncio.get_running_loop())


async def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def mirrored(plane: DataPlane, name: str) -> float:
    return plane.metrics.mirrored[f"mirrored_{name}"]


def test_copies_are_compared_and_the_primary_answers() -> None:
    async def main() -> None:
        primary, other = plane_of(Adding(1.0), "1"), plane_of(Adding(1.5, refuses=True), "2")
        shadows = Shadows()
        shadows.mirror([Revision(primary), Revision(other, 0.0, is_shadow=True)])
        assert await ask(primary, 1.0, 2.0) == [2.0, 3.0]
        assert await ask(primary, -1.0) == [0.0]
        await until(lambda: mirrored(other, "rows") + mirrored(other, "failed") == 3)
        assert (mirrored(other, "changed"), mirrored(other, "failed")) == (2, 1)
        assert mirrored(other, "max_difference") == pytest.approx(0.5)
        assert other.metrics.rows == 0  # it has answered nobody
        assert other.metrics.counters()["mirrored_rows"] == 2
        shadows.mirror([Revision(other), Revision(primary, 0.0)])  # promoted: no copies any more
        assert await ask(other, 1.0) == [2.5]
        assert primary.mirror is None
        for plane in (primary, other):
            plane.close(1.0)

    asyncio.run(main())


def test_what_does_not_fit_is_dropped_and_a_stuck_shadow_holds_up_nobody() -> None:
    async def main() -> None:
        stuck = Adding()
        primary, other = plane_of(Adding(), "1"), plane_of(stuck, "2")
        Shadows().mirror([Revision(primary), Revision(other, 0.0, is_shadow=True)])
        stuck.gate.clear()
        began = time.perf_counter()
        for number in range(MAX_CALLS + 40):
            assert await ask(primary, number) == [number + 1.0]
        assert time.perf_counter() - began < 5
        dropped = mirrored(other, "dropped")
        assert 38 <= dropped <= 40  # one has left the queue, to stick
        stuck.gate.set()
        await until(lambda: mirrored(other, "rows") == MAX_CALLS + 40 - dropped)
        for plane in (primary, other):
            plane.close(1.0)

    asyncio.run(main())


def test_large_copies_are_bounded_by_their_bytes() -> None:
    async def main() -> None:
        stuck = Adding()
        other = plane_of(stuck, "2")
        shadow = Shadow(other)
        stuck.gate.clear()
        large = np.zeros((MAX_BYTES // 4 // 3, 1), dtype=np.float32)
        call = Call({"x": large}, {"value": large}, [], 0, 0)
        for _ in range(6):
            shadow.take(call)
        assert mirrored(other, "dropped") == 3 * len(large)
        stuck.gate.set()
        await until(lambda: mirrored(other, "rows") == 3 * len(large))
        shadow.take(call)
        await until(lambda: mirrored(other, "rows") == 4 * len(large))
        other.close(1.0)

    asyncio.run(main())


def test_its_thread_rests_most_of_the_time_and_ends_when_its_plane_closes() -> None:
    async def main() -> None:
        primary, other = plane_of(Adding(), "1"), plane_of(Adding(took_s=0.01), "2")
        Shadows().mirror([Revision(primary), Revision(other, 0.0, is_shadow=True)])
        began = time.perf_counter()
        while time.perf_counter() - began < 0.5:
            await ask(primary, 1.0)
        assert 1 <= mirrored(other, "rows") <= 0.5 / 0.01 * DUTY + 2
        threads = {thread.name for thread in threading.enumerate()}
        assert "shadow" in threads
        await asyncio.to_thread(other.close, 1.0)
        assert "shadow" not in {thread.name for thread in threading.enumerate()}
        primary.close(1.0)

    asyncio.run(main())


def test_the_likeliest_class_is_the_answer_of_probabilities() -> None:
    ours = np.array([[0.9, 0.1], [0.6, 0.4]], dtype=np.float32)
    theirs = np.array([[0.8, 0.2], [0.4, 0.6]], dtype=np.float32)
    changed, largest = compare(LIKELY, {"p": ours}, {"p": theirs})
    assert (changed, round(largest, 5)) == (1, 0.2)


def test_texts_shapes_and_missing_values_are_compared_too() -> None:
    texts = {"label": np.array([["a"], ["b"]], dtype=object)}
    assert compare(SIGNATURE, texts, {"label": np.array([["a"], ["c"]], dtype=object)}) == (1, 0.0)
    numbers = {"value": np.array([[np.nan], [1.0]], dtype=np.float32)}
    assert compare(SIGNATURE, numbers, {"value": np.array([[np.nan], [1.0005]], dtype=np.float32)})[0] == 0
    assert compare(SIGNATURE, numbers, {"value": np.zeros((2, 3), np.float32)})[0] == 2
    with pytest.raises(ValueError, match="want 2 rows"):
        compare(SIGNATURE, numbers, {"value": np.zeros((3, 1), np.float32)})


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_the_same_answers_are_never_different(values: list[float]) -> None:
    answers = {"value": np.array(values, dtype=np.float32).reshape(-1, 1)}
    assert compare(SIGNATURE, answers, {name: value.copy() for name, value in answers.items()}) == (0, 0.0)
