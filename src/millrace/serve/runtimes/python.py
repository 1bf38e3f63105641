"""Runs a user's own code in a process of its own: what it does wrong is a failed request, never a dead server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from millrace.core.errors import CorruptError, MillraceError, StageError, UnavailableError, from_dict
from millrace.formats.signature import Signature
from millrace.serve.runtimes import wire
from millrace.serve.runtimes.declared import Declared
from millrace.serve.runtimes.worker import Order

LOAD_TIMEOUT_S = 300.0
BACKOFF_S = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # before a start, by deaths in a row
PATIENCE_S = 0.6  # a call waits so long for a restart; what would wait longer is refused
_DYING_S = 1.0  # between the end of its socket and its own
_LINE_CHARACTERS = 4000
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
         "CUDA_VISIBLE_DEVICES")  # fmt: skip
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class PythonRuntime:
    """A `Runtime` over `service.py:Class`, or over a folder with `model.py` and `model.safetensors`.

    The process is started anew when it has died, or when a call took longer than its deadline. The call that
    it died of fails: the batcher then tries the requests of that batch one by one, so that only the guilty one
    fails. A process that dies again and again is started ever later. Thread-safe.

    Args:
        name: The endpoint's, before each line that the code prints.
        order: What to run.
        deadline_s: Of one call; None: what the code declares.
    """

    is_isolated = True  # a call may hang: never on the event loop

    def __init__(self, name: str, order: Order, deadline_s: float | None = None) -> None:
        self._name, self._order = name, order
        self._deadline_s = deadline_s
        self._declared: Declared | None = None
        self._example: dict[str, np.ndarray] = {}
        self._worker: _Worker | None = None
        self._lock = threading.Lock()
        self._deaths = 0  # in a row
        self._next_start_s = 0.0
        self._is_closed = False

    @property
    def platform(self) -> str:
        """What runs the model: the user's class, or PyTorch with the folder's weights."""
        return "python" if self._order.attribute else "pytorch_safetensors"

    @property
    def signature(self) -> Signature:
        """As declared; only after `load`."""
        return self.declared.signature

    @property
    def declared(self) -> Declared:
        """What the code says of itself; only after `load`."""
        assert self._declared is not None, "load() comes first"
        return self._declared

    @property
    def is_ready(self) -> bool:
        """Loaded, and not dying again and again."""
        is_loaded = self._declared is not None and not self._is_closed
        return is_loaded and time.monotonic() + PATIENCE_S >= self._next_start_s

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        worker = self._worker
        return worker.pid if worker is not None and worker.is_alive else None

    def load(self) -> None:
        """Start the process and wait for its `load()`.

        Raises:
            MillraceError: What it says is wrong; it died, or took longer than five minutes.
        """
        with self._lock:
            worker = self._worker = _Worker(self._name, self._order)
            try:
                self._declared, self._example = worker.wait_ready(LOAD_TIMEOUT_S)
            except BaseException:
                worker.kill()
                raise

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            InputError: What the code raised as such.
            StageError: The code raised something else, died, or took longer than its deadline.
            UnavailableError: It died again and again, and is not started yet.
        """
        with self._lock:
            worker = self._running()
            deadline_s = self._deadline_s or self.declared.deadline_s
            try:
                message, outputs = worker.call(tensors, deadline_s)
            except TimeoutError:
                self._bury(worker)
                text = f"{self._name}: predict took longer than its deadline of {deadline_s:g} s: its process was ended"
                raise StageError(text, hint="a longer `deadline_s` in the class, or smaller requests") from None
            except (EOFError, OSError, CorruptError):
                how = self._bury(worker, _DYING_S)
                raise StageError(f"{self._name}: its process ended ({how}) during predict",
                                 hint="its last words are in the server's log") from None  # fmt: skip
            self._deaths, self._next_start_s = 0, 0.0
        if message.kind == "error":
            raise from_dict(message.body)
        return outputs

    def sample(self) -> Mapping[str, np.ndarray]:
        """The declared example's first row; empty where there is none."""
        return {name: values[:1] for name, values in self._example.items()}

    def unload(self) -> None:
        """End the process; a call that runs fails."""
        self._is_closed = True
        if self._worker is not None:
            self._worker.kill()

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the process; 0 where that is not known."""
        pid = self.pid
        return resident_bytes(pid) if pid is not None else 0

    # ------------------------------------------------------------------ deaths

    def _running(self) -> _Worker:
        """The process, loaded; started anew where it is not there.

        Raises:
            StageError: Unloaded, or it cannot be loaded any more.
            UnavailableError: Too early.
        """
        worker = self._worker
        if self._is_closed or worker is None or self._declared is None:
            raise StageError("the model is not loaded")
        if not worker.is_alive and not worker.is_buried:
            self._bury(worker)  # between two calls, of nobody's request
        if worker.is_buried:
            wait_s = self._next_start_s - time.monotonic()
            if wait_s > PATIENCE_S:
                text = f"{self._name}: its process ended {self._deaths} times in a row"
                raise UnavailableError(f"{text}: it is started again in {wait_s:.1f} s")
            time.sleep(max(0.0, wait_s))
            worker = self._worker = _Worker(self._name, self._order)
            if self._is_closed:  # meanwhile
                worker.kill()
        if not worker.is_loaded:
            try:
                worker.wait_ready(LOAD_TIMEOUT_S)
            except MillraceError:
                self._bury(worker)
                raise
        return worker

    def _bury(self, worker: _Worker, patience_s: float = 0.0) -> str:
        """Count a death and set when the next start may be; how it died."""
        how = worker.kill(patience_s)
        worker.is_buried = True
        self._deaths += 1
        self._next_start_s = time.monotonic() + BACKOFF_S[min(self._deaths, len(BACKOFF_S)) - 1]
        if not self._is_closed:
            print(f"{self._name}| its process ended: {how}", file=sys.stderr, flush=True)
        return how


class _Worker:
    """The process and the socket to it."""

    def __init__(self, name: str, order: Order) -> None:
        ours, theirs = socket.socketpair()
        self.is_loaded = self.is_buried = False
        self._sock = ours
        environment = {key: value for key, value in os.environ.items() if key in _KEPT}
        environment |= dict.fromkeys(_THREADS, str(order.threads)) | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "millrace.serve.runtimes.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),), env=environment, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        assert self._process.stdout is not None
        threading.Thread(target=_relay, args=(name, self._process.stdout), name="prints", daemon=True).start()
        self._order = order

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, timeout_s: float) -> tuple[Declared, dict[str, np.ndarray]]:
        deadline_s = time.monotonic() + timeout_s
        try:
            wire.send(self._sock, "order", msgspec.to_builtins(self._order), {})
            message, example = wire.receive(self._sock, deadline_s)
        except TimeoutError:
            raise UnavailableError(f"{self._what} was not loaded within {timeout_s:g} s") from None
        except (EOFError, OSError):
            raise StageError(f"{self._what} ended while it was loaded ({self.kill(_DYING_S)})",
                             hint="its last words are in the log above") from None  # fmt: skip
        if message.kind == "error":
            raise from_dict(message.body)
        self.is_loaded = True
        return msgspec.convert(message.body, Declared), example

    @property
    def _what(self) -> str:
        return f"{Path(self._order.path).name}:{self._order.attribute}".rstrip(":")

    def call(self, tensors: Mapping[str, np.ndarray], deadline_s: float) -> tuple[wire.Message, dict[str, np.ndarray]]:
        self._sock.settimeout(deadline_s)
        at_s = time.monotonic() + deadline_s
        wire.send(self._sock, "call", {}, tensors)
        return wire.receive(self._sock, at_s)

    def kill(self, patience_s: float = 0.0) -> str:
        """End it and whatever it has started; how it ended, "stopped" where that was here."""
        try:
            self._process.wait(patience_s)
            is_ours = False
        except subprocess.TimeoutExpired:
            is_ours = True
        self._end_group()
        code = self._process.wait()
        self._sock.close()
        if is_ours:
            return "stopped"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _relay(name: str, lines: IO[bytes]) -> None:
    """What the code prints, into the server's log; ends with the process."""
    with lines:
        while line := lines.readline(_LINE_CHARACTERS):
            text = line.decode("utf-8", "replace").rstrip("\n")
            if text:
                print(f"{name}| {text}", file=sys.stderr, flush=True)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where that is not known.

    Example:
        >>> resident_bytes(os.getpid()) >= 0
        True
    """
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
