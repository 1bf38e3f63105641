"""What endpoints have kept of their requests: how much, and how a spec reads it."""

from __future__ import annotations

import os
from pathlib import Path

from millrace.control.dispatch import handles
from millrace.control.endpoints import captures_of
from millrace.control.services import Services
from millrace.core.errors import NotFoundError
from millrace.core.operations import live as ops
from millrace.core.types import Endpoint
from millrace.serve.capture import folder_of


@handles(ops.CAPTURED)
def captured(services: Services, body: ops.NameRequest) -> ops.CapturedRequests:
    """Count the parts; a line that is being written at this moment is not one yet."""
    if services.records.get(Endpoint, body.name) is None:
        raise NotFoundError(f"no endpoint {body.name[:80]!r} was ever served", hint="`millrace endpoints` lists them")
    folder = folder_of(captures_of(services.home), body.name)
    parts = sorted(folder.glob("*.jsonl"))
    place = os.path.relpath(folder, services.home.parent)
    return ops.CapturedRequests(
        endpoint=body.name, rows=sum(_lines_of(path) for path in parts), parts=len(parts),
        size_bytes=sum(path.stat().st_size for path in parts), folder=str(folder), source=f"{place}/*.jsonl",
    )  # fmt: skip


def _lines_of(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
