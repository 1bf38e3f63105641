"""A server that people sign in to, and a browser: real sockets on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from millrace.api.app import build_app
from millrace.core.clock import SystemClock
from millrace.testing.radosgw import free_port
from millrace.wiring import open_dispatcher

PASSWORD = "blue tractor on mars"


class ClockAhead(SystemClock):
    """The machine's clock, so many seconds ahead."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Site:
    """A server in a thread, over a home of its own. The issuer is told where it is before it starts.

    Args:
        folder: For the home.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.back = f"{self.url}/login/callback"
        self.home: Any = None
        self.clock = ClockAhead()
        self._server: Any = None
        self._thread = threading.Thread(target=lambda: self._server.run(), daemon=True)

    def start(self, **settings: str) -> None:
        """With what `settings.yaml` of the home says."""
        home = self.folder / "home"
        home.mkdir()
        (home / "settings.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
        self.home = open_dispatcher(str(home))
        self.home.services.clock = self.clock
        app = build_app(self.home, wants_token=True)
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", lifespan="off")
        )
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(10)
        if self.home is not None:
            self.home.close()

    def connections(self) -> set[Any]:
        """Those that are open now."""
        return self._server.server_state.connections

    def browser(self) -> httpx.Client:
        """Keeps cookies, follows redirects from one server to the other, and asks for pages."""
        headers = {"Accept": "text/html", "Sec-Fetch-Dest": "document"}
        return httpx.Client(base_url=self.url, headers=headers, follow_redirects=True, trust_env=False, timeout=20)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def cached(name: str, commands: Callable[[Path], list[list[str]]]) -> Path:
    """A folder that commands have filled, once; the test is skipped where they fail.

    Args:
        name: What is in it, with its version.
        commands: To be run inside, given where that is.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace-tests"
    folder, new = root / name, root / f"{name}.{os.getpid()}"
    if folder.is_dir():
        return folder
    new.mkdir(parents=True)
    for command in commands(new):
        done = subprocess.run(command, cwd=new, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(new)
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    try:
        new.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(new)
    return folder


def waiting_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until a program answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(url, trust_env=False, timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)
