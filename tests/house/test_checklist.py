"""Every row of every checklist names what shows it, and finished rows name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKLISTS = sorted((ROOT / "docs/checklists").glob("*.md"))
RESULT = re.compile(r"OPEN|DONE|SHORT: .+")


def rows(text: str) -> list[list[str]]:
    """The table rows of a checklist: id, line, test or command, result."""
    found = []
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith(("| id ", "|---")):
            found.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return found


def problems(text: str, root: Path) -> list[str]:
    """What is wrong with a checklist, one line each."""
    found = []
    seen: set[str] = set()
    for row in rows(text):
        if len(row) != 4 or not all(row):
            found.append(f"want four filled cells: {row}")
            continue
        name, _, shown_by, result = row
        if name in seen:
            found.append(f"{name}: the id stands twice")
        seen.add(name)
        if not re.search(r"`[^`]+`", shown_by):
            found.append(f"{name}: no test or command in `code`: {shown_by}")
        if not RESULT.fullmatch(result):
            found.append(f"{name}: result {result!r} is none of OPEN, DONE, SHORT: …")
        for path in re.findall(r"(?:tests|benchmarks)/[\w/.-]*", shown_by):
            if result != "OPEN" and not (root / path).exists():
                found.append(f"{name}: is {result.split(':')[0]}, but {path} does not exist")
    return found


@pytest.mark.parametrize("path", CHECKLISTS, ids=lambda path: path.stem)
def test_every_row_has_a_test_or_command(path: Path) -> None:
    assert problems(path.read_text(), ROOT) == []


def test_the_spine_is_complete() -> None:
    names = [row[0] for row in rows((ROOT / "docs/checklists/spine.md").read_text())]
    assert len(names) >= 150
    rooms = {int(match[1]) for name in names if (match := re.match(r"R(\d)\.", name))}
    assert rooms == set(range(1, 10))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("| A1 | a promise |  | OPEN |", "four filled cells"),
        ("| A1 | a promise | later | OPEN |", "no test or command"),
        ("| A1 | a promise | `make x` | maybe |", "result"),
        ("| A1 | a promise | `tests/none/test_none.py` | DONE |", "does not exist"),
        ("| A1 | a promise | `benchmarks/none.py` | SHORT: slow |", "does not exist"),
    ],
)
def test_a_bad_row_is_found(row: str, complaint: str, tmp_path: Path) -> None:
    assert complaint in "\n".join(problems(row, tmp_path))
