"""Several models in one server: loaded when wanted, unloaded when memory is, and never asked before they are warm."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millrace.core.errors import CapacityError, ConflictError, CorruptError, MillraceError, NotFoundError
from millrace.serve.batching import Job
from millrace.serve.child import ChildConfig, ServedModel
from millrace.serve.dataplane import DataPlane
from millrace.serve.opening import open_plane, size_on_disk
from millrace.serve.repository import ModelRepository
from millrace.serve.revisions import Directory
from millrace.serve.server import ServerConfig

HIDDEN = 40_000  # 12 MB of weights
NAMES = ("a", "b", "c")


def heavy_graph(kit: ModuleType) -> bytes:
    """The digits model with a wide layer in it: seconds and megabytes, as many as a test wants to wait for."""
    rng = np.random.default_rng(5)
    first = numpy_helper.from_array(rng.normal(0, 0.01, (kit.PIXELS, HIDDEN)).astype(np.float32), "first")
    second = numpy_helper.from_array(rng.normal(0, 0.01, (HIDDEN, kit.CLASSES)).astype(np.float32), "second")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["pixels", "first"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("MatMul", ["active", "second"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "heavy",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", kit.PIXELS])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", kit.CLASSES])],
        [first, second],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert onnx.checker.check_model(model) is None
    return model.SerializeToString()


@pytest.fixture(scope="module")
def heavy(kit: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heavy")
    kit.make_bundle(folder, heavy_graph(kit), kit.DIGITS, {"pixels": kit.make_pixels(50)})
    return folder / "bundle"


@pytest.fixture(scope="module")
def live(kit: ModuleType, digits_bundle: Path, heavy: Path) -> Iterator[Any]:
    """Three heavy models of which two fit, and a small one in two versions."""
    models = [ServedModel(name=name, path=str(heavy), max_batch=4) for name in NAMES]
    models += [
        ServedModel(name="digits", version="3", path=str(digits_bundle)),
        ServedModel(name="digits", version="2", path=str(digits_bundle), weight=0.0),
        ServedModel(name="lost", path=str(heavy / "nowhere")),
    ]
    config = ChildConfig(
        models=models, preload=["digits"], memory_budget_bytes=200_000_000, server=ServerConfig(name="", version="", port=0, tune_s=0)
    )  # fmt: skip
    server = kit.Live(config)
    yield server
    assert server.process.exit_code is None
    assert server.process.stop() == 0


def predict(live: Any, name: str, kit: ModuleType) -> tuple[int, Any]:
    return live.call("POST", f"/v1/models/{name}:predict", {"instances": kit.make_pixels(1).tolist()})


def states(live: Any) -> dict[str, str]:
    status, rows = live.call("POST", "/v2/repository/index", {})
    assert status == 200
    return {f"{row['name']}@{row['version']}": row["state"] for row in rows}


def test_index_and_versions(live: Any, kit: ModuleType) -> None:
    found = states(live)
    assert (found["digits@3"], found["digits@2"], found["lost@1"]) == ("READY", "READY", "UNAVAILABLE")
    status, body = live.call("GET", "/v2/models/digits")
    assert (status, body["versions"]) == (200, ["3", "2"])
    pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": kit.make_pixels(1).tolist()}
    for path, version in (("", "3"), ("/versions/3", "3"), ("/versions/2", "2")):
        status, body = live.call("POST", f"/v2/models/digits{path}/infer", {"inputs": [pixels]})
        assert (status, body["model_version"]) == (200, version)


def test_many_first_requests_load_once_and_all_are_answered(live: Any, kit: ModuleType) -> None:
    answers: list[tuple[int, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(predict(live, "a", kit))) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert live.call("GET", "/v2/health/live")[0] == 200
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200] * 12
    assert all(answer == answers[0] for answer in answers)
    assert states(live)["a@1"] == "READY"


def test_load_and_unload_on_request(live: Any, kit: ModuleType) -> None:
    assert live.call("POST", "/v2/repository/models/digits/load")[0] == 200
    assert live.call("POST", "/v2/repository/models/digits/unload")[0] == 200
    status, body = predict(live, "digits", kit)
    assert status == 503
    assert "unloaded on request" in body["error"]
    assert states(live)["digits@3"] == "UNAVAILABLE"
    assert live.call("GET", "/v2/models/digits/ready")[0] == 503
    assert live.call("POST", "/v2/repository/models/digits/load", {})[0] == 200
    assert predict(live, "digits", kit)[0] == 200
    assert live.call("GET", "/v2/repository/models/digits/load")[0] == 405
    assert live.call("POST", "/v2/repository/models/digits/sink")[0] == 404
    status, body = live.call("POST", "/v2/repository/models/nobody/load")
    assert status == 404
    assert "nobody" in body["error"]


def test_a_model_that_cannot_be_loaded_says_why_and_others_go_on(live: Any, kit: ModuleType) -> None:
    for _ in range(2):
        status, body = predict(live, "lost", kit)
        assert status == 503
        assert "bundle" in body["error"] or "no such" in body["error"].lower()
    assert live.call("POST", "/v2/repository/models/lost/load")[0] == 503
    assert predict(live, "digits", kit)[0] == 200


def test_a_switch_drops_no_request(live: Any, kit: ModuleType) -> None:
    """Loaded anew under load: what is served stays until the new one is warm."""
    statuses: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            statuses.append(predict(live, "digits", kit)[0])

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(2):
        assert live.call("POST", "/v2/repository/models/digits/load")[0] == 200
    is_over.set()
    thread.join()
    assert len(statuses) > 5
    assert set(statuses) == {200}


def test_what_is_fixed_is_not_unloaded(digits: Any) -> None:
    assert digits.call("POST", "/v2/repository/models/digits/load")[0] == 200
    status, body = digits.call("POST", "/v2/repository/models/digits/unload")
    assert status == 409
    assert "decided where it was started" in body["error"]
    assert digits.call("POST", "/v2/repository/models/other/unload")[0] == 404


# --------------------------------------------------------------------------- the repository alone


def models_of(heavy: Path) -> list[ServedModel]:
    return [ServedModel(name=name, path=str(heavy), max_batch=2) for name in NAMES]


def scene(models: list[ServedModel], budget: int | None, work: Any) -> None:
    """Run `work(repository, directory, opened)` in a loop; what it loaded is closed after it."""

    async def run() -> None:
        directory, opened, loop = Directory(), [], asyncio.get_running_loop()
        server = ServerConfig(name="", version="", tune_s=0)

        def open_one(model: ServedModel) -> DataPlane:
            opened.append(model.name)
            return open_plane(model, server, loop)

        repository = ModelRepository(directory, models, open_one, budget)
        directory.is_told = True
        await work(repository, directory, opened)
        for endpoint in list(directory):
            for plane in endpoint.planes:
                plane.close(1.0)
                plane.runtime.unload()

    asyncio.run(run())


class Asked(Job):
    """A request of this process."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__({"pixels": pixels})
        self.answered = asyncio.Event()

    def done(self) -> None:
        assert self.error is None
        self.answered.set()

    async def of(self, plane: DataPlane) -> None:
        assert plane.submit(self) is None
        await self.answered.wait()


def loaded(directory: Directory) -> list[str]:
    return [endpoint.name for endpoint in directory]


def test_the_least_recently_used_makes_room_and_one_in_use_never_does(kit: ModuleType, heavy: Path) -> None:
    async def work(repository: ModelRepository, directory: Directory, opened: list[str]) -> None:
        await repository.ensure("a")
        size = repository.memory()["a"]
        assert size >= size_on_disk(models_of(heavy)[0])
        repository.budget_bytes = int(2.5 * size)
        await repository.ensure("b")
        repository.budget_bytes = sum(repository.memory().values()) + size // 4  # nothing else fits
        await asyncio.sleep(0.01)
        await Asked(kit.make_pixels(1)).of(directory.find("a").primary)  # so b was used less recently
        await repository.ensure("c")
        assert "b" not in loaded(directory)
        assert "c" in loaded(directory)
        assert "made room" in next(row["reason"] for row in repository.index() if row["name"] == "b")
        assert repository.awaits("b")
        for name in loaded(directory):  # requests are in them
            directory.find(name).primary.admission.count(10, 1)
        repository.budget_bytes = sum(repository.memory().values())
        with pytest.raises(CapacityError, match="models in use take"):
            await repository.ensure("b")
        assert "b" not in loaded(directory)
        repository.budget_bytes = 1_000_000
        with pytest.raises(CapacityError, match=r"want at most the memory budget of 1\.0 MB"):
            await repository.load("b")

    scene(models_of(heavy), None, work)


def test_one_load_for_all_who_wait(digits_bundle: Path) -> None:
    async def work(repository: ModelRepository, directory: Directory, opened: list[str]) -> None:
        waiting = [asyncio.create_task(repository.ensure("digits")) for _ in range(50)]
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="being loaded"):
            await repository.unload("digits")
        waiting[0].cancel()  # whoever leaves does not end it for the others
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert opened == ["digits"]
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == [None] * 49
        with pytest.raises(NotFoundError, match="'nobody' is not in this server's repository: want one of digits"):
            await repository.load("nobody")

    scene([ServedModel(name="digits", path=str(digits_bundle))], None, work)


def test_warm_before_routed(digits_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(digits_bundle, folder)

    async def work(repository: ModelRepository, directory: Directory, opened: list[str]) -> None:
        seen: list[tuple[bool, bool]] = []

        def look() -> None:
            plane = directory.find("digits").primary
            seen.append((plane.is_ready, plane.batcher.cost.per_row_s + plane.batcher.cost.base_s > 0))

        directory.changed.append(look)
        await repository.load("digits")
        first = directory.find("digits").primary
        await repository.load("digits")
        second = directory.find("digits").primary
        assert first is not second
        assert seen == [(True, True)] * 2, "routed before it was loaded, tested and calibrated"
        graph = folder / "model.onnx"
        graph.chmod(0o644)
        graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
        with pytest.raises(CorruptError):
            await repository.load("digits")
        assert directory.find("digits").primary is second, "what was served had to stay"
        assert len(seen) == 2
        rows = repository.index()
        assert [(row["state"], row["reason"]) for row in rows] == [("READY", "")]

    scene([ServedModel(name="digits", path=str(folder))], None, work)


def test_too_many_who_wait_are_refused(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.serve.repository.MAX_HELD", 3)

    async def work(repository: ModelRepository, directory: Directory, opened: list[str]) -> None:
        results = await asyncio.gather(*[repository.ensure("digits") for _ in range(5)], return_exceptions=True)
        refused = [one for one in results if isinstance(one, MillraceError)]
        assert len(refused) == 2
        assert "3 requests wait for it already" in refused[0].message

    scene([ServedModel(name="digits", path=str(digits_bundle))], None, work)
