"""An S3 lookalike for tests: `moto_server` in a process of its own. Quick, and it accepts any credentials."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from millrace.core.errors import UnavailableError
from millrace.testing.radosgw import free_port

START_TIMEOUT_S = 60.0


class MotoServer:
    """Start and stop one on loopback; under a second.

    Args:
        folder: Where its output goes.

    Attributes:
        endpoint: `http://127.0.0.1:PORT`; path-style addressing.
        access_key: Any would do.
        secret_key: Any would do.
    """

    region = "us-east-1"

    def __init__(self, folder: Path) -> None:
        self.folder, self._port = Path(folder), free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.access_key, self.secret_key = "any", "any"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> MotoServer:
        """Start it and wait until it answers. Returns itself.

        Raises:
            UnavailableError: It did not come up, for example because `moto[server]` is not installed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "moto.out").open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise UnavailableError(
                    f"moto_server did not come up: see {self.folder / 'moto.out'}", hint="pip install 'moto[server]'"
                )
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        """Kill it; everything stored is gone. Safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
