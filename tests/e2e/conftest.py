"""A folder with a small table and its spec."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from typing_by_hand import SMALL_SPEC, write_table


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a small table and its spec: a whole run takes seconds."""
    write_table(tmp_path / "cancer.csv")
    (tmp_path / "millrace.yaml").write_text(SMALL_SPEC)
    return tmp_path
