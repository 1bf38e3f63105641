"""What of the stored state of an endpoint is still true: who wrote it may have died since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from millrace.control.loop import is_led
from millrace.control.services import Services
from millrace.core.types import Endpoint
from millrace.store.leases import host_id, process_start

UNSERVED = ("wanted", "starting", "ready")  # what a server would go on with, if there were one
_PROCESS = "process"  # in an endpoint's facts: what proves that the process in `pid` still lives


def process_facts(pid: int) -> dict[str, Any]:
    """What is kept beside a pid, so that other processes can tell whether it still means the same process."""
    return {_PROCESS: {"boot_id": host_id(), "started": process_start(pid)}}


def seen(services: Services, endpoint: Endpoint) -> Endpoint:
    """The endpoint as it is now: `stopped` where the process behind its stored state is gone."""
    if endpoint.is_managed:
        if endpoint.state in UNSERVED and not is_led(services):
            text = "no server is running; the next one serves it"
            return msgspec.structs.replace(endpoint, state="stopped", pid=None, replicas=0, text=text)
    elif endpoint.state == "ready" and _is_gone(endpoint):
        return msgspec.structs.replace(endpoint, state="stopped", url=None, pid=None)
    return endpoint


def _is_gone(endpoint: Endpoint) -> bool:
    if not endpoint.pid:
        return True
    proof = endpoint.facts.get(_PROCESS)
    if proof is None:  # written by a release that kept the pid alone
        return not Path(f"/proc/{endpoint.pid}").exists()
    return proof["boot_id"] != host_id() or proof["started"] != process_start(endpoint.pid)
