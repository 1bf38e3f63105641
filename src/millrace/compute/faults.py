"""How a step's end is told: the user's own line first, the cause by name, the log's path."""

from __future__ import annotations

import errno
import re
import signal
import traceback
from pathlib import Path
from typing import Any

from millrace.core.errors import DiskFullError, MillraceError, StageError, StepMemoryError
from millrace.core.ports import Work

_NOT_USERS = frozenset({"site-packages", "dist-packages", ".venv", "venv", ".millrace"})
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|failed to allocate memory|bad_alloc", re.IGNORECASE)
_DUMPED_FRAME = re.compile(rb'File "([^"]+)", line (\d+) in (\S+)')
_SAID = {
    signal.SIGSEGV: "segmentation fault: native code touched memory that is not its own",
    signal.SIGABRT: "aborted by native code",
    signal.SIGBUS: "bus error: a mapped file became shorter, or the disk is full",
    signal.SIGFPE: "arithmetic error in native code",
    signal.SIGILL: "illegal instruction: a package built for another processor",
    signal.SIGKILL: "killed from outside Millrace",
}


def describe_exception(error: BaseException, work: Work) -> MillraceError:
    """The error of a step that has raised.

    Args:
        error: What left the step's function, with its traceback.
        work: The step; its project folder tells the user's files from others.

    Returns:
        Millrace's own errors as they are; everything else as StageError, StepMemoryError or DiskFullError
        whose message begins with the user's line. `details` has the log's path and the traceback.

    Example:
        >>> work = Work(step_id="s", run_id="r", name="fit", implementation="m:f", spec=b"{}", log_path="fit.log")
        >>> str(describe_exception(MemoryError(), work))
        'MemoryError: step fit ran out of memory'
    """
    details: dict[str, Any] = {"log": work.log_path, "traceback": traceback.format_exception(error)}
    if isinstance(error, MillraceError):
        error.details = {**details, **error.details}
        return error
    place = _place(error, Path(work.project_dir))
    said = _text(error)
    if any(isinstance(one, OSError) and one.errno in _DISK_FULL for one in _chain(error)):
        return DiskFullError(f"{place}{said} (step {work.name}: the disk is full)", details=details)
    if _is_out_of_memory(error):
        return StepMemoryError(f"{place}{said or 'MemoryError'}: step {work.name} ran out of memory", details=details)
    return StageError(f"{place}{said}", details=details)


def describe_death(status: int | None, work: Work, printed: bytes, server_code: int | None = None) -> StageError:
    """The error of a worker that ended without a result and was not ended by us.

    Args:
        status: As `os.waitpid` gives it; None when nobody knows it any more.
        work: The step.
        printed: What the work has printed: a crash leaves its Python stack there.
        server_code: How the fork server has ended, if it has; negative for a signal.

    Example:
        >>> work = Work(step_id="s", run_id="r", name="fit", implementation="m:f", spec=b"{}")
        >>> str(describe_death(11, work, b"")).partition(":")[0]
        'step fit was ended by SIGSEGV (segmentation fault'
        >>> str(describe_death(3 << 8, work, b""))
        'step fit left its process with exit code 3 and without a result'
    """
    details: dict[str, Any] = {"log": work.log_path}
    if status is None:
        return StageError(
            f"step {work.name} lost its worker: the fork server has ended (exit code {server_code})",
            hint="see logs/forkserver.log in the home, and run again: finished steps are kept", details=details,
        )  # fmt: skip
    if not status & 0x7F:
        code = status >> 8
        return StageError(
            f"step {work.name} left its process with exit code {code} and without a result",
            hint="a step must return or raise: remove os._exit() and the like", details={**details, "exit_code": code},
        )  # fmt: skip
    number = signal.Signals(status & 0x7F)
    place = _dumped_place(printed, Path(work.project_dir)) if number != signal.SIGKILL else ""
    said = f" ({_SAID[number]})" if number in _SAID else ""
    return StageError(
        f"{place}step {work.name} was ended by {number.name}{said}", details={**details, "signal": number.name}
    )


def _place(error: BaseException, project: Path) -> str:
    """`model.py:12 in build: ` of the innermost frame in the project, else of the innermost of all."""
    if isinstance(error, SyntaxError) and error.filename and _is_users(Path(error.filename), project):
        return f"{_short(Path(error.filename), project)}:{error.lineno}: "
    frames = [
        (Path(frame.filename), frame.lineno, frame.name)
        for one in reversed(_chain(error))
        for frame in traceback.extract_tb(one.__traceback__)
        if not frame.filename.startswith("<frozen importlib")  # between an import and the module that fails
    ]
    if not frames:
        return ""
    users = [frame for frame in frames if _is_users(frame[0], project)]
    path, line, name = users[-1] if users else frames[-1]
    return f"{_short(path, project)}:{line} in {name}: "


def _text(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) was called: a step must return or raise"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_users(path: Path, project: Path) -> bool:
    """Inside the project, but not in an environment or a home that happens to lie there."""
    project = project.absolute()
    if not path.is_absolute() or not path.is_relative_to(project):
        return False
    parts = path.relative_to(project).parts
    return not _NOT_USERS.intersection(parts)


def _short(path: Path, project: Path) -> str:
    project = project.absolute()
    return str(path.relative_to(project)) if path.is_relative_to(project) else path.name


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return chain


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, and what torch and onnxruntime raise in its place."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def _dumped_place(printed: bytes, project: Path) -> str:
    """The innermost line of the user in the stack that faulthandler has printed last."""
    dump = printed[max(printed.rfind(b"Fatal Python error"), 0) :]
    for name, line, function in _DUMPED_FRAME.findall(dump):
        path = Path(name.decode(errors="replace"))
        if _is_users(path, project):
            return f"{_short(path, project)}:{line.decode()} in {function.decode(errors='replace')}: "
    return ""
