"""How ends are told: the user's line, the cause, the log."""

from __future__ import annotations

import errno
import importlib.util
import signal
from pathlib import Path

import pytest

from millrace.compute.faults import describe_death, describe_exception
from millrace.core.errors import DataError, DiskFullError, StageError, StepMemoryError
from millrace.core.ports import Work

MODEL = """
import json

def build():
    return inner()

def inner():
    raise ValueError("no such layer")

def library():
    json.loads("{")

def memory():
    raise MemoryError

def torch_memory():
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you tried")

def disk():
    try:
        raise OSError(28, "No space left on device", "big.npz")
    except OSError as error:
        raise RuntimeError("could not save") from error

def silent():
    raise KeyError

def leave():
    raise SystemExit(3)

def wrapped():
    try:
        inner()
    except ValueError as error:
        raise RuntimeError("building failed") from error
"""


def work_in(project: Path) -> Work:
    return Work(
        step_id="1", run_id="r", name="train", implementation="m:f", spec=b"{}", project_dir=str(project),
        log_path="logs/train.log",
    )  # fmt: skip


def raised(path: Path, function: str) -> BaseException:
    spec = importlib.util.spec_from_file_location("users_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        getattr(module, function)()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is described
        return error
    raise AssertionError(f"{function} has not raised")


@pytest.mark.parametrize(
    ("function", "error_type", "message"),
    [
        ("build", StageError, "model.py:8 in inner: ValueError: no such layer"),
        ("library", StageError, "model.py:11 in library: JSONDecodeError: Expecting property name"),
        ("memory", StepMemoryError, "model.py:14 in memory: MemoryError: step train ran out of memory"),
        ("torch_memory", StepMemoryError, "model.py:17 in torch_memory: RuntimeError: [enforce fail"),
        ("disk", DiskFullError, "model.py:23 in disk: RuntimeError: could not save"),
        ("silent", StageError, "model.py:26 in silent: KeyError"),
        ("leave", StageError, "model.py:29 in leave: sys.exit(3) was called"),
        ("wrapped", StageError, "model.py:35 in wrapped: RuntimeError: building failed"),
    ],
)
def test_the_users_line_comes_first(tmp_path: Path, function: str, error_type: type[StageError], message: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    error = describe_exception(raised(tmp_path / "model.py", function), work_in(tmp_path))
    assert type(error) is error_type
    assert error.message.startswith(message)
    assert error.details["log"] == "logs/train.log"
    assert error.details["traceback"][0].startswith("Traceback")


def test_a_file_in_a_folder_of_the_project_is_the_users_but_an_environment_is_not(tmp_path: Path) -> None:
    for place, message in (
        (Path("parts/net.py"), "parts/net.py:8 in inner"),
        (Path(".venv/lib/net.py"), ".venv/lib/net.py:8"),
    ):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(MODEL)
        error = describe_exception(raised(tmp_path / place, "build"), work_in(tmp_path))
        assert error.message.startswith(message)


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("x = 1\ndef build(:\n    pass\n")
    error = describe_exception(raised(tmp_path / "model.py", "build"), work_in(tmp_path))
    assert error.message == "model.py:2: SyntaxError: invalid syntax"


def test_our_frame_is_named_where_the_user_has_none(tmp_path: Path) -> None:
    try:
        int("x")
    except ValueError as raised_here:
        error = describe_exception(raised_here, work_in(tmp_path))
    assert error.message.startswith("test_faults.py:")


def test_an_error_of_the_tree_is_kept(tmp_path: Path) -> None:
    known = DataError("churn.csv row 3: want a number", hint="correct it", details={"row": 3})
    error = describe_exception(known, work_in(tmp_path))
    assert error is known
    assert error.details["row"] == 3
    assert error.details["log"] == "logs/train.log"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_by_number(tmp_path: Path, number: int) -> None:
    assert isinstance(describe_exception(OSError(number, "full"), work_in(tmp_path)), DiskFullError)
    assert not isinstance(describe_exception(OSError(errno.EACCES, "no"), work_in(tmp_path)), DiskFullError)


def test_deaths_have_their_cause(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    assert "SIGBUS (bus error" in describe_death(signal.SIGBUS, work, b"").message
    assert "SIGKILL (killed from outside" in describe_death(signal.SIGKILL, work, b"").message
    assert "SIGUSR1" in describe_death(signal.SIGUSR1 | 0x80, work, b"").message
    assert describe_death(9 << 8, work, b"").details["exit_code"] == 9
    lost = describe_death(None, work, b"", -15)
    assert "fork server has ended (exit code -15)" in lost.message


def test_a_crash_names_the_users_line_from_the_dump(tmp_path: Path) -> None:
    dump = (
        "epoch 1\nFatal Python error: Segmentation fault\n\nCurrent thread 0x7 (most recent call first):\n"
        f'  File "/usr/lib/python3.11/ctypes/__init__.py", line 5 in string_at\n'
        f'  File "{tmp_path}/model.py", line 12 in build\n  File "{tmp_path}/main.py", line 3 in main\n'
    )
    error = describe_death(signal.SIGSEGV, work_in(tmp_path), dump.encode())
    assert error.message.startswith("model.py:12 in build: step train was ended by SIGSEGV (segmentation fault")
