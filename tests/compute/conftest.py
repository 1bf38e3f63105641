"""Memory is measured here, and a mapped file of a folder in memory is memory: temporary files lie on a disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """On a disk, wherever the other tests have theirs: see tests/conftest.py."""
    with tempfile.TemporaryDirectory(prefix="compute-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
