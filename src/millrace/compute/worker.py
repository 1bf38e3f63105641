"""What runs inside a worker process: the step's context, and how its end is told."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from millrace.compute.link import WorkerLink
from millrace.core import extras
from millrace.core.errors import DiskFullError, MillraceError, NotFoundError, StageError, StepMemoryError
from millrace.core.ports import Blobs, HeartbeatFrame, MetricsFrame, OutputFrame, ProgressFrame, Work, WorkResult
from millrace.core.spec import Spec
from millrace.core.spec_errors import decode_hook
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, MetricPoint

HEARTBEAT_S = 0.5
FLUSH_S = 0.2
FLUSH_POINTS = 500
PROGRESS_S = 0.1
log = logging.getLogger(__name__)


class WorkerContext:
    """Implements `core.ports.Context`."""

    def __init__(self, work: Work, link: WorkerLink, blobs: Blobs) -> None:
        self._work, self._link, self._blobs = work, link, blobs
        self._points: list[MetricPoint] = []
        self._flushed_at = time.monotonic()
        self._progress_at = 0.0
        self._lock = threading.Lock()
        self.outputs: dict[str, Artifact] = {}
        root = Path(work.scratch_dir)
        self._scratch, self._checkpoints = root / "tmp", root / "checkpoints"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._checkpoints.mkdir(parents=True, exist_ok=True)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._work.seed

    @property
    def threads(self) -> int:
        """How many threads to use."""
        return self._work.threads

    @property
    def device(self) -> str:
        """The resolved device."""
        return self._work.device

    @property
    def project_dir(self) -> Path:
        """The folder of the spec."""
        return Path(self._work.project_dir)

    @property
    def scratch(self) -> Path:
        """A folder that was empty when this attempt began."""
        return self._scratch

    @property
    def checkpoints(self) -> Path:
        """A folder that survives kills."""
        return self._checkpoints

    @property
    def params(self) -> dict[str, Any]:
        """The step's parameters."""
        return self._work.params

    @property
    def cancelled(self) -> bool:
        """True after SIGTERM."""
        return _cancelled.is_set()

    def has_input(self, name: str) -> bool:
        """Whether an input was given."""
        return name in self._work.inputs

    def input(self, name: str) -> Path:
        """A verified read-only file, or folder for a tree."""
        artifact = self._work.inputs.get(name)
        if artifact is None:
            known = ", ".join(sorted(self._work.inputs)) or "none"
            raise NotFoundError(f"step {self._work.name} has no input {name!r}", hint=f"its inputs: {known}")
        if artifact.media_type == TREE_MEDIA_TYPE:
            folder = Path(self._work.home_dir) / "scratch" / "trees" / artifact.digest.replace(":", "-")
            return self._blobs.materialize(artifact.digest, folder)
        return self._blobs.path(artifact.digest)

    def output(self, name: str, path: Path) -> Artifact:
        """Store a file or folder."""
        artifact = self._blobs.put_tree(path) if path.is_dir() else self._blobs.put(path)
        self.outputs[name] = artifact
        self._link.send(OutputFrame(name=name, artifact=artifact))
        return artifact

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """One point; sent in batches."""
        with self._lock:
            self._points.append(MetricPoint(self._work.run_id, name, step, float(value), time.time()))
            if len(self._points) < FLUSH_POINTS and time.monotonic() - self._flushed_at < FLUSH_S:
                return
        self.flush()

    def flush(self) -> None:
        """Send what is held back."""
        with self._lock:
            points, self._points = self._points, []
            self._flushed_at = time.monotonic()
        if points:
            self._link.send(MetricsFrame(points=points))

    def progress(self, done: float, total: float, text: str = "") -> None:
        """At most ten times a second, and always the last."""
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_S or done >= total:
            self._progress_at = now
            self._link.send(ProgressFrame(done=float(done), total=float(total), text=text))


_cancelled = threading.Event()


def run_stage(work: Work, link: WorkerLink, blobs: Blobs) -> dict[str, Any]:
    """Run the step's function with its spec and context; facts and outputs.

    Returns:
        `{"facts": …, "outputs": …}`.
    """
    spec = msgspec.json.decode(work.spec, type=Spec, dec_hook=decode_hook)
    context = WorkerContext(work, link, blobs)
    stage = extras.load(work.implementation)
    try:
        facts = stage(spec, context)
    finally:
        context.flush()
    shutil.rmtree(work.scratch_dir, ignore_errors=True)
    return {"facts": facts or {}, "outputs": context.outputs}


def work_and_exit(work: Work, link: WorkerLink, entry: str) -> None:
    """Everything a worker process does after its fork. Never returns."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: _cancelled.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect(Path(work.log_path))
    os.chdir(work.project_dir)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = str(work.threads)
    random.seed(work.seed)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(work.threads)
    threading.Thread(target=_die_with_driver, args=(link,), daemon=True).start()
    threading.Thread(target=_beat, args=(link,), daemon=True).start()
    link.send(_result(work, link, entry))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _result(work: Work, link: WorkerLink, entry: str) -> WorkResult:
    try:
        answer = extras.load(entry)(work, link)
        state = "cancelled" if _cancelled.is_set() else "succeeded"
        plain = msgspec.json.decode(msgspec.json.encode(answer["facts"]))
        return WorkResult(state=state, outputs=answer["outputs"], facts=plain)
    except BaseException as error:  # noqa: BLE001 - the border: everything becomes a result
        traceback.print_exc()
        if _cancelled.is_set():
            return WorkResult(state="cancelled")
        return WorkResult(state="failed", error=describe(error, work).to_dict())


def describe(error: BaseException, work: Work) -> MillraceError:
    """An error as people read it: the user's own line first."""
    details = {"log": work.log_path}
    if isinstance(error, MillraceError):
        error.details = {**details, **error.details}
        return error
    where = _users_line(error, Path(work.project_dir))
    text = f"{where}{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return StepMemoryError(f"step {work.name} ran out of memory: {text}", details=details)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"step {work.name}: the disk is full: {text}", details=details)
    return StageError(text, details=details)


def _users_line(error: BaseException, project: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(project) and "site-packages" not in path.parts:
            return f"{path.relative_to(project)}:{frame.lineno} in {frame.name}: "
    return ""


def _redirect(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _die_with_driver(link: WorkerLink) -> None:
    link.wait_for_close()
    os.killpg(os.getpid(), signal.SIGKILL)


def _beat(link: WorkerLink) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    while True:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * page
        link.send(HeartbeatFrame(at=time.time(), rss_bytes=resident))
        time.sleep(HEARTBEAT_S)
