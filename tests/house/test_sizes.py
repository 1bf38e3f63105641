"""The tail stays short: files, functions, hidden imports, module names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    """scripts/sizes.py as a module."""
    specification = importlib.util.spec_from_file_location("sizes", ROOT / "scripts/sizes.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["sizes"] = module
    specification.loader.exec_module(module)
    return module


sizes = load()


@pytest.fixture(scope="module")
def rooms() -> list[Any]:
    """Every room of the package, measured once: it takes seconds."""
    return sizes.measure()


def test_no_file_is_too_long(rooms: list[Any]) -> None:
    long = [f"{name}: {n}" for room in rooms for name, n in room.files.items() if n > sizes.FILE_LINES]
    assert long == []


def test_no_function_is_too_long(rooms: list[Any]) -> None:
    long = [f"{one.where}: {one.lines}" for room in rooms for one in room.functions if one.lines > sizes.FUNCTION_LINES]
    assert long == []


def test_imports_stand_at_the_top(rooms: list[Any]) -> None:
    hidden = [where for room in rooms for where in room.hidden]
    total = sum(room.imports for room in rooms)
    assert len(hidden) <= sizes.HIDDEN_IMPORTS * total, f"{len(hidden)} of {total}: {', '.join(hidden)}"


def test_package_and_rooms_stay_small(rooms: list[Any]) -> None:
    assert sum(room.lines for room in rooms) <= sizes.PACKAGE_LINES
    large = [f"{room.name}: {room.lines}" for room in rooms if room.lines > sizes.ROOM_LINES]
    assert large == []


def test_names_say_something(rooms: list[Any]) -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "base", "misc", "manager"}
    names = [name for room in rooms for name in room.files if set(Path(name).with_suffix("").parts) & empty]
    assert names == []


def test_the_measure_sees_what_it_must(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    body = "    x = 1\n" * 90
    (room / "deep.py").write_text(f"import os\n\n\ndef long():\n    import json\n{body}    return os, json, x\n")
    (measured,) = sizes.measure(tmp_path)
    assert measured.functions[0].lines > sizes.FUNCTION_LINES
    assert (measured.imports, measured.hidden) == (2, ["room/deep.py:5"])
    assert measured.lines == pytest.approx(96, abs=1)
