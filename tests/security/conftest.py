"""The site that attacks are tried on, one for the tests of a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.wiring import open_dispatcher

sys.path.insert(0, str(Path(__file__).parent))

from attacked import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("attacks")
    home = open_dispatcher(str(folder / "home"))
    site = Site(home, folder)
    with site.runner:
        yield site
    home.close()
