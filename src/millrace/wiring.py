"""The composition root: the only module that knows every implementation; picks them lazily."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.compress import COMPRESS
from millrace.control.dispatch import Dispatcher
from millrace.control.services import Services
from millrace.control.stages import REGISTER
from millrace.core import extras
from millrace.core.clock import SystemClock
from millrace.core.ports import Blobs, Compute, Records, Signer, StageDescriptor, Work
from millrace.core.settings import find_home, resolve_settings
from millrace.data import DATA
from millrace.monitor import MONITOR
from millrace.serve import SERVE
from millrace.train import EVALUATE, EXPORT, TRAIN

STAGES: dict[str, StageDescriptor] = {
    stage.name: stage for stage in (DATA, TRAIN, EXPORT, EVALUATE, COMPRESS, REGISTER, SERVE, MONITOR)
}
HANDLER_MODULES = (
    "millrace.control.runs",
    "millrace.control.models",
    "millrace.control.tracking",
    "millrace.control.endpoints",
    "millrace.control.system",
)


def open_services(home: str | None = None) -> Services:
    """A home with its implementations, each made on first use.

    Args:
        home: The folder, or None to find it from the working directory.
    """
    flags = {"home": home} if home else {}
    folder = Path(home).absolute() if home else find_home(Path.cwd())
    settings = resolve_settings(flags, home=folder)

    def open_records() -> Records:
        return extras.load("millrace.store.records_sql:open_records")(folder / "records.db")

    def open_blobs() -> Blobs:
        return _local_blobs(folder)

    def open_compute(preload: Sequence[str]) -> Compute:
        compute_type = extras.load("millrace.compute.local:LocalCompute")
        return compute_type(
            folder, entry="millrace.wiring:execute", preload=tuple(preload),
            heartbeat_timeout_s=settings["heartbeat_timeout_s"].value,
        )  # fmt: skip

    def open_signer() -> Signer:
        return extras.load("millrace.security.signing:HomeSigner")(folder)

    return Services(
        home=folder,
        clock=SystemClock(),
        stages=STAGES,
        settings=settings,
        open_records=open_records,
        open_blobs=open_blobs,
        open_compute=open_compute,
        open_signer=open_signer,
    )


def _local_blobs(home: Path) -> Blobs:
    return extras.load("millrace.store.blobs_local:LocalBlobs")(home / "blobs")


def open_transport(home: str | None = None) -> Dispatcher:
    """The in-process transport over a home."""
    for module in HANDLER_MODULES:
        extras.load(f"{module}:__name__")
    return Dispatcher(open_services(home))


def execute(work: Work, link: Any) -> dict[str, Any]:
    """The entry of a worker: gives the step its context and runs it."""
    os.environ.setdefault("MILLRACE_HOME", work.home_dir)
    run_stage = extras.load("millrace.compute.worker:run_stage")
    return run_stage(work, link, _local_blobs(Path(work.home_dir)))
