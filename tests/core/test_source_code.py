"""Code of users runs as it stands in the file."""

from __future__ import annotations

import os
import py_compile
import sys
from pathlib import Path

import pytest

from millrace.core.errors import InputError
from millrace.core.source_code import load_source


def test_an_edit_of_equal_size_and_time_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of an archive have them; Python itself would run the code before, which it has kept."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.syspath_prepend(str(tmp_path))
    main, beside = tmp_path / "edited_main.py", tmp_path / "edited_beside.py"
    for number in (1, 2):
        main.write_text(f"import edited_beside\nVALUE = {number}, edited_beside.VALUE\n")
        beside.write_text(f"VALUE = {number}\n")
        for path in (main, beside):
            os.utime(path, (1e9, 1e9))
            if number == 1:
                py_compile.compile(str(path))
        sys.modules.pop("edited_beside", None)
        assert (number, number) == load_source(main).VALUE
    kept = sorted(path.name for path in (tmp_path / "__pycache__").iterdir())
    assert len(kept) == 2, "and nothing is left beside them"
    for name in ("edited_main", "edited_beside"):
        sys.modules.pop(name)


def test_what_is_no_python_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"steps\.txt is not a Python file"):
        load_source(tmp_path / "steps.txt")
