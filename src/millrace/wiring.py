"""The composition root: the only module that knows every implementation; picks them lazily."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

import millrace
from millrace.compress import COMPRESS
from millrace.control.dispatch import Dispatcher
from millrace.control.services import Services
from millrace.control.stages import REGISTER
from millrace.core import extras, server_file
from millrace.core.clock import SystemClock
from millrace.core.errors import InputError
from millrace.core.ports import Blobs, Compute, Records, Signer, StageDescriptor, StepBlobs, Transport, Work
from millrace.core.server_file import ServerFile
from millrace.core.settings import find_home, resolve_settings
from millrace.core.types import Lease, Struct
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
    "millrace.control.deploying",
    "millrace.control.captured",
    "millrace.control.placing",
    "millrace.control.rollouts",
    "millrace.control.system",
    "millrace.control.migration",
    "millrace.control.backup",
    "millrace.control.audit",
    "millrace.control.privacy",
    "millrace.control.garbage",
    "millrace.control.following",
    "millrace.control.uploads",
    "millrace.control.projects",
    "millrace.control.recorded",
    "millrace.control.registered",
    "millrace.control.mlflow_import.verbs",
    "millrace.control.tokens",
    "millrace.control.works",
    "millrace.control.approvals",
    "millrace.control.quotas",
    "millrace.control.keys",
    "millrace.control.secrets",
    "millrace.control.trusted_keys",
    "millrace.control.users",
    "millrace.control.roles",
    "millrace.control.compliance",
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
        return _open_compute(services, preload)

    def open_signer() -> Signer:
        published = extras.load("millrace.control.trust:published_key")
        refusal = extras.load("millrace.control.trust:refusal_of")
        return extras.load("millrace.security.signing:HomeSigner")(
            folder,
            lambda key_id: published(services.records, key_id) if services.is_used else None,
            lambda key_id: refusal(services.records, clock.now(), key_id) if services.is_used else None,
        )

    def open_records() -> Records:
        extras.load("millrace.store.backup_marker:refuse_unfinished")(folder)
        records = open_records_at(records_url)
        if records_url:  # other homes may work on them, and are to trust what this one signs
            own = extras.load("millrace.security.signing:HomeSigner")(folder)
            publish = extras.load("millrace.control.trust:publish_key")
            publish(records, clock, str(folder), own.key_id, own.public_key())
        return records

    def open_blobs() -> Blobs:
        inner = open_blobs_at(settings["blobs_url"].value)
        source = settings["encryption_key"].value
        if not source and not services.is_used:
            return inner
        return extras.load("millrace.control.keys:protect")(inner, services.records, folder, source)

    services = Services(
        home=folder,
        clock=clock,
        stages=STAGES,
        settings=settings,
        open_records=open_records,
        open_blobs=open_blobs,
        open_compute=open_compute,
        open_signer=open_signer,
        open_records_at=open_records_at,
        open_blobs_at=open_blobs_at,
        drives_apart=drives_apart,
    )
    return services


def _open_compute(services: Services, preload: Sequence[str]) -> Compute:
    """This machine; or, for steps that may leave it, whichever workers ask for them."""
    silence_s, kind = services.setting("heartbeat_timeout_s"), services.setting("compute")
    if kind not in ("local", "workers"):
        raise InputError(f"the setting compute is local or workers, got {kind!r}")
    local: Compute = extras.load("millrace.compute.local:LocalCompute")(
        services.home, entry="millrace.wiring:execute", preload=tuple(preload), heartbeat_timeout_s=silence_s
    )
    if kind == "local":
        return local
    stays = [stage for stage in services.stages.values() if stage.stays_home or stage.uses_source or stage.timed]
    pack = extras.load("millrace.control.uploads:store_project")
    return extras.load("millrace.compute.remote:RemoteCompute")(
        services.records, services.clock, local, stays_home=frozenset(stage.implementation for stage in stays),
        pack=lambda project: pack(services.blobs, project), silence_s=silence_s,
    )  # fmt: skip


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
    settings = resolve_settings(home=folder)
    url = settings["url"].value
    if url:
        token = os.environ.get("MILLRACE_TOKEN") or extras.load("millrace.client.logins:token_for")(url)
        return open_far(url, token, settings["ca_file"].value)
    server = _living_server(folder)
    if server is None:
        return open_dispatcher(home)
    token = os.environ.get("MILLRACE_TOKEN") or _local_token(folder)
    return extras.load("millrace.client.http:HttpTransport")(server.url, token, server.ca_file)


def open_far(url: str, token: str = "", ca_file: str = "") -> Any:
    """The transport to a server that shares no files with this process."""
    return extras.load("millrace.client.remote:RemoteTransport")(url, token, ca_file)


def _local_token(home: Path) -> str:
    """What a server that wants tokens has left for commands in its home's folder."""
    path = home / server_file.TOKEN_NAME
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):  # a server that wants none, or another user's
        return ""


def open_dispatcher(home: str | None = None, *, drives_apart: bool = False) -> Dispatcher:
    """The in-process transport over a home."""
    for module in HANDLER_MODULES:
        extras.load(f"{module}:__name__")
    return Dispatcher(open_services(home, drives_apart=drives_apart))


def _living_server(home: Path) -> ServerFile | None:
    """The server that `server.json` of the home names, if its process lives."""
    server = server_file.read(home)
    if server is None:
        return None
    lease = Lease(id="server", boot_id=server.boot_id, pid=server.pid, process_started=server.process_started)
    return None if extras.load("millrace.store.leases:holder_is_dead")(lease) else server


def run_server(home: str | None, on_ready: Callable[[str], None], **options: Any) -> int:
    """Serve a home until told to stop; the exit code."""
    extras.require([("uvicorn", "server"), ("starlette", "server")], "the server")
    folder = Path(home).absolute() if home else find_home(Path.cwd())
    # Read by prometheus-client when it is imported: metrics of all API processes are summed through files there.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder / "scratch" / f"metrics-{os.getpid()}")
    supervisor_type = extras.load("millrace.api.supervisor:Supervisor")
    config = extras.load("millrace.api.supervisor:UpConfig")(home=str(folder), **options)
    return supervisor_type(config, lambda: open_dispatcher(str(folder), drives_apart=True)).run(on_ready)


class Access(Struct, frozen=True, kw_only=True):
    """How a work on another machine reaches its server: a file that its worker process reads."""

    url: str
    token: str
    ca_file: str
    cache: str
    patience_s: float


ACCESS_NAME = "access.json"


def run_worker(on_event: Callable[[str], None], *, url: str, token: str, ca_file: str, folder: Path, name: str) -> None:
    """Ask a server for works and do them, until SIGTERM or SIGINT."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    local: Compute = extras.load("millrace.compute.local:LocalCompute")(folder, entry="millrace.wiring:execute_afar")

    def open_order(order: Any, place: Path) -> tuple[Any, Any]:
        access = Access(
            url=url, token=order.token, ca_file=ca_file, cache=str(folder / "cache"), patience_s=order.silence_s
        )
        with open(os.open(place / ACCESS_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(access))
        return _open_access(access)

    server = open_far(url, token, ca_file)
    agent = extras.load("millrace.compute.agent:Agent")(
        server, open_order, local, folder=folder, name=name, version=millrace.__version__
    )
    try:
        with extras.load("millrace.control.interrupts:calling_on_signals")(lambda *_: agent.stop()):
            agent.run(on_event)
    finally:
        local.close()
        server.close()


def _open_access(access: Access) -> tuple[Any, StepBlobs]:
    server = open_far(access.url, access.token, access.ca_file)
    cache = extras.load("millrace.store.blobs_local:LocalBlobs")(Path(access.cache))
    return server, extras.load("millrace.client.far_blobs:FarBlobs")(server, cache, access.patience_s)


def execute_afar(work: Work, link: Any) -> dict[str, Any]:
    """The entry of a worker process on another machine."""
    access = msgspec.json.decode((Path(work.home_dir) / ACCESS_NAME).read_bytes(), type=Access)
    os.environ["MILLRACE_HOME"] = work.home_dir
    return extras.load("millrace.compute.worker:run_stage")(work, link, _open_access(access)[1])


def execute(work: Work, link: Any) -> dict[str, Any]:
    """The entry of a worker: gives the step its context and runs it."""
    os.environ.setdefault("MILLRACE_HOME", work.home_dir)
    run_stage = extras.load("millrace.compute.worker:run_stage")
    home = Path(work.home_dir)
    settings = resolve_settings(home=home)
    inner, source = _open_blobs(home, settings["blobs_url"].value), settings["encryption_key"].value
    if not source:
        return run_stage(work, link, inner)
    records = _open_records(home, settings["records_url"].value)
    try:
        blobs = extras.load("millrace.control.keys:protect")(inner, records, home, source)
        kind, _, name = source.partition(":")
        if kind == "env":
            os.environ.pop(name, None)  # read by now; what the step starts need not have it
        return run_stage(work, link, blobs)
    finally:
        records.close()
