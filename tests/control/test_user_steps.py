"""Own steps: functions and scripts, with parameters, outputs and clear refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from millrace.control.user_steps import run_user_step
from millrace.core.errors import InputError, StageError
from millrace.core.spec import Spec


def run(folder: Path, uses: str, **values: Any) -> tuple[dict[str, Any], dict[str, Path]]:
    """The facts and the outputs of a step."""
    scratch = folder / "scratch"
    scratch.mkdir()
    outputs: dict[str, Path] = {}
    context = SimpleNamespace(
        params={"uses": uses, "values": values}, project_dir=folder, scratch=scratch, output=outputs.__setitem__
    )
    return run_user_step(Spec(project="own"), context), outputs  # type: ignore[arg-type]


def test_a_function_gets_its_parameters_and_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "factor_of_it.py").write_text("factor = 3\n")
    (tmp_path / "own_steps.py").write_text(
        "from factor_of_it import factor\ndef times(ctx, x): return {'x': factor * x}\n"
    )
    assert run(tmp_path, "own_steps.py:times", x=2) == ({"x": 6}, {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.sh", 'echo "$MILLRACE_PARAMS $MILLRACE_PROJECT" > "$MILLRACE_OUTPUT/out.txt"'),
        (
            "s.py",
            "import os, pathlib\nfolder = pathlib.Path(os.environ['MILLRACE_OUTPUT'])\n"
            "(folder / 'out.txt').write_text(os.environ['MILLRACE_PARAMS'] + ' ' + os.environ['MILLRACE_PROJECT'])",
        ),
    ],
)
def test_a_script_finds_its_parameters_and_its_files_are_kept(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    facts, outputs = run(tmp_path, name, word="hello")
    assert facts == {"exit_code": 0}
    assert (outputs["files"] / "out.txt").read_text().strip() == '{"word": "hello"} own'


def test_a_script_that_fails_fails_the_step(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("exit 7\n")
    with pytest.raises(StageError, match=r"bad\.sh ended with code 7"):
        run(tmp_path, "bad.sh")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("def other(ctx): ...", InputError, r"steps_of_it\.py has no function 'mine'"),
        ("def mine(ctx): return [1]", StageError, "must return a dictionary of facts or nothing, got list"),
    ],
)
def test_what_is_no_step_is_named(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "steps_of_it.py").write_text(text)
    with pytest.raises(error, match=message):
        run(tmp_path, "steps_of_it.py:mine")
