"""Conformance suite for the port `Compute`: subclass it, give `open`, run it with pytest.

Example:
    >>> class TestMyCompute(ComputeConformance):
    ...     def open(self, home, entry, **options):
    ...         return MyCompute(home, entry=entry)

The works are real: `answer` below runs in workers and does what `params["do"]` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from millrace.compute.worker import WorkerLink
from millrace.core.errors import DataError
from millrace.core.ports import (
    Compute,
    Frame,
    HeartbeatFrame,
    MetricsFrame,
    OutputFrame,
    ProgressFrame,
    Work,
    WorkHandle,
    WorkResult,
)
from millrace.core.types import Artifact

ENTRY = "millrace.testing.compute:answer"
PATIENCE_S = 60.0


def answer(work: Work, link: WorkerLink) -> dict[str, Any]:
    """The entry of every work of the suite."""
    return DEEDS[work.params["do"]](work, link)


def _hello(work: Work, link: WorkerLink) -> dict[str, Any]:
    print(f"hello from {work.name}", flush=True)
    return {"said": "hello"}


def _surroundings(work: Work, link: WorkerLink) -> dict[str, Any]:
    return {
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
        "stdin": sys.stdin.read(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "set": list({"one", "two", "three", "four"}),
        "told": os.environ.get("MILLRACE_TEST_TOLD"),
    }


def _frames(work: Work, link: WorkerLink) -> dict[str, Any]:
    for number in range(1200):
        link.log_metric("loss", 1.0 / (1 + number), number)
    link.output("first", Artifact(digest="sha256:" + "1" * 64, size_bytes=1))
    for number in range(1000):
        link.progress(number, 1000)
    link.log_metric("last", 1.0, 7)
    link.progress(1000, 1000, "all")
    link.output("second", Artifact(digest="sha256:" + "2" * 64, size_bytes=2))
    link.log_metric("after", 2.0)
    return {}


def _fail(work: Work, link: WorkerLink) -> dict[str, Any]:
    raise ValueError("the loss is not a number")


def _fail_known(work: Work, link: WorkerLink) -> dict[str, Any]:
    raise DataError("churn.csv row 7: want a number, got 'x'", hint="correct it")


def _exit(work: Work, link: WorkerLink) -> dict[str, Any]:
    sys.exit(3)


def _exit_at_once(work: Work, link: WorkerLink) -> dict[str, Any]:
    os._exit(4)


def _crash(work: Work, link: WorkerLink) -> dict[str, Any]:
    ctypes.string_at(0)
    return {}


def _sleep(work: Work, link: WorkerLink) -> dict[str, Any]:
    print(f"pid {os.getpid()}", flush=True)
    time.sleep(600)
    return {}


def _cooperate(work: Work, link: WorkerLink) -> dict[str, Any]:
    print("ready", flush=True)
    while not link.cancelled:
        time.sleep(0.005)
    Path(work.scratch_dir, "saved").write_text("saved")
    return {"saved": True}


def _refuse(work: Work, link: WorkerLink) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(600)
    return {}


def _hang(work: Work, link: WorkerLink) -> dict[str, Any]:
    print(f"pid {os.getpid()}", flush=True)
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock: no thread of Python runs
    return {}


def _eat(work: Work, link: WorkerLink) -> dict[str, Any]:
    held = []
    while True:
        held.append(bytearray(os.urandom(1) * (8 << 20)))
        time.sleep(0.01)


def _eat_in_child(work: Work, link: WorkerLink) -> dict[str, Any]:
    code = "import time\nheld = []\nwhile True:\n    held.append(bytearray(b'x' * (8 << 20)))\n    time.sleep(0.01)"
    subprocess.run([sys.executable, "-c", code], check=True)
    return {}


def _family(work: Work, link: WorkerLink) -> dict[str, Any]:
    """Leaves a child and a grandchild behind."""
    code = "import os, time\npid = os.fork()\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    print("family", os.getpid(), child.stdout.readline().strip(), child.stdout.readline().strip(), flush=True)
    if work.params.get("stay", True):
        time.sleep(600)
    return {}


DEEDS: dict[str, Callable[[Work, WorkerLink], dict[str, Any]]] = {
    "hello": _hello, "surroundings": _surroundings, "frames": _frames, "fail": _fail, "fail_known": _fail_known,
    "exit": _exit, "exit_at_once": _exit_at_once, "crash": _crash, "sleep": _sleep, "cooperate": _cooperate,
    "refuse": _refuse, "hang": _hang, "eat": _eat, "eat_in_child": _eat_in_child, "family": _family,
}  # fmt: skip


class Frames:
    """Collects the frames of one work, and who delivered them."""

    def __init__(self) -> None:
        self.seen: list[Frame] = []
        self.threads: set[int] = set()

    def __call__(self, frame: Frame) -> None:
        self.seen.append(frame)
        self.threads.add(threading.get_ident())


def eventually(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
    """Whether a condition becomes true within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class ComputeConformance:
    """What every implementation of `Compute` must do."""

    def open(self, home: Path, entry: str, **options: Any) -> Compute:
        """A compute whose workers call `entry`; options: heartbeat_timeout_s."""
        raise NotImplementedError("a conformance suite is subclassed")

    @contextlib.contextmanager
    def opened(self, home: Path, **options: Any) -> Iterator[Compute]:
        """A compute that is closed afterwards."""
        compute = self.open(home, ENTRY, **options)
        try:
            yield compute
        finally:
            compute.close()

    def work(self, home: Path, do: str, number: int = 0, **fields: Any) -> Work:
        """A work of the suite."""
        params = {"do": do, **fields.pop("params", {})}
        scratch = home / "scratch" / f"{do}-{number}"
        scratch.mkdir(parents=True, exist_ok=True)
        return Work(
            step_id=f"{number:032x}", run_id="run", name=do, implementation="", spec=b"{}", params=params,
            project_dir=str(home), scratch_dir=str(scratch), log_path=str(home / "logs" / f"{do}-{number}.log"),
            home_dir=str(home), **fields,
        )  # fmt: skip

    def run(self, home: Path, do: str, **fields: Any) -> WorkResult:
        """Do one work to its end."""
        with self.opened(home) as compute:
            result = compute.submit(self.work(home, do, **fields), Frames()).wait(PATIENCE_S)
        assert result is not None
        return result

    def said(self, handle: WorkHandle, word: str) -> list[str]:
        """The words of the log's line that begins with one, once it is there."""

        def lines() -> list[list[str]]:
            return [line.split() for line in handle.logs().decode().splitlines(True) if line.endswith("\n")]

        assert eventually(lambda: any(words[:1] == [word] for words in lines())), handle.logs()
        return next(words for words in lines() if words[:1] == [word])

    def test_capacity_is_positive(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            capacity = compute.capacity()
        assert capacity.cpus >= 1
        assert capacity.memory_bytes > 0
        assert "cpu" in capacity.devices

    def test_success_has_facts_and_log(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            handle = compute.submit(self.work(tmp_path, "hello"), Frames())
            result = handle.wait(PATIENCE_S)
            assert result is not None
            assert (result.state, result.facts, result.error) == ("succeeded", {"said": "hello"}, None)
            assert result.peak_rss_bytes > 0
            assert handle.logs() == b"hello from hello\n"
            assert handle.logs(6) == b"from hello\n"
            assert handle.logs(1000) == b""
            assert handle.wait(0) == result

    def test_worker_has_surroundings_of_its_own(self, tmp_path: Path) -> None:
        facts = self.run(tmp_path, "surroundings", threads=3).facts
        assert facts["cwd"] == str(tmp_path)
        assert facts["pid"] != os.getpid()
        assert facts["leads"]
        assert facts["stdin"] == ""
        assert facts["threads"] == "3"

    def test_order_of_sets_of_text_is_the_same_in_every_worker(self, tmp_path: Path) -> None:
        sets = [self.run(tmp_path / str(number), "surroundings").facts["set"] for number in range(2)]
        assert sets[0] == sets[1]

    def test_frames_come_in_order_from_one_thread_and_end_with_the_result(self, tmp_path: Path) -> None:
        frames = Frames()
        with self.opened(tmp_path) as compute:
            result = compute.submit(self.work(tmp_path, "frames"), frames).wait(PATIENCE_S)
            assert result is not None
            time.sleep(0.1)
            seen = [frame for frame in frames.seen if not isinstance(frame, HeartbeatFrame)]
        points = [point for frame in seen if isinstance(frame, MetricsFrame) for point in frame.points]
        assert [point.step for point in points] == [*range(1200), 7, 0]
        assert {point.run_id for point in points} == {"run"}
        progress = [frame for frame in seen if isinstance(frame, ProgressFrame)]
        assert len(progress) < 100
        assert [frame.done for frame in progress] == sorted(frame.done for frame in progress)
        assert progress[-1] == ProgressFrame(done=1000, total=1000, text="all")
        outputs = [frame.name for frame in seen if isinstance(frame, OutputFrame)]
        assert outputs == ["first", "second"] == list(result.outputs)
        place = {frame.name: index for index, frame in enumerate(seen) if isinstance(frame, OutputFrame)}
        before = [point.name for frame in seen[: place["second"]] if isinstance(frame, MetricsFrame)
                  for point in frame.points]  # fmt: skip
        assert "last" in before
        assert "after" not in before
        assert seen[-1] == result
        assert len(frames.threads) == 1
        assert threading.get_ident() not in frames.threads

    def test_failure_names_the_error(self, tmp_path: Path) -> None:
        result = self.run(tmp_path, "fail")
        assert result.state == "failed"
        assert result.error is not None
        assert result.error["code"] == "stage.failed"
        assert "ValueError: the loss is not a number" in result.error["message"]
        log = Path(result.error["details"]["log"]).read_text()
        assert "Traceback (most recent call last)" in log

    def test_an_error_of_the_tree_keeps_its_code(self, tmp_path: Path) -> None:
        error = self.run(tmp_path, "fail_known").error
        assert error is not None
        assert (error["code"], error["hint"]) == ("data.invalid", "correct it")
        assert error["message"].startswith("churn.csv row 7")

    def test_exit_is_a_failure(self, tmp_path: Path) -> None:
        for do, code in (("exit", "3"), ("exit_at_once", "4")):
            result = self.run(tmp_path, do)
            assert result.state == "failed"
            assert result.error is not None
            assert result.error["code"] == "stage.failed"
            assert code in result.error["message"]

    def test_a_crash_names_the_signal(self, tmp_path: Path) -> None:
        error = self.run(tmp_path, "crash").error
        assert error is not None
        assert error["code"] == "stage.failed"
        assert "SIGSEGV" in error["message"]

    def test_a_killed_worker_is_a_failure_and_others_go_on(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            handle = compute.submit(self.work(tmp_path, "sleep"), Frames())
            other = compute.submit(self.work(tmp_path, "cooperate"), Frames())
            os.kill(int(self.said(handle, "pid")[1]), signal.SIGKILL)
            result = handle.wait(PATIENCE_S)
            assert result is not None
            assert result.state == "failed"
            assert result.error is not None
            assert "SIGKILL" in result.error["message"]
            assert other.wait(0) is None
            again = compute.submit(self.work(tmp_path, "hello"), Frames()).wait(PATIENCE_S)
            assert again is not None
            assert again.state == "succeeded"

    def test_wall_time_ends_a_work(self, tmp_path: Path) -> None:
        result = self.run(tmp_path, "sleep", wall_time_s=0.5)
        assert result.state == "failed"
        assert result.error is not None
        assert result.error["code"] == "stage.timeout"
        assert "500ms" in result.error["message"]

    def test_a_hung_interpreter_is_found(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, heartbeat_timeout_s=2.0) as compute:
            busy = compute.submit(self.work(tmp_path, "sleep"), Frames())
            handle = compute.submit(self.work(tmp_path, "hang"), Frames())
            result = handle.wait(PATIENCE_S)
            assert result is not None
            assert result.error is not None
            assert result.error["code"] == "stage.timeout"
            assert "hangs" in result.error["message"]
            assert busy.wait(0) is None, "a work that only sleeps does not hang"

    def test_memory_limit_ends_a_work(self, tmp_path: Path) -> None:
        for do in ("eat", "eat_in_child"):
            result = self.run(tmp_path, do, memory_limit_bytes=300_000_000)
            assert result.error is not None
            assert result.error["code"] == "stage.out_of_memory"
            assert "300MB" in result.error["message"]
            assert 300_000_000 < result.error["details"]["peak_bytes"] < 1_500_000_000

    def test_cancel_lets_a_work_save(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            work = self.work(tmp_path, "cooperate")
            handle = compute.submit(work, Frames())
            self.said(handle, "ready")
            handle.cancel(PATIENCE_S)
            handle.cancel(PATIENCE_S)
            result = handle.wait(PATIENCE_S)
            assert result is not None
            assert result.state == "cancelled"
            assert Path(work.scratch_dir, "saved").exists()
            handle.cancel(0)
            assert handle.wait(0) == result

    def test_cancel_kills_what_does_not_listen(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            for number, (do, grace_s) in enumerate((("refuse", 0.3), ("hang", 0.3), ("sleep", 0.0))):
                handle = compute.submit(self.work(tmp_path, do, number), Frames())
                self.said(handle, "ready" if do == "refuse" else "pid")
                handle.cancel(grace_s)
                result = handle.wait(PATIENCE_S)
                assert result is not None
                assert result.state == "cancelled", do

    def test_cancel_before_the_start(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            handle = compute.submit(self.work(tmp_path, "sleep"), Frames())
            handle.cancel(0.0)
            result = handle.wait(PATIENCE_S)
            assert result is not None
            assert result.state == "cancelled"

    def test_children_go_with_their_worker(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            for number, stay in enumerate((True, False)):
                work = self.work(tmp_path, "family", number, params={"stay": stay})
                handle = compute.submit(work, Frames())
                family = [int(pid) for pid in self.said(handle, "family")[1:]]
                assert len(family) == 3, handle.logs()
                if stay:
                    handle.cancel(0.0)
                assert handle.wait(PATIENCE_S) is not None
                assert eventually(lambda family=family: not any(map(is_alive, family))), family

    def test_logs_can_be_followed(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            handle = compute.submit(self.work(tmp_path, "cooperate"), Frames())
            self.said(handle, "ready")
            first = handle.logs()
            assert first == b"ready\n"
            assert handle.logs(len(first)) == b""
            handle.cancel(PATIENCE_S)
            assert handle.wait(PATIENCE_S) is not None

    def test_fifty_works_at_once(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            handles = [compute.submit(self.work(tmp_path, "hello", number), Frames()) for number in range(50)]
            results = [handle.wait(PATIENCE_S) for handle in handles]
            assert [result.state for result in results if result is not None] == ["succeeded"] * 50
            assert [handle.logs() for handle in handles] == [b"hello from hello\n"] * 50

    def test_fifty_works_one_after_another(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as compute:
            for number in range(50):
                result = compute.submit(self.work(tmp_path, "hello", number), Frames()).wait(PATIENCE_S)
                assert result is not None
                assert result.state == "succeeded"

    def test_close_ends_everything(self, tmp_path: Path) -> None:
        compute = self.open(tmp_path, ENTRY)
        handles = [compute.submit(self.work(tmp_path, "sleep", number), Frames()) for number in range(3)]
        pids = [int(self.said(handle, "pid")[1]) for handle in handles]
        compute.close()
        assert [result.state for handle in handles if (result := handle.wait(0))] == ["cancelled"] * 3
        assert not any(map(is_alive, pids))
        compute.close()
