"""Garbage, disk, status, doctor."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from millrace.control.dispatch import Dispatcher
from millrace.control.loop import take_lead
from millrace.control.seen import process_facts
from millrace.control.services import Services
from millrace.core.errors import ConflictError
from millrace.core.types import Endpoint, ModelVersion
from millrace.store.leases import host_id, process_start, release
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


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, for what is served in the foreground."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def write_served(services: Services, pid: int, facts: dict[str, Any]) -> None:
    services.records.put(
        Endpoint(id="e", name="e", model="m", number=1, variant="float32", state="ready", pid=pid, facts=facts)
    )


@pytest.mark.parametrize("proven", [True, False])
def test_an_endpoint_whose_process_was_killed_can_be_deleted(
    transport: Dispatcher, services: Services, sleeper: subprocess.Popen[bytes], proven: bool
) -> None:
    write_served(services, sleeper.pid, process_facts(sleeper.pid) if proven else {})
    assert transport.call("endpoint.get", {"name": "e"}).state == "ready"
    with pytest.raises(ConflictError, match=str(sleeper.pid)):
        transport.call("endpoint.delete", {"name": "e"})
    sleeper.kill()
    sleeper.wait()
    assert transport.call("endpoint.get", {"name": "e"}).state == "stopped"
    assert transport.call("endpoint.delete", {"name": "e"}).name == "e"
    assert services.records.get(Endpoint, "e") is None


def test_a_pid_that_another_process_got_serves_nothing(transport: Dispatcher, services: Services) -> None:
    write_served(services, os.getpid(), {"process": {"boot_id": host_id(), "started": "1"}})
    assert transport.call("endpoint.get", {"name": "e"}).state == "stopped"
    write_served(services, os.getpid(), {"process": {"boot_id": "before", "started": process_start(os.getpid())}})
    assert transport.call("endpoint.get", {"name": "e"}).state == "stopped"


def test_a_killed_serve_does_not_keep_its_name_from_being_deployed(
    transport: Dispatcher, services: Services, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "negative.onnx")
    transport.call("model.register", {"path": str(tmp_path / "negative.onnx")})
    write_served(services, sleeper.pid, process_facts(sleeper.pid))
    wanted = {"model": "negative", "endpoint": "e"}
    with pytest.raises(ConflictError, match=str(sleeper.pid)):
        transport.call("endpoint.deploy", wanted)
    sleeper.kill()
    sleeper.wait()
    assert transport.call("endpoint.deploy", wanted).is_managed


def test_a_deployed_endpoint_is_served_only_while_a_server_leads(transport: Dispatcher, services: Services) -> None:
    services.records.put(
        Endpoint(id="e", name="e", model="m", number=1, variant="", state="ready", pid=1, is_managed=True)
    )
    shown = transport.call("endpoint.get", {"name": "e"})
    assert (shown.state, shown.pid) == ("stopped", None)
    assert "no server" in shown.text
    lease = take_lead(services)
    assert lease is not None
    (shown,) = transport.call("endpoint.list", {})
    assert shown.state == "ready"
    release(services.records, lease)
    assert transport.call("endpoint.get", {"name": "e"}).state == "stopped"
