"""No tuning by hand: the race, when it runs, what it leaves alone, what is kept, and what is said of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from millrace.cli.render import render_calibration
from millrace.core.operations.live import ServeEvent
from millrace.serve import tuning
from millrace.serve.admission import Admission
from millrace.serve.batching import Batcher, Job
from millrace.serve.calibrate import Cost, calibrate
from millrace.serve.child import ChildConfig
from millrace.serve.dataplane import CheckedInfer, DataPlane, ModelInfo
from millrace.serve.explaining import explain
from millrace.serve.layouts import Layout, cores, layouts_of
from millrace.serve.process import CHILD_COMMAND, ServerProcess
from millrace.serve.racing import Calibration, Cell, Race
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.server import ServerConfig, build_plane
from millrace.serve.trials import Trial
from millrace.serve.tuning import Calibrations, Tuner, rows_of

Timer = Callable[[Cell], float]


def run(race: Race, row_s: Timer) -> list[Cell]:
    """Measure with a made-up processor; which cells were asked for."""
    asked = []
    while (cell := race.next) is not None:
        asked.append(cell)
        seconds = row_s(cell)
        race.tell(cell, seconds, seconds * cell.rows * cell.layout.callers)
    return asked


def text_like(cell: Cell) -> float:
    """On two processors: two callers do the most, two threads that spin answer soonest, batches gain nothing."""
    layout = cell.layout
    if layout.callers == 2:
        return 0.0121
    if layout.threads == 1:
        return 0.0242
    return 0.0141 if layout.is_spinning else 0.0161


def image_like(cell: Cell) -> float:
    """Batches of 16 by two threads do the most."""
    return {1: 0.0241, 2: 0.0125}[cell.layout.threads * cell.layout.callers] - 0.0001 * min(cell.rows, 16)


def test_a_race_finds_both_winners() -> None:
    race = Race(layouts_of(2), 64)
    run(race, text_like)
    found = race.result()
    assert found.shallow == Layout(threads=2, is_spinning=True)
    assert (found.deep, found.deep_cost.best_rows) == (Layout(callers=2), 1)
    assert found.shallow_cost.predict_s(1) == pytest.approx(0.0141)
    assert found.deep_cost.predict_s(1) == pytest.approx(0.0242), "of one call, two of which run at once"


def test_hopeless_cells_stop_early() -> None:
    race = Race(layouts_of(2), 64)
    asked = run(race, text_like)
    assert asked.count(Cell(Layout(), 1)) == 1, "one call by one thread wins nothing"
    assert asked.count(Cell(Layout(callers=2), 1)) >= 3
    assert max(cell.rows for cell in asked) <= 4, "no gain by batches: not tried up to 64"
    everything = 4 * 7 * 4 * 32 * 0.014
    assert race.spent_s < everything / 10


def test_a_race_ends_with_its_budget_and_knows_something_all_the_same() -> None:
    race = Race(layouts_of(2), 64, budget_s=0.1)
    asked = run(race, image_like)
    assert [cell.rows for cell in asked] == [1, 1, 1, 1, *[cell.rows for cell in asked[4:]]]
    assert race.spent_s < 0.1 + 1.0
    assert race.result().deep_cost.predict_s(1) > 0


def test_a_batch_wins_where_it_pays() -> None:
    race = Race([Layout()], 64)
    run(race, lambda cell: 0.0001 + 0.01 / cell.rows)
    found = race.result()
    assert found.deep_cost.best_rows == 64
    assert (found.deep_cost.base_s, found.deep_cost.per_row_s) == (pytest.approx(0.01), pytest.approx(0.0001))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 16), st.randoms(use_true_random=False), st.integers(1, 64))
def test_whatever_the_noise_a_race_ends_with_something_near_the_best(many: int, random: Any, max_rows: int) -> None:
    true: dict[Layout, float] = {layout: random.uniform(0.001, 0.1) for layout in layouts_of(many)}
    race = Race(list(true), max_rows, budget_s=1e9)
    asked = run(race, lambda cell: true[cell.layout] * random.uniform(1.0, 1.02))
    found = race.result()
    assert true[found.deep] <= min(true.values()) * 1.13
    alone = [row_s for layout, row_s in true.items() if layout.callers == 1]
    assert true[found.shallow] <= min(alone) * 1.08
    assert len(asked) <= 5 * 7 * len(true)


@given(st.floats(0, 0.1), st.just(0.0) | st.floats(1e-6, 0.1), st.integers(1, 64), st.floats(1e-3, 1.0))
def test_a_batch_takes_at_most_half_of_the_objective(base_s: float, per_row_s: float, most: int, slo_s: float) -> None:
    cost = Cost(base_s=base_s, per_row_s=per_row_s, best_rows=most)
    rows = rows_of(cost, 64, slo_s)
    assert 1 <= rows <= most
    assert rows == 1 or cost.predict_s(rows) <= slo_s / 2 + 1e-9
    if rows < most:
        assert cost.predict_s(rows + 1) > slo_s / 2 - 1e-9


# ---------------------------------------------------------------------- a model that takes a while


def heavy_graph(layers: int = 24, width: int = 384) -> bytes:
    """Layers of [8, width] x [width, width] for each row: about a millisecond."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Mul", ["pixels", "one"], ["x0"])]
    weights = [numpy_helper.from_array(np.ones(1, np.float32), "one")]
    lift = rng.normal(0, 0.1, (64, width)).astype(np.float32)
    weights.append(numpy_helper.from_array(lift, "lift"))
    nodes.append(helper.make_node("MatMul", ["x0", "lift"], ["h0"]))
    for layer in range(layers):
        values = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"h{layer + 1}"]))
    weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (width, 10)).astype(np.float32), "out"))
    nodes.append(helper.make_node("MatMul", [f"h{layers}", "out"], ["logits"]))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes, "heavy", [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 10])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def heavy_bundle(tmp_path_factory: pytest.TempPathFactory, kit: Any) -> Path:
    folder = tmp_path_factory.mktemp("heavy")
    kit.make_bundle(folder, heavy_graph(), kit.DIGITS, {"pixels": kit.make_pixels(40)})
    return folder / "bundle"


@pytest.fixture(scope="module")
def heavy(heavy_bundle: Path) -> OnnxRuntime:
    runtime = OnnxRuntime(heavy_bundle)
    runtime.load()
    return runtime


def test_a_trial_stops_at_once_and_goes_on_later(heavy: OnnxRuntime) -> None:
    calls = 0

    def is_disturbed() -> bool:
        nonlocal calls
        calls += 1
        return calls > 5

    race = Race(layouts_of(2), 4, budget_s=0.5)
    sample = heavy.sample()
    assert Trial(heavy, heavy.bundle.signature, sample, is_disturbed).run(race) is False
    assert 6 <= calls <= 8, "asked between any two calls, of each caller"
    known = dict(race.timings)
    assert Trial(heavy, heavy.bundle.signature, sample).run(race) is True
    assert known.keys() <= race.timings.keys(), "what was measured is not measured anew"
    assert {cell.layout for cell in race.timings} == set(layouts_of(2))
    assert heavy.is_ready


def test_what_others_had_the_processor_for_is_not_believed(heavy: OnnxRuntime) -> None:
    class Robbed(OnnxRuntime):
        """Its thread is without a processor for most of a call."""

        def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            time.sleep(0.02)
            return heavy.infer(tensors)

    robbed = Robbed(Path("unused"))
    race = Race([Layout()], 1)
    assert Trial(robbed, heavy.bundle.signature, heavy.sample(), least_share=0.8).run(race) is False
    assert race.timings == {}
    assert Trial(robbed, heavy.bundle.signature, heavy.sample()).run(race) is True


def test_a_layout_that_cannot_be_opened_drops_out(heavy: OnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.serve.trials.free_bytes", lambda: 1 << 20)
    race = Race(layouts_of(2), 2, budget_s=0.3)
    assert Trial(heavy, heavy.bundle.signature, heavy.sample()).run(race) is True
    assert {cell.layout.threads for cell in race.timings} == {1}
    assert race.result().shallow == Layout()


def make_plane(runtime: OnnxRuntime, loop: asyncio.AbstractEventLoop) -> DataPlane:
    infer = CheckedInfer(runtime, runtime.bundle.signature)
    batcher = Batcher(infer, Cost(base_s=0.0, per_row_s=0.01), 8, loop.call_soon, loop.call_soon_threadsafe)
    return DataPlane(ModelInfo(name="m", version="1"), runtime, runtime.bundle.signature, Admission(), batcher)


class Asked(Job):
    """A request."""

    __slots__ = ("answered",)

    def __init__(self, row: Mapping[str, np.ndarray]) -> None:
        super().__init__({name: np.asarray(values) for name, values in row.items()})
        self.answered = threading.Event()

    def done(self) -> None:
        self.answered.set()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.002)


def test_it_measures_only_while_nobody_asks_then_goes_over_and_keeps_it(heavy: OnnxRuntime, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        plane = make_plane(heavy, loop)
        kept = Calibrations(tmp_path)
        tuner = Tuner(plane, heavy, heavy.sample(), 4, kept, loop, idle_s=3.0, budget_s=0.4, least_share=0.0)
        tuner.tick(100.0, True)  # sees for the first time what was asked
        tuner.tick(102.9, True)
        assert not tuner.is_running, "not idle for long enough"
        tuner.tick(103.0, False)
        tuner.tick(105.0, True)
        assert not tuner.is_running, "another model is busy"
        tuner.tick(106.0, True)
        assert tuner.is_running
        job = Asked(heavy.sample())
        assert plane.submit(job) is None
        await until(lambda: not tuner.is_running)
        await until(job.answered.is_set)
        assert not tuner.is_done, "it was disturbed"
        assert plane.calibration is None
        later_s = time.monotonic() + 100
        tuner.tick(later_s, True)
        assert not tuner.is_running, "somebody has asked since"
        tuner.tick(later_s + 3.0, True)
        assert tuner.is_running
        await until(lambda: plane.calibration is not None)
        found = plane.calibration
        assert found is not None
        assert found.source == "idle"
        assert kept.get(heavy, 4) == msgspec.structs.replace(found, source="stored")
        later = [Asked(heavy.sample()) for _ in range(20)]
        for one in later:
            assert plane.submit(one) is None
        await until(lambda: all(one.answered.is_set() for one in later))
        assert all(one.error is None for one in later)
        for one in later:
            np.testing.assert_allclose(
                one.outputs["probabilities"], heavy.infer(heavy.sample())["probabilities"], rtol=1e-4
            )
        tuner.tick(later_s + 100, True)
        tuner.tick(later_s + 200, True)
        assert not tuner.is_running, "once is enough"
        plane.close(5.0)

    asyncio.run(main())


def test_until_it_is_measured_a_heavy_model_has_all_processors_for_a_lone_call(
    heavy: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "cores", lambda: 2)

    async def main(base_s: float) -> DataPlane:
        loop = asyncio.get_running_loop()
        plane = make_plane(heavy, loop)
        tuner = plane.tuner = Tuner(plane, heavy, heavy.sample(), 4, Calibrations(None), loop, least_share=0.0)
        tuner.adopt_sound(Cost(base_s=base_s, per_row_s=0.0))
        await until(lambda: not tuner.is_running)
        await asyncio.sleep(0)
        job = Asked(heavy.sample())
        assert plane.submit(job) is None
        await until(job.answered.is_set)
        assert job.error is None
        plane.close(5.0)
        return plane

    found = asyncio.run(main(0.01)).calibration
    assert found is not None
    assert (found.shallow, found.deep, found.source) == (Layout(threads=2), Layout(callers=2), "start")
    assert asyncio.run(main(0.001)).calibration is None, "a call of a millisecond gains nothing"


def test_a_plane_that_is_closed_is_measured_no_more(heavy: OnnxRuntime) -> None:
    async def main() -> None:
        plane = make_plane(heavy, asyncio.get_running_loop())
        tuner = Tuner(
            plane, heavy, heavy.sample(), 64, Calibrations(None), asyncio.get_running_loop(), idle_s=0.0,
            budget_s=60.0, least_share=0.0,
        )  # fmt: skip
        plane.tuner = tuner
        tuner.tick(0.0, True)
        tuner.tick(0.1, True)
        assert tuner.is_running
        plane.close(5.0)
        assert not tuner.is_running
        assert plane.calibration is None

    asyncio.run(main())


# ---------------------------------------------------------------------- what is kept


CALIBRATION = Calibration(
    shallow=Layout(), deep=Layout(), shallow_cost=Cost(base_s=0.01, per_row_s=0.001, best_rows=4),
    deep_cost=Cost(base_s=0.01, per_row_s=0.001, best_rows=4), source="idle",
)  # fmt: skip


def test_it_is_kept_by_model_processor_and_threads(
    digits_bundle: Path, table_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits, table = OnnxRuntime(digits_bundle), OnnxRuntime(table_bundle)
    digits.load()
    table.load()
    kept = Calibrations(tmp_path / "not" / "there")
    assert kept.get(digits, 8) is None
    kept.put(digits, 8, CALIBRATION)
    found = kept.get(digits, 8)
    assert found == msgspec.structs.replace(CALIBRATION, source="stored")
    assert kept.get(table, 8) is None
    assert kept.get(digits, 16) is None
    for name, value in (("cores", 99), ("processor", "another"), ("cpu_flags", ["none"])):
        with monkeypatch.context() as patch:
            patch.setattr(tuning, name, lambda value=value: value)
            assert kept.get(digits, 8) is None, name
    assert [path.suffix for path in (tmp_path / "not" / "there").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "damage",
    [
        {"shallow": {"threads": 4096, "callers": 1}},
        {"deep": {"threads": 1, "callers": 0}},
        {"shallow": {"threads": 1, "callers": 2}},
        {"deep_cost": {"base_s": -1.0, "per_row_s": 0.0, "best_rows": 4}},
        {"deep_cost": {"base_s": 0.0, "per_row_s": 0.0, "best_rows": 4000}},
        {"timings": "none"},
        None,
    ],
)
def test_what_was_damaged_is_measured_anew(digits_bundle: Path, tmp_path: Path, damage: dict[str, Any] | None) -> None:
    runtime = OnnxRuntime(digits_bundle)
    runtime.load()
    kept = Calibrations(tmp_path)
    kept.put(runtime, 8, CALIBRATION)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"\xff{" if damage is None else json.dumps({**json.loads(path.read_bytes()), **damage}).encode())
    assert kept.get(runtime, 8) is None


def test_a_folder_that_cannot_be_written_costs_only_that(digits_bundle: Path, tmp_path: Path) -> None:
    runtime = OnnxRuntime(digits_bundle)
    runtime.load()
    (tmp_path / "file").write_text("")
    kept = Calibrations(tmp_path / "file")
    kept.put(runtime, 8, CALIBRATION)
    assert kept.get(runtime, 8) is None


def test_a_stored_calibration_is_in_use_at_once_and_explained(heavy_bundle: Path, tmp_path: Path, kit: Any) -> None:
    """A second server measures nothing, and its statistics say how it calls the model."""
    runtime = OnnxRuntime(heavy_bundle)
    runtime.load()
    explained = explain(runtime, runtime.bundle.signature, 4, str(tmp_path), slo_p99_ms=1000.0)
    assert explained.calibration.source == "measured"
    assert explain(runtime, runtime.bundle.signature, 4, str(tmp_path)).calibration.source == "stored"
    config = kit.child_config(heavy_bundle, max_batch=4, calibrations=str(tmp_path), tune_s=0.0)
    process = ServerProcess(config)
    try:
        port = process.wait_ready()
        deadline = time.monotonic() + 20
        while (stats := _stats(port))["millrace"]["calibration"]["source"] != "stored":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        wanted = msgspec.to_builtins(explained.calibration)
        assert stats["millrace"]["calibration"] == {**wanted, "source": "stored"}
        body = json.dumps({"instances": [{"pixels": [1.0] * 64}]})
        assert all(_post(port, "/v1/models/digits:predict", body) == 200 for _ in range(4))
        os.kill(process.pid, 0)
    finally:
        assert process.stop() == 0


def test_a_child_explains_and_a_person_reads_it(
    heavy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ServerConfig(name="digits", version="3", max_batch=2, calibrations=str(tmp_path), slo_p99_ms=500.0)
    config = ChildConfig(bundle_dir=str(heavy_bundle), wants_explanation=True, server=server)
    done = subprocess.run(CHILD_COMMAND, input=msgspec.json.encode(config), capture_output=True, check=True)
    said = json.loads(done.stdout)
    assert (said["cores"], said["is_inline"], said["slo_p99_ms"]) == (cores(), False, 500.0)
    render_calibration(ServeEvent(kind="calibration", text="digits v3", facts=said))
    shown = capsys.readouterr().out
    assert "CALLS x THREADS" in shown
    assert shown.count("alone") == 1
    assert shown.count("many") == 1
    assert "calls run on threads" in shown
    assert f"within 500 ms: {said['rows']} rows a call at most" in shown
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_slow_model_starts_with_a_call_on_each_core_and_short_batches(heavy: OnnxRuntime) -> None:
    class Slow(OnnxRuntime):
        """30 ms a row."""

        def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            time.sleep(0.03 * len(tensors["pixels"]))
            return heavy.infer(tensors)

        @property
        def layout_key(self) -> str:
            return "slow"

        def sample(self) -> Mapping[str, np.ndarray]:
            return heavy.sample()

        def examples(self) -> Mapping[str, np.ndarray]:
            return heavy.examples()

        size_bytes = 1

        def reopened(self, threads: int, is_spinning: bool = False) -> OnnxRuntime:
            return heavy.reopened(threads, is_spinning)

    async def main() -> DataPlane:
        config = ServerConfig(name="m", version="1", tune_s=0.0)
        return build_plane(config, Slow(Path("unused")), heavy.bundle.signature, asyncio.get_running_loop())

    plane = asyncio.run(main())
    plane.close(5.0)
    assert plane.calibration is not None
    assert (plane.calibration.source, plane.calibration.deep) == ("start", Layout(callers=cores()))
    assert 1 <= plane.batcher.max_batch <= 3
    assert not plane.batcher.is_inline


def test_threads_that_the_user_gave_stay(heavy_bundle: Path, tmp_path: Path) -> None:
    server = ServerConfig(name="digits", version="3", port=0, max_batch=4, calibrations=str(tmp_path), idle_s=0.0)
    process = ServerProcess(ChildConfig(bundle_dir=str(heavy_bundle), threads=2, server=server))
    try:
        port = process.wait_ready()
        time.sleep(0.7)  # a tick has passed
        calibration = _stats(port)["millrace"]["calibration"]
        assert (calibration["source"], calibration["shallow"]["threads"]) == ("fixed", 2)
        assert list(tmp_path.iterdir()) == []
    finally:
        assert process.stop() == 0


def test_an_objective_bounds_the_batches(heavy: OnnxRuntime) -> None:
    explained = explain(heavy, heavy.bundle.signature, 4, slo_p99_ms=0.01)
    assert explained.rows == 1
    cost = calibrate(heavy.infer, heavy.sample(), 4)
    assert rows_of(cost, 4, 1000.0) >= explained.rows


def _stats(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/v2/models/digits/stats")
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found["model_stats"][0]


def _post(port: int, path: str, body: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status
