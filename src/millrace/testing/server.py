"""A real `millrace up` for tests: started as a person would, stopped or killed by pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from millrace.core import server_file
from millrace.core.errors import UnavailableError

START_TIMEOUT_S = 60.0


class RunningServer:
    """A server over a home.

    Args:
        home: The home's folder; made when absent.
        workers: API processes.
        environment: Further variables.
        arguments: Further arguments of `millrace up`.
        prefix: What runs the command, for example in a network namespace.
    """

    def __init__(
        self,
        home: Path,
        *,
        workers: int = 1,
        environment: dict[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.home = home
        self.url = ""
        self._command = [*prefix, sys.executable, "-m", "millrace", "--home", str(home), "up", "--port", "0"]
        self._command += ["--workers", str(workers), *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.log = home.parent / f"{home.name}.up.log"

    def start(self) -> RunningServer:
        """Start, and wait until it answers.

        Raises:
            UnavailableError: It ended, or did not answer in time; the message has its log.
        """
        with self.log.open("ab") as output:
            seen = output.tell()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if b" ready " in self.log.read_bytes()[seen:]:
                found = server_file.read(self.home)
                if found is not None and found.pid == self._process.pid:
                    self.url = found.url
                    return self
            time.sleep(0.02)
        raise UnavailableError(f"the server did not start: {self.log.read_text()[-2000:]}")

    @property
    def pid(self) -> int:
        """The parent's process id."""
        assert self._process is not None
        return self._process.pid

    def children(self) -> dict[str, int]:
        """The pids of the processes below, in the order of their start: the loop first."""
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return {("loop" if index == 0 else f"api {index - 1}"): int(pid) for index, pid in enumerate(found)}

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=40)

    def kill(self) -> None:
        """SIGKILL the parent; the kernel tells its children."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)

    def __enter__(self) -> RunningServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
