"""What runs inside a worker process: its set-up, the step's context, and how its end is told."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import shutil
import signal
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from socket import socket
from typing import Any, ClassVar, NoReturn

import msgspec
import numpy as np
import numpy.random  # numpy imports it lazily: 25 ms in every worker, if not in the fork server

from millrace.compute.faults import describe_exception
from millrace.compute.held_secrets import FilteredLog, harden
from millrace.compute.isolation import isolate
from millrace.compute.limits import thread_environment
from millrace.compute.link import Channel, Order
from millrace.compute.outbox import WorkerLink, end_session, peak_bytes
from millrace.compute.processes import die_with_parent
from millrace.core import extras
from millrace.core.environment import ENVIRONMENT_MEDIA_TYPE, current_environment
from millrace.core.errors import CancelledError, MillraceError, NotFoundError, StageError
from millrace.core.ids import canonical_json
from millrace.core.ports import StepBlobs, Work, WorkResult
from millrace.core.redaction import Redactor
from millrace.core.settings import resolve_settings
from millrace.core.spec import Spec
from millrace.core.spec_errors import decode_hook
from millrace.core.types import TREE_MEDIA_TYPE, Artifact

__all__ = ["WorkerContext", "WorkerLink", "run_stage", "run_worker"]


class _Held:
    """Secrets of the one work that this process does."""

    values: ClassVar[dict[str, str]] = {}
    hide: ClassVar[Redactor] = Redactor(())


class WorkerContext:
    """Implements `core.ports.Context`. Thread-safe, as its link is.

    Args:
        work: The step.
        link: To its driver.
        blobs: Where inputs come from and outputs go.
    """

    def __init__(self, work: Work, link: WorkerLink, blobs: StepBlobs) -> None:
        self._work, self._link, self._blobs = work, link, blobs
        home = Path(work.home_dir or ".")
        root = Path(work.scratch_dir) if work.scratch_dir else home / "scratch" / "steps" / work.step_id
        self._trees = home / "scratch" / "trees"
        self._scratch, self._checkpoints = root / "tmp", root / "checkpoints"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)  # one from before
        shutil.rmtree(self._scratch, ignore_errors=True)  # of an attempt that was killed
        self._scratch.mkdir(parents=True, exist_ok=True)
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
        """A folder that survives kills of this step."""
        return self._checkpoints

    @property
    def params(self) -> dict[str, Any]:
        """The step's parameters."""
        return self._work.params

    @property
    def cancelled(self) -> bool:
        """True once the run is being cancelled: save a checkpoint and return."""
        return self._link.cancelled

    def clean(self, has_succeeded: bool) -> None:
        """Remove the scratch folder; after success the checkpoints with it."""
        shutil.rmtree(self._scratch.parent if has_succeeded else self._scratch, ignore_errors=True)

    def secret(self, name: str) -> str:
        """The value of a secret that the spec names for this step.

        Raises:
            NotFoundError: The step does not name it.
        """
        if name not in _Held.values:
            named = ", ".join(sorted(_Held.values)) or "none"
            raise NotFoundError(
                f"step {self._work.name} has no secret {name!r}",
                hint=f"name it under `secrets` of the step, which names {named}",
            )
        return _Held.values[name]

    def has_input(self, name: str) -> bool:
        """Whether an optional input was given."""
        return name in self._work.inputs

    def input(self, name: str) -> Path:
        """A verified read-only file, or folder for a tree (one per home and digest, shared by steps).

        Raises:
            NotFoundError: The step has no such input.
            CorruptError: The stored bytes are not what they must be.
        """
        artifact = self._work.inputs.get(name)
        if artifact is None:
            given = ", ".join(sorted(self._work.inputs)) or "none"
            raise NotFoundError(f"step {self._work.name} has no input {name!r}", hint=f"its inputs: {given}")
        if artifact.media_type != TREE_MEDIA_TYPE:
            return self._blobs.path(artifact.digest)
        self._trees.mkdir(parents=True, exist_ok=True)
        return self._blobs.materialize(artifact.digest, self._trees / artifact.digest.replace(":", "-"))

    def output(self, name: str, path: Path) -> Artifact:
        """Store a file or folder as the step's output `name`, durably, and tell the driver."""
        artifact = self._blobs.put_tree(path) if path.is_dir() else self._blobs.put(path)
        self._link.output(name, artifact)
        return artifact

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """Record one point; cheap, sent in batches."""
        self._link.log_metric(_Held.hide.text(name), value, step)

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far the step is; at most ten times a second are sent, always the newest."""
        self._link.progress(done, total, _Held.hide.text(text))


def run_stage(work: Work, link: WorkerLink, blobs: StepBlobs) -> dict[str, Any]:
    """Call the work's function with its spec and a context.

    Args:
        work: What to run.
        link: To the driver.
        blobs: The home's blobs.

    Returns:
        The facts that the function has returned.

    Raises:
        StageError: It returned something else.
    """
    stage = extras.load(work.implementation)
    spec = msgspec.json.decode(work.spec, type=Spec, dec_hook=decode_hook)
    context = WorkerContext(work, link, blobs)
    link.environment = blobs.put(canonical_json(current_environment()), ENVIRONMENT_MEDIA_TYPE)
    facts = stage(spec, context)
    if facts is not None and not isinstance(facts, dict):
        raise StageError(f"step {work.name} must return a dictionary of facts, got {type(facts).__name__}")
    context.clean(has_succeeded=not link.cancelled)
    return facts or {}


def run_worker(descriptor: int, parent: int) -> NoReturn:
    """Everything that a worker process does.

    Args:
        descriptor: Its end of the line to the driver.
        parent: The fork server; it and its workers do not outlive one another.
    """
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    die_with_parent(signal.SIGKILL, parent)
    channel = Channel(socket(fileno=descriptor))
    order = channel.receive()
    if not isinstance(order, Order):  # the driver is gone, or has changed its mind
        os._exit(0)
    told = _isolated(order)
    die_with_parent(signal.SIGKILL, parent)  # a change of rights forgets it
    log = _hold_secrets(order)
    link = WorkerLink(channel, order.work)
    signal.signal(signal.SIGTERM, link.cancel)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})  # held by the fork server
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    link.start()
    result = _work(order, link, log, told)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, or closed by the step
            stream.flush()
    if log is not None:
        log.finish()
    if not link.finish(result):
        end_session()
    os._exit(0)


def _hold_secrets(order: Order) -> FilteredLog | None:
    """Before there are threads: what hides the values in the log is forked from here."""
    if not order.secrets:
        return None
    harden()
    _Held.values, _Held.hide = order.secrets, Redactor(order.secrets.values())
    return FilteredLog(Path(order.work.log_path) if order.work.log_path else Path(os.devnull), order.secrets)


def _isolated(order: Order) -> str:
    """Before there are threads: away from what is not the step's, if the setting wants it; what the log says of it."""
    work, home = order.work, Path(order.work.home_dir or ".")
    try:
        settings = resolve_settings(environ=order.environment, home=home)
    except MillraceError:
        return ""  # said again, and clearly, where the step begins
    wanted = settings["isolate_steps"].value
    if wanted == "off" or (wanted != "on" and os.geteuid() == 0):
        return ""
    own = Path(work.scratch_dir) if work.scratch_dir else home / "scratch" / "steps" / work.step_id
    return isolate(home, own, Path(work.project_dir), keeps_keys=bool(settings["encryption_key"].value))


def _work(order: Order, link: WorkerLink, log: FilteredLog | None, told: str) -> WorkResult:
    work, hide = order.work, _Held.hide
    try:
        _set_up(order, log)
        if told:
            print(told, flush=True)
        facts = hide.plain(_plain(extras.load(order.entry)(work, link), work))
    except BaseException as error:  # noqa: BLE001 - the border: whatever the step does becomes a result
        with contextlib.suppress(OSError):  # the log's disk may be the full one
            traceback.print_exception(error)
        if not link.cancelled:
            return WorkResult(state="failed", error=hide.plain(_described(error, work)), peak_rss_bytes=peak_bytes())
        facts = {}
    if link.cancelled:
        error = CancelledError(f"step {work.name} was cancelled").to_dict()
        return WorkResult(state="cancelled", outputs=link.outputs, error=error, peak_rss_bytes=peak_bytes())
    return WorkResult(
        state="succeeded", outputs=link.outputs, facts=facts, peak_rss_bytes=peak_bytes(), environment=link.environment
    )


def _described(error: BaseException, work: Work) -> dict[str, Any]:
    described = describe_exception(error, work).to_dict()
    try:
        return _plain(described, work)
    except StageError:  # an error of a plug-in whose details are not plain data
        return {**described, "details": {"log": work.log_path, "text": repr(described["details"])}}


def _set_up(order: Order, log: FilteredLog | None) -> None:
    """Log, folder, environment, threads, seeds: as if the work had been started from the driver alone."""
    work = order.work
    _redirect(Path(work.log_path) if work.log_path else Path(os.devnull), None if log is None else log.input)
    faulthandler.enable(sys.stderr if log is None else log.raw)  # it writes places in code, no values
    kept = {name: value for name, value in os.environ.items() if name.startswith(("MILLRACE_FORK", "PYTHONHASHSEED"))}
    os.environ.clear()
    os.environ.update({**order.environment, **kept, **thread_environment(work.threads)})
    os.chdir(work.project_dir)
    sys.path.extend(folder for folder in order.import_path if folder not in sys.path)
    _limit_loaded_libraries(work.threads)
    random.seed(work.seed)
    numpy.random.seed(work.seed % 2**32)


def _limit_loaded_libraries(threads: int) -> None:
    """Libraries that the fork server has imported have read their environment already."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
    pools = sys.modules.get("threadpoolctl")  # scikit-learn brings it
    if pools is not None:
        pools.threadpool_limits(limits=threads)


def _redirect(path: Path, pipe: int | None = None) -> None:
    """Standard output and error to the end of the log, or into a pipe; standard input from nowhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if pipe is None else os.dup(pipe)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    if pipe is not None:  # the streams were made for a file, in which one can seek
        sys.stdout, sys.stderr = (
            open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _plain(value: Any, work: Work) -> Any:
    """Facts as plain data; numpy's numbers and arrays, paths and structs are turned into it.

    Raises:
        StageError: They hold something else.
    """
    try:
        return msgspec.to_builtins(value, enc_hook=_plain_one, str_keys=True)
    except (TypeError, NotImplementedError, RecursionError) as error:
        raise StageError(f"the facts of step {work.name} must be plain data (numbers, text, lists): {error}") from None


def _plain_one(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float):  # a share
        return float(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"got a {type(value).__name__}")


if __name__ == "__main__":
    run_worker(int(sys.argv[1]), int(sys.argv[2]))
