"""The tutorial's commands are run, in order, as a reader would."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs/tutorial.md"
BLOCK = re.compile(r"<!-- run(?:: (\w+))? -->\n```bash\n(.*?)```", flags=re.DOTALL)
ALERT = re.compile(r"\bopen\b.*\d > \d")
pytestmark = pytest.mark.slow


def free_port() -> int:
    """A loopback port that nobody holds now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Reader:
    """Somebody with two terminals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MILLRACE_COLOR": "never",
            "COLUMNS": "200",
        }
        self.environment.pop("MILLRACE_HOME", None)

    def run(self, script: str) -> str:
        """A block in the first terminal; it stays in the folder where the block ended."""
        script = f"{script.replace('8080', str(self.port))}\npwd > {self.folder}/.where\n"
        where = self.folder / ".where"
        folder = Path(where.read_text().strip()) if where.exists() else self.folder
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, script: str) -> None:
        """A block in the second terminal, until it answers."""
        folder = (self.folder / ".where").read_text().strip()
        command = script.strip().replace("8080", str(self.port)).split()
        log = (self.folder / "serve.log").open("wb")
        self.server = subprocess.Popen(
            command, cwd=folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self.until(self.is_ready, "the server is not ready")

    def is_ready(self) -> bool:
        """Whether the server says so."""
        assert self.server is not None
        assert self.server.poll() is None, (self.folder / "serve.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready", timeout=1) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def until(self, is_true: object, complaint: str, within_s: float = 60.0) -> None:
        """Wait for something that another process does."""
        end = time.monotonic() + within_s
        while not is_true():  # type: ignore[operator]
            assert time.monotonic() < end, complaint
            time.sleep(0.2)

    def stop(self) -> None:
        """Ctrl-C in the second terminal."""
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGINT)
            try:
                self.server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader in an empty folder."""
    reader = Reader(tmp_path)
    yield reader
    reader.stop()


@pytest.mark.rotating(1, "examples")
def test_the_tutorial_runs(reader: Reader) -> None:
    printed = ""
    blocks = BLOCK.findall(TUTORIAL.read_text(encoding="utf-8"))
    assert len(blocks) >= 7
    for kind, script in blocks:
        if kind == "background":
            reader.serve(script)
        elif kind == "alert":
            reader.until(lambda script=script: ALERT.search(reader.run(script)), "no alert was written")
        else:
            printed += reader.run(script)
    assert "probabilities" in printed
    assert "cached" in printed
    answers = reader.folder / "digits/answers.csv"
    assert len(answers.read_text(encoding="utf-8").splitlines()) > 1000
