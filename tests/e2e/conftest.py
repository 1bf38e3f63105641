"""A folder with a small table and its spec, and one where it has run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from typing_by_hand import SMALL_SPEC, bundle_digest, run_millrace, write_table


def write_small(folder: Path) -> Path:
    write_table(folder / "cancer.csv")
    (folder / "millrace.yaml").write_text(SMALL_SPEC)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a small table and its spec: a whole run takes seconds."""
    return write_small(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after `millrace run`; only to be read."""
    folder = write_small(tmp_path_factory.mktemp("undisturbed"))
    run_millrace(folder, "run")
    return folder


@pytest.fixture(scope="session")
def undisturbed_digest(undisturbed: Path) -> str:
    """What a run that is disturbed must come to as well."""
    return bundle_digest(undisturbed)


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on in."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))
