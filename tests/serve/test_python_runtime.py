"""A user's class in its own process: right answers, and nothing that it does wrong is anybody else's problem."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import InputError, MillraceError, NotFoundError, StageError
from millrace.serve.child import ChildConfig, ServedModel
from millrace.serve.runtimes.declared import declared, example_of
from millrace.serve.runtimes.python import PythonRuntime
from millrace.serve.runtimes.worker import Loaded, Order, answer, open_model
from millrace.serve.server import ServerConfig

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/own-runtime.md"
SERVICE = '''
import os, subprocess, sys, time
import numpy as np
from millrace.core.errors import InputError

DIES, HANGS, RAISES, REFUSES, WRONG = 13, 14, 15, 16, 17


class Sum:
    inputs = {"x": ("float32", [-1, 2])}
    deadline_s = 1.0

    def load(self):
        print("loading", flush=True)
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def predict(self, batch):
        x = batch["x"]
        if (x == DIES).any():
            os._exit(3)
        if (x == HANGS).any():
            time.sleep(600)
        if (x == RAISES).any():
            raise KeyError("fifteen")
        if (x == REFUSES).any():
            raise InputError("x: want no sixteen")
        if (x == WRONG).any():
            return {"value": x}
        return {"value": x.sum(axis=1, keepdims=True)}


class Surroundings:
    """What the process sees."""

    inputs = {"name": ("string", [-1, 1])}
    outputs = {"found": ("string", [-1, 1]), "parts": ("int64", [-1, 2])}

    def predict(self, batch):
        seen = {"pid": os.getpid(), "child": 0}
        value = [[str(seen.get(name) or os.environ.get(name, "absent"))] for name in batch["name"][:, 0]]
        return {"found": np.array(value, dtype=object), "parts": [[1, len(value)]] * len(value)}


class Spam:
    inputs = {"x": ("float32", [-1, 1])}
    classes = ["ham", "spam"]
    example = {"x": [[3.0]]}

    def load(self):
        self.shares = np.array([[0.25, 0.75]])  # float64

    def predict(self, batch):
        assert (batch["x"] > 0).all(), "zeros were never promised"
        return {"probabilities": np.repeat(self.shares, len(batch["x"]), axis=0)}


class Broken:
    inputs = {"x": ("float32", [-1, 1])}

    def load(self):
        raise RuntimeError("no weights here")

    def predict(self, batch):
        return batch


class Silent:
    inputs = {"x": ("float32", [-1, 1])}


class Undeclared:
    def predict(self, batch):
        return batch


class Dies:
    inputs = {"x": ("float32", [-1, 1])}

    def load(self):
        os._exit(7)

    def predict(self, batch):
        return batch
'''


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "service.py"
    path.write_text(SERVICE)
    return path


def runtime(service: Path, name: str, deadline_s: float | None = None) -> PythonRuntime:
    return PythonRuntime(name.lower(), Order(path=str(service), attribute=name), deadline_s)


def row(value: float) -> dict[str, np.ndarray]:
    return {"x": np.full((1, 2), value, np.float32)}


@pytest.fixture(scope="module")
def sums(service: Path) -> Iterator[PythonRuntime]:
    made = runtime(service, "Sum", deadline_s=0.4)
    made.load()
    yield made
    made.unload()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def until(condition: Any, what: str, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


# --------------------------------------------------------------------------- the runtime alone


def test_answers_are_the_class_s(sums: PythonRuntime) -> None:
    x = np.random.default_rng(0).normal(size=(257, 2)).astype(np.float32)
    assert (sums.infer({"x": x})["value"] == x.sum(axis=1, keepdims=True)).all()
    assert sums.infer({"x": x[:0]})["value"].shape == (0, 1)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (15, StageError, "predict raised KeyError: 'fifteen'"),
        (16, InputError, "x: want no sixteen"),
        (17, StageError, r"predict: 'value': want shape \[-1, 1\], got \[1, 2\]"),
    ],
)
def test_what_it_raises_is_told_and_the_process_lives(
    sums: PythonRuntime, value: float, kind: type[MillraceError], text: str
) -> None:
    pid = sums.pid
    with pytest.raises(kind, match=text):
        sums.infer(row(value))
    assert sums.infer(row(1))["value"].item() == 2
    assert sums.pid == pid


def test_a_death_and_a_hang_fail_their_call_alone(sums: PythonRuntime) -> None:
    with pytest.raises(StageError, match=r"its process ended \(exit code 3\)"):
        sums.infer(row(13))
    assert sums.infer(row(2))["value"].item() == 4
    begun = time.monotonic()
    with pytest.raises(StageError, match=r"longer than its deadline of 0.4 s"):
        sums.infer(row(14))
    assert time.monotonic() - begun < 2.0
    assert sums.infer(row(3))["value"].item() == 6


def test_killed_between_two_calls_it_is_started_anew_and_what_it_had_started_ends(sums: PythonRuntime) -> None:
    sums.infer(row(1))
    assert sums.pid is not None
    listed = Path(f"/proc/{sums.pid}/task/{sums.pid}/children")
    children = [int(pid) for pid in listed.read_text().split()] if listed.exists() else []
    os.kill(sums.pid, signal.SIGKILL)
    until(lambda: sums.pid is None, "it did not die")
    assert sums.infer(row(5))["value"].item() == 10
    for child in children:
        until(lambda pid=child: is_gone(pid), "its child lives on")


def test_environment_texts_and_several_outputs(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    seen = runtime(service, "Surroundings")
    seen.load()
    try:
        names = np.array([["SECRET_TOKEN"], ["PATH"], ["ünï"]], dtype=object)
        outputs = seen.infer({"name": names})
        assert outputs["found"][:, 0].tolist() == ["absent", os.environ["PATH"], "absent"]
        assert outputs["parts"].tolist() == [[1, 3]] * 3
        pid = int(seen.infer({"name": np.array([["pid"]], dtype=object)})["found"].item())
        assert os.getsid(pid) == pid, "not a session of its own"
    finally:
        seen.unload()
    until(lambda: is_gone(pid), "it outlived its unloading")


def here(service: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """What the process loads, in this one: quicker."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return open_model(Order(path=str(service), attribute=name))


def test_floats_are_rounded_to_what_was_declared(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spam = here(service, "Spam", monkeypatch)
    assert spam.declared.signature.classes == ["ham", "spam"]
    assert example_of(spam.declared, "Spam")["x"].tolist() == [[3.0]]
    shares = answer(spam, {"x": np.ones((2, 1), np.float32)})["probabilities"]
    assert shares.dtype == np.float32
    assert shares.tolist() == [[0.25, 0.75]] * 2


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("Nowhere", NotFoundError, "service.py has no class 'Nowhere'"),
        ("Silent", InputError, "Silent has no predict"),
        ("Undeclared", InputError, "Undeclared does not say its inputs"),
    ],
)
def test_what_is_no_service_says_why(
    service: Path, name: str, kind: type[MillraceError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind, match=text):
        here(service, name, monkeypatch)


@pytest.mark.parametrize(
    ("name", "text"),
    [("Broken", "Broken raised RuntimeError: no weights here"), ("Dies", r"service.py:Dies ended while it was loaded")],
)
def test_what_cannot_be_loaded_says_why(service: Path, name: str, text: str) -> None:
    bad = runtime(service, name)
    with pytest.raises(StageError, match=text):
        bad.load()
    assert not bad.is_ready
    assert bad.pid is None


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "documented.py"
    path.write_text(blocks[0])
    fraud = here(path, "Fraud", monkeypatch)
    outputs = answer(fraud, example_of(fraud.declared, "Fraud"))
    assert outputs["probabilities"].sum(axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"inputs": {"x": ("float32", [4])}}, "whose first is -1"),
        ({"inputs": {"x": ("float32", [-1, 0])}}, "whose first is -1"),
        ({"inputs": {"x": "float32"}}, "want a list"),
        ({"inputs": [1]}, "want names with values"),
        ({"inputs": {"x": ("float32", [-1, 1])}, "deadline_s": 0}, "above 0"),
        ({"inputs": {"x": ("float32", [-1, 1])}, "classes": ["a"], "outputs": {"y": ("float32", [-1, 1])}},
         "1 classes want an output probabilities"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        declared(given, "Model")


# --------------------------------------------------------------------------- behind the server


@pytest.fixture(scope="module")
def live(kit: ModuleType, service: Path, digits_bundle: Path) -> Iterator[Any]:
    """The class beside an ONNX model, in one server."""
    models = [
        ServedModel(name="sum", source="code", path=str(service), attribute="Sum"),
        ServedModel(name="digits", path=str(digits_bundle)),
    ]
    server = kit.Live(
        ChildConfig(
            models=models, preload=["sum", "digits"], server=ServerConfig(name="", version="", port=0, tune_s=0)
        )
    )
    yield server
    assert server.process.exit_code is None
    assert server.process.stop() == 0


def predict(live: Any, *rows: list[float]) -> tuple[int, Any]:
    return live.call("POST", "/v1/models/sum:predict", {"instances": list(rows)})


def test_served_answers(live: Any) -> None:
    assert predict(live, [1, 2], [3, 4]) == (200, {"predictions": [{"value": 3.0}, {"value": 7.0}]})
    assert predict(live, [16, 1])[0] == 400
    status, body = live.call("GET", "/v2/models/sum")
    assert (status, body["inputs"]) == (200, [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}])
    assert body["platform"] == "python"


def test_the_guilty_request_alone_fails(live: Any, kit: ModuleType) -> None:
    """Sixty concurrent requests, of which one kills the process and one hangs."""
    answers: dict[int, tuple[int, Any]] = {}
    values = {index: float(index) + 100 for index in range(60)} | {20: 13.0, 40: 14.0}

    def ask(index: int) -> None:
        answers[index] = predict(live, [values[index], 1.0])

    threads = [threading.Thread(target=ask, args=(index,)) for index in values]
    for thread in threads:
        thread.start()
    pixels = {"instances": kit.make_pixels(1).tolist()}
    is_alive = [live.call("POST", "/v1/models/digits:predict", pixels)[0] for _ in range(20)]
    is_alive += [live.call("GET", "/v2/health/live")[0]]
    for thread in threads:
        thread.join()
    wrong = {index: answer for index, answer in answers.items() if index not in (20, 40)
             and answer != (200, {"predictions": [{"value": values[index] + 1}]})}  # fmt: skip
    assert not wrong
    assert [answers[index][0] for index in (20, 40)] == [500, 500]
    assert set(is_alive) == {200}, "another model was touched"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_kill_9_under_load_fails_nobody_but_a_request_that_was_alone_in_its_call(live: Any) -> None:
    killed = [pid for pid in descendants(live.process.pid) if b"runtimes.worker" in command_of(pid)]
    answers: list[tuple[int, int, Any]] = []

    def ask(value: int) -> None:
        for turn in range(6):
            answers.append((value + turn, *predict(live, [value + turn, 1])))

    threads = [threading.Thread(target=ask, args=(100 * index,)) for index in range(1, 13)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    os.kill(killed[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    right = [(value, status, body) for value, status, body in answers
             if (status, body) == (200, {"predictions": [{"value": float(value + 1)}]})]  # fmt: skip
    assert len(answers) == 72
    assert len(right) >= 71, [answer for answer in answers if answer not in right]


def descendants(pid: int) -> list[int]:
    """Processes below one, by what each says of its parent."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return [one for one, parent in parents.items() if parent == pid or parents.get(parent) == pid]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_flood_of_poison_cannot_keep_the_process_down(live: Any) -> None:
    statuses = [predict(live, [13.0, 1.0])[0] for _ in range(6)]
    assert set(statuses) <= {500, 503}
    assert 503 in statuses, "nothing protects the process from starting again and again"
    until(lambda: predict(live, [1, 1])[0] == 200, "it never came back", limit_s=30)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_it_dies_with_a_server_that_was_killed(kit: ModuleType, service: Path) -> None:
    models = [ServedModel(name="seen", source="code", path=str(service), attribute="Surroundings")]
    config = ChildConfig(models=models, preload=["seen"], server=ServerConfig(name="", version="", port=0, tune_s=0))
    server = kit.Live(config)
    body = {"instances": [["pid"]]}
    status, answer = server.call("POST", "/v1/models/seen:predict", body)
    assert status == 200, answer
    pid = int(answer["predictions"][0]["found"][0])
    assert not is_gone(pid)
    server.process.kill()
    server.process.wait()
    until(lambda: is_gone(pid), "the user's process outlived its server")
