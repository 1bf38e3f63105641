"""LocalCompute passes the conformance suite, forking and spawning; and what only it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from millrace.compute.local import LocalCompute
from millrace.compute.orphans import clean_orphans
from millrace.compute.processes import children_of
from millrace.core.errors import UnavailableError
from millrace.core.ports import HeartbeatFrame, OutputFrame
from millrace.testing.compute import ENTRY, PATIENCE_S, ComputeConformance, Frames, eventually, is_alive

DRIVER = """
import sys, time
from pathlib import Path
from millrace.compute.local import LocalCompute
from millrace.testing.compute import ENTRY, ComputeConformance
home = Path(sys.argv[1])
compute = LocalCompute(home, entry=ENTRY)
for number, do in enumerate(sys.argv[2:]):
    compute.submit(ComputeConformance().work(home, do, number), lambda frame: None)
time.sleep(600)
"""


class TestForked(ComputeConformance):
    def open(self, home: Path, entry: str, **options: Any) -> LocalCompute:
        return LocalCompute(home, entry, **options)


class TestSpawned:
    """What is different on macOS, done here too: the workers are started, not forked."""

    suite = TestForked()

    @pytest.fixture
    def compute(self, tmp_path: Path):
        compute = LocalCompute(tmp_path, ENTRY, method="spawn")
        yield compute
        compute.close()

    def test_works_end_as_they_do_when_forked(self, compute: LocalCompute, tmp_path: Path) -> None:
        wanted = {"hello": None, "crash": "SIGSEGV", "fail": "not a number", "surroundings": None}
        handles = {do: compute.submit(self.suite.work(tmp_path, do), Frames()) for do in wanted}
        for do, text in wanted.items():
            result = handles[do].wait(PATIENCE_S)
            assert result is not None
            assert (result.error is None) if text is None else (text in str(result.error)), do
        facts = handles["surroundings"].wait(0)
        assert facts is not None
        assert facts.facts["leads"]

    def test_cancel(self, compute: LocalCompute, tmp_path: Path) -> None:
        handle = compute.submit(self.suite.work(tmp_path, "cooperate"), Frames())
        self.suite.said(handle, "ready")
        handle.cancel(PATIENCE_S)
        result = handle.wait(PATIENCE_S)
        assert result is not None
        assert result.state == "cancelled"


class TestLocal:
    suite = TestForked()

    @pytest.fixture
    def compute(self, tmp_path: Path):
        compute = LocalCompute(tmp_path, ENTRY)
        yield compute
        compute.close()

    def start_driver(self, home: Path, *works: str) -> tuple[subprocess.Popen[bytes], list[int], int]:
        """A driver in another process: it, its workers, its fork server."""
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(home), *works])
        logs = [home / "logs" / f"{do}-{number}.log" for number, do in enumerate(works)]
        assert eventually(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
        pids = [int(word) for log in logs for word in log.read_text().split() if word.isdigit()]
        server = next(pid for pid in children_of(driver.pid) if pid not in pids)
        return driver, pids, server

    @pytest.mark.parametrize("do", ["sleep", "hang", "family"])
    def test_workers_die_with_a_killed_driver(self, tmp_path: Path, do: str) -> None:
        driver, pids, server = self.start_driver(tmp_path, do)
        try:
            assert all(map(is_alive, [*pids, server]))
        finally:
            driver.kill()
            driver.wait()
        assert eventually(lambda: not any(map(is_alive, [*pids, server])), 3.0)

    def test_workers_die_with_a_driver_and_its_fork_server(self, tmp_path: Path) -> None:
        driver, pids, server = self.start_driver(tmp_path, "hang")
        os.kill(server, signal.SIGSTOP)
        driver.kill()
        driver.wait()
        os.kill(server, signal.SIGKILL)
        assert eventually(lambda: not any(map(is_alive, pids)), 3.0)

    def test_orphans_are_ended_and_only_they(self, compute: LocalCompute, tmp_path: Path) -> None:
        alive = compute.submit(self.suite.work(tmp_path, "sleep", 7), Frames())
        self.suite.said(alive, "pid")
        driver, pids, server = self.start_driver(tmp_path, "family")
        assert clean_orphans(tmp_path) == [], "the driver lives"
        os.kill(server, signal.SIGSTOP)  # so that nobody cleans up: both are killed at once
        driver.kill()
        driver.wait()
        os.kill(server, signal.SIGKILL)
        assert eventually(lambda: not is_alive(pids[0]), 3.0)
        clean_orphans(tmp_path)
        assert eventually(lambda: not any(map(is_alive, pids)))
        assert alive.wait(0) is None
        assert [path.stem for path in (tmp_path / "scratch" / "workers").glob("*.json")] == [str(alive.pid)]

    def test_a_killed_fork_server_fails_its_works_and_is_replaced(self, compute: LocalCompute, tmp_path: Path) -> None:
        handle = compute.submit(self.suite.work(tmp_path, "family"), Frames())
        pids = [int(pid) for pid in self.suite.said(handle, "family")[1:]]
        server = next(pid for pid in children_of(os.getpid()) if handle.pid in children_of(pid))
        os.kill(server, signal.SIGKILL)
        result = handle.wait(PATIENCE_S)
        assert result is not None
        assert "fork server" in str(result.error)
        assert eventually(lambda: not any(map(is_alive, pids)))
        again = compute.submit(self.suite.work(tmp_path, "hello"), Frames()).wait(PATIENCE_S)
        assert again is not None
        assert again.state == "succeeded"

    def test_the_thread_that_submits_may_end(self, compute: LocalCompute, tmp_path: Path) -> None:
        handles = []
        thread = threading.Thread(
            target=lambda: handles.append(compute.submit(self.suite.work(tmp_path, "cooperate"), Frames()))
        )
        thread.start()
        thread.join()
        self.suite.said(handles[0], "ready")
        assert handles[0].wait(0.2) is None
        assert is_alive(handles[0].pid)
        handles[0].cancel(PATIENCE_S)
        assert handles[0].wait(PATIENCE_S).state == "cancelled"

    def test_workers_beat(self, compute: LocalCompute, tmp_path: Path) -> None:
        frames = Frames()
        handle = compute.submit(self.suite.work(tmp_path, "sleep"), frames)
        assert eventually(lambda: sum(isinstance(frame, HeartbeatFrame) for frame in frames.seen) >= 2)
        beats = [frame for frame in frames.seen if isinstance(frame, HeartbeatFrame)]
        assert beats[1].at - beats[0].at > 0.4
        assert beats[0].rss_bytes > 1_000_000
        handle.cancel(0)

    def test_environment_is_the_drivers_at_submit(
        self, compute: LocalCompute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for told in ("once", "twice"):
            monkeypatch.setenv("MILLRACE_TEST_TOLD", told)
            result = compute.submit(self.suite.work(tmp_path, "surroundings"), Frames()).wait(PATIENCE_S)
            assert result is not None
            assert result.facts["told"] == told

    def test_a_preload_that_fails_is_only_logged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "millrace_test_broken.py").write_text("raise RuntimeError('broken package')\n")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        compute = LocalCompute(tmp_path, ENTRY, ["millrace_test_absent", "millrace_test_broken", "csv"])
        try:
            result = compute.submit(self.suite.work(tmp_path, "hello"), Frames()).wait(PATIENCE_S)
            log = tmp_path / "logs" / "forkserver.log"
            assert eventually(lambda: "broken package" in log.read_text())
        finally:
            compute.close()
        assert result is not None
        assert result.state == "succeeded"
        assert "millrace_test_absent was not imported" in log.read_text()

    def test_a_preload_may_start_a_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then SIGCHLD may arrive in that thread, whatever the main thread has blocked."""
        code = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        (tmp_path / "millrace_test_thread.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        compute = LocalCompute(tmp_path, ENTRY, ["millrace_test_thread"])
        try:
            works = [self.suite.work(tmp_path, "hello", number) for number in range(60)]
            assert compute.submit(works[0], Frames()).wait(PATIENCE_S) is not None
            handles = [compute.submit(work, Frames()) for work in works]
            results = [handle.wait(PATIENCE_S) for handle in handles]
        finally:
            compute.close()
        assert [result.error for result in results if result is not None] == [None] * 60

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_driver_whose_listener_fails_gets_an_answer(self, compute: LocalCompute, tmp_path: Path) -> None:
        def on_frame(frame: object) -> None:
            if isinstance(frame, OutputFrame):
                raise OSError("database is gone")

        handle = compute.submit(self.suite.work(tmp_path, "frames"), on_frame)
        result = handle.wait(PATIENCE_S)
        assert result is not None
        assert result.state == "failed"
        assert "driver" in str(result.error)
        assert eventually(lambda: not is_alive(handle.pid or 0))

    def test_a_slow_listener_is_not_a_hang(self, tmp_path: Path) -> None:
        compute = LocalCompute(tmp_path, ENTRY, heartbeat_timeout_s=1.0)
        try:
            handle = compute.submit(
                self.suite.work(tmp_path, "frames"),
                lambda frame: time.sleep(1.5 if isinstance(frame, OutputFrame) else 0),
            )
            result = handle.wait(PATIENCE_S)
        finally:
            compute.close()
        assert result is not None
        assert result.state == "succeeded"

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        before = set(children_of(os.getpid()))
        descriptors = len(os.listdir("/proc/self/fd"))
        compute = LocalCompute(tmp_path, ENTRY)
        assert set(children_of(os.getpid())) == before, "the fork server starts with the first work"
        for number in range(3):
            compute.submit(self.suite.work(tmp_path, "hello", number), Frames()).wait(PATIENCE_S)
        compute.close()
        assert set(children_of(os.getpid())) == before
        assert eventually(lambda: len(os.listdir("/proc/self/fd")) == descriptors, 5.0)
        assert list((tmp_path / "scratch" / "workers").iterdir()) == []
        with pytest.raises(UnavailableError, match="closed"):
            compute.submit(self.suite.work(tmp_path, "hello"), Frames())
