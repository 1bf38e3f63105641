"""A server over a fresh home, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from millrace.client.http import HttpTransport
from millrace.testing.server import RunningServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server") / "home") as running:
        yield running


@pytest.fixture(scope="module")
def transport(server: RunningServer) -> Iterator[HttpTransport]:
    opened = HttpTransport(server.url)
    yield opened
    opened.close()
