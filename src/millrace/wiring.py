"""The composition root: the only module that knows every implementation; picks them lazily."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from millrace.compress import COMPRESS
from millrace.control.dispatch import Dispatcher
from millrace.control.services import Services
from millrace.control.stages import REGISTER
from millrace.core import extras, server_file
from millrace.core.clock import SystemClock
from millrace.core.ports import Blobs, Compute, Records, Signer, StageDescriptor, Transport, Work
from millrace.core.settings import find_home, resolve_settings
from millrace.core.types import Lease
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
    "millrace.control.deployments",
    "millrace.control.system",
    "millrace.control.migration",
    "millrace.control.garbage",
    "millrace.control.following",
    "millrace.control.uploads",
    "millrace.control.projects",
    "millrace.control.recorded",
    "millrace.control.registered",
    "millrace.control.mlflow_import.verbs",
)


def open_services(home: str | None = None, *, drives_apart: bool = False) -> Services:
    """A home with its implementations, each made on first use.

    Args:
        home: The folder, or None to find it from the working directory.
        drives_apart: For a server: runs are driven by processes of their own.
    """
    flags = {"home": home} if home else {}
    folder = Path(home).absolute() if home else find_home(Path.cwd())
    settings = resolve_settings(flags, home=folder)
    records_url, clock = settings["records_url"].value, SystemClock()

    def open_records_at(url: str) -> Records:
        return _open_records(folder, url)

    def open_blobs_at(url: str) -> Blobs:
        return _open_blobs(folder, url)

    def open_compute(preload: Sequence[str]) -> Compute:
        compute_type = extras.load("millrace.compute.local:LocalCompute")
        return compute_type(
            folder, entry="millrace.wiring:execute", preload=tuple(preload),
            heartbeat_timeout_s=settings["heartbeat_timeout_s"].value,
        )  # fmt: skip

    def open_signer() -> Signer:
        published = extras.load("millrace.control.trust:published_key")
        find = (lambda key_id: published(services.records, key_id)) if records_url else None
        return extras.load("millrace.security.signing:HomeSigner")(folder, find)

    def open_records() -> Records:
        records = open_records_at(records_url)
        if records_url:  # other homes may work on them, and are to trust what this one signs
            own = extras.load("millrace.security.signing:HomeSigner")(folder)
            publish = extras.load("millrace.control.trust:publish_key")
            publish(records, clock, str(folder), own.key_id, own.public_key())
        return records

    services = Services(
        home=folder,
        clock=clock,
        stages=STAGES,
        settings=settings,
        open_records=open_records,
        open_blobs=lambda: open_blobs_at(settings["blobs_url"].value),
        open_compute=open_compute,
        open_signer=open_signer,
        open_records_at=open_records_at,
        open_blobs_at=open_blobs_at,
        drives_apart=drives_apart,
    )
    return services


def _open_records(home: Path, url: str) -> Records:
    if url:
        extras.require([("psycopg", "postgres")], "keeping records on PostgreSQL")
        return extras.load("millrace.store.postgres:open_records")(url)
    return extras.load("millrace.store.records_sql:open_records")(home / "records.db")


def _open_blobs(home: Path, url: str) -> Blobs:
    if url:
        extras.require([("obstore", "s3")], "keeping blobs in an object store")
        return extras.load("millrace.store.blobs_remote:RemoteBlobs")(url, home / "cache" / "blobs")
    return extras.load("millrace.store.blobs_local:LocalBlobs")(home / "blobs")


def open_transport(home: str | None = None, *, embedded: bool = False) -> Transport:
    """How to reach a home: through its running server when there is one, else in this process.

    Args:
        home: The folder, or None to find it from the working directory.
        embedded: Open the home here, whoever else has it open.
    """
    if embedded:
        return open_dispatcher(home)
    folder = Path(home).absolute() if home else find_home(Path.cwd())
    url = resolve_settings(home=folder)["url"].value
    if url:
        return extras.load("millrace.client.remote:RemoteTransport")(url)
    url = _living_server(folder)
    return extras.load("millrace.client.http:HttpTransport")(url) if url else open_dispatcher(home)


def open_dispatcher(home: str | None = None, *, drives_apart: bool = False) -> Dispatcher:
    """The in-process transport over a home."""
    for module in HANDLER_MODULES:
        extras.load(f"{module}:__name__")
    return Dispatcher(open_services(home, drives_apart=drives_apart))


def _living_server(home: Path) -> str | None:
    """The URL of the server that `server.json` of the home names, if its process lives."""
    server = server_file.read(home)
    if server is None:
        return None
    lease = Lease(id="server", boot_id=server.boot_id, pid=server.pid, process_started=server.process_started)
    return None if extras.load("millrace.store.leases:holder_is_dead")(lease) else server.url


def run_server(home: str | None, on_ready: Callable[[str], None], **options: Any) -> int:
    """Serve a home until told to stop; the exit code."""
    extras.require([("uvicorn", "server"), ("starlette", "server")], "the server")
    folder = Path(home).absolute() if home else find_home(Path.cwd())
    # Read by prometheus-client when it is imported: metrics of all API processes are summed through files there.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder / "scratch" / f"metrics-{os.getpid()}")
    supervisor_type = extras.load("millrace.api.supervisor:Supervisor")
    config = extras.load("millrace.api.supervisor:UpConfig")(home=str(folder), **options)
    return supervisor_type(config, lambda: open_dispatcher(str(folder), drives_apart=True)).run(on_ready)


def execute(work: Work, link: Any) -> dict[str, Any]:
    """The entry of a worker: gives the step its context and runs it."""
    os.environ.setdefault("MILLRACE_HOME", work.home_dir)
    run_stage = extras.load("millrace.compute.worker:run_stage")
    home = Path(work.home_dir)
    return run_stage(work, link, _open_blobs(home, resolve_settings(home=home)["blobs_url"].value))
