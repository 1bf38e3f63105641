"""Garbage, disk, status, doctor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.control.dispatch import Dispatcher
from millrace.control.services import Services
from millrace.core.types import ModelVersion
from millrace.wiring import open_services, open_transport


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def transport(home: Path) -> Iterator[Dispatcher]:
    opened = open_transport(str(home))
    yield opened
    opened.close()


@pytest.fixture
def services(home: Path) -> Iterator[Services]:
    opened = open_services(str(home))
    yield opened
    opened.close()


def test_the_space_adds_up(transport: Dispatcher, services: Services, home: Path) -> None:
    services.blobs.put(b"x" * 1000)
    usage = transport.call("system.du", {})
    assert usage.home == str(home)
    assert usage.parts["blobs"] == 1000
    assert usage.total_bytes == sum(usage.parts.values())


def test_status_counts_and_makes_no_home(transport: Dispatcher, home: Path) -> None:
    status = transport.call("system.status", {})
    assert (status.runs, status.models, status.running) == (0, 0, [])
    assert not (home / "records.db").exists()
    transport.call("run.track", {"name": "script"})
    assert transport.call("system.status", {}).runs == 1


def test_the_doctor_names_a_damaged_bundle(transport: Dispatcher, services: Services, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/model.onnx").write_bytes(b"weights")
    bundle = services.blobs.put_tree(tmp_path / "bundle")
    services.records.put(ModelVersion(id="m/1", name="m", number=1, bundle=bundle), expect_version=0)
    checks = {check.name: check for check in transport.call("system.doctor", {})}
    assert checks["models"].ok
    assert checks["records"].ok
    (leaf,) = services.blobs.tree(bundle.digest)
    file = services.blobs.path(leaf.digest)
    file.chmod(0o644)
    file.write_bytes(b"wrights")
    checks = {check.name: check for check in transport.call("system.doctor", {})}
    assert not checks["models"].ok
    assert "m v1" in checks["models"].text
