"""`millrace up`: one process tree. The parent binds, forks API processes and the loop, and restarts what dies.

The parent imports the application and does nothing else: it opens no records and has no threads, so that
its children, forked at any time, are whole, and share its memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

import msgspec
import uvicorn

import millrace
from millrace.api import meters
from millrace.api.app import build_app
from millrace.api.connections import connections
from millrace.control.deployments import Reconciler
from millrace.control.dispatch import Dispatcher
from millrace.control.endpoints import sections_of
from millrace.control.loop import Loop
from millrace.control.tokens import first_tokens
from millrace.core import server_file
from millrace.core.addresses import check_networks, is_loopback
from millrace.core.errors import (
    ConflictError,
    DeniedError,
    DiskFullError,
    InputError,
    MillraceError,
    UnavailableError,
    from_dict,
)
from millrace.core.server_file import ServerFile
from millrace.core.types import Struct
from millrace.serve.hosting import HostConfig
from millrace.serve.service import HttpLimits
from millrace.serve.tls import server_context
from millrace.store.leases import host_id, process_start

BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEADY_S = 10.0  # who lived so long has not crashed at its start
GRACE_S = 15.0  # then what has not stopped is killed
START_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1
OWNER_SHOWN = "shown this once, good for 24 h: sign in as `owner` with it, or keep it as MILLRACE_TOKEN till then"
log = logging.getLogger("millrace.up")


class UpConfig(Struct, frozen=True, kw_only=True):
    """What to serve and where."""

    home: str
    host: str = "127.0.0.1"
    port: int = 7070
    serve_port: int = 0  # of the endpoints; 0 takes a free one
    grpc_port: int | None = None  # of the endpoints over gRPC; None: not spoken
    serving_processes: int = 1  # of the endpoints that have none of their own
    workers: int = 1
    tls_cert: str = ""
    tls_key: str = ""
    names: tuple[str, ...] = ()  # host names that clients call it by, besides `host`
    proxies: tuple[str, ...] = ()  # networks of proxies that end TLS
    access_log: str = ""  # of the endpoints
    tls_client_ca: str = ""  # of whom a client of an endpoint must bring a certificate
    client_rate: float | None = None  # of one client of the endpoints, in requests per second; None: as the spec says
    queue_s: float | None = None  # of each endpoint; None: as the spec says
    trace: float = 0.0  # share of their requests for which a trace begins

    @property
    def wants_token(self) -> bool:
        """As soon as others can reach it."""
        return not is_loopback(self.host) or bool(self.proxies)


class Child:
    """A role in the tree, and the process that has it now."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.name, self._work = name, work
        self.pid = 0
        self._began = 0.0
        self._crashes = 0
        self.due_at = 0.0

    def start(self) -> None:
        """Fork a process for the role."""
        self._began = time.monotonic()
        self.pid = _fork(self._work)

    def has_ended(self, status: int) -> None:
        """Plan the restart: at once the first time, later and later while it keeps dying."""
        lived_s = time.monotonic() - self._began
        self._crashes = 1 if lived_s > STEADY_S else self._crashes + 1
        wait_s = BACKOFF_S[min(self._crashes - 1, len(BACKOFF_S) - 1)]
        self.due_at = time.monotonic() + wait_s
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        log.warning("%s ended with %d after %.1f s; again in %.1f s", self.name, code, lived_s, wait_s)


class Supervisor:
    """The parent.

    Args:
        config: What to serve and where.
        open_dispatcher: Opens the home; called in children only.
    """

    def __init__(self, config: UpConfig, open_dispatcher: Callable[[], Dispatcher]) -> None:
        self._config = config
        self._open = open_dispatcher
        self._home = Path(config.home)
        self._stopping = False
        self._lock: IO[bytes] | None = None
        self._metrics = Path(os.environ[meters.FOLDER_VARIABLE])

    def run(self, on_ready: Callable[[str], None]) -> int:
        """Serve until SIGTERM or SIGINT.

        Args:
            on_ready: Called with the URL once requests are answered.

        Returns:
            The exit code.

        Raises:
            ConflictError: Another server serves this home.
            UnavailableError: The port is taken, or the home cannot be opened.
        """
        listener = bind(self._config)
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = lock_home(self._home)
        self._metrics.mkdir(parents=True, exist_ok=True)
        try:
            _once(self._prepare)
            return self._supervise(listener, on_ready)
        finally:
            server_file.remove(self._home, os.getpid())
            (self._home / server_file.TOKEN_NAME).unlink(missing_ok=True)
            shutil.rmtree(self._metrics, ignore_errors=True)
            listener.close()

    def _prepare(self) -> None:
        """In a child: create or migrate the records, which needs much memory once."""
        dispatcher = self._open()
        _ = dispatcher.services.records
        if self._config.wants_token:
            secret = first_tokens(dispatcher.services)
            if secret:
                print(f" owner     {secret}  ({OWNER_SHOWN})", flush=True)
        dispatcher.close()

    def _supervise(self, listener: socket.socket, on_ready: Callable[[str], None]) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        port = listener.getsockname()[1]
        url = _url(self._config, port)
        children = [Child("loop", self._run_loop)]
        for index in range(self._config.workers):
            children.append(Child(f"api {index}", lambda: self._run_api(listener)))
        for child in children:
            child.start()
        server_file.write(self._home, self._describe(url))
        if self._wait_until_ready(children, port):
            on_ready(url)
        elif not self._stopping:
            _stop(children)
            raise UnavailableError(
                f"no request was answered within {START_TIMEOUT_S:.0f} s", hint="the lines above say why"
            )
        while not self._stopping:
            self._watch(children)
            time.sleep(0.1)
        return _stop(children)

    def _describe(self, url: str) -> ServerFile:
        return ServerFile(
            url=url, pid=os.getpid(), boot_id=host_id(), process_started=process_start(os.getpid()) or "",
            version=millrace.__version__, started_at=time.time(),
            ca_file=str(Path(self._config.tls_cert).absolute()) if self._config.tls_cert else "",
        )  # fmt: skip

    def _on_signal(self, *_: object) -> None:
        self._stopping = True

    def _wait_until_ready(self, children: list[Child], port: int) -> bool:
        """Until a request is answered, or this is to stop; False when the time is up, or it is to stop."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and not self._stopping:
            if _answers(self._config, port):
                return True
            self._watch(children)
            time.sleep(0.05)
        return False

    def _watch(self, children: list[Child]) -> None:
        for child in children:
            if child.pid:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    child.has_ended(status)
            elif time.monotonic() >= child.due_at:
                child.start()

    def _run_loop(self) -> None:
        dispatcher = self._open()
        reconciler = Reconciler(dispatcher.services, place_of(self._config), self._config.serving_processes)
        loop = Loop(dispatcher.services, [reconciler])
        reconciler.news.wake = loop.wake
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.stop())
        try:
            loop.run()
        finally:
            reconciler.close()
            dispatcher.close()

    def _run_api(self, listener: socket.socket) -> None:
        _reserve_metrics(self._metrics)
        dispatcher = self._open()
        services = dispatcher.services
        served: list[uvicorn.Server] = []
        app = build_app(
            dispatcher,
            is_stopping=lambda: bool(served) and served[0].should_exit,
            allowed_hosts=frozenset(name.lower() for name in (self._config.host, *self._config.names)),
            wants_token=self._config.wants_token,
            proxies=check_networks(self._config.proxies),
        )
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", server_header=False,
            http=connections(services.setting("request_head_s"), services.setting("request_stall_s")), ws="none",
            proxy_headers=False,  # anybody can send them; `BehindProxy` believes those of trusted peers
            timeout_graceful_shutdown=int(GRACE_S) - 5, timeout_keep_alive=75,
            ssl_certfile=self._config.tls_cert or None, ssl_keyfile=self._config.tls_key or None,
        )  # fmt: skip
        served.append(uvicorn.Server(config))
        try:
            served[0].run(sockets=[listener])
        finally:
            dispatcher.close()


def _reserve_metrics(folder: Path) -> None:
    """Take the space of this process's metrics now: a write into mapped memory that finds none kills the process.

    Raises:
        DiskFullError: There is none.
    """
    meters.REQUESTS.labels("healthz", "200")
    meters.DURATION.labels("healthz")
    for path in folder.glob(f"*_{os.getpid()}.db"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise DiskFullError(f"{folder}: no space for the server's metrics: {error.strerror}") from error


def lock_home(home: Path) -> IO[bytes]:
    """Hold the home for this server; the kernel lets go of it with the process.

    Raises:
        ConflictError: Another server has it; says which.
    """
    lock = (home / "server.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        holder = server_file.read(home)
        who = f"process {holder.pid} at {holder.url}" if holder else "a process that is just starting"
        raise ConflictError(f"{home} is served already, by {who}", hint="use that one, or stop it first") from None
    return lock


def _url(config: UpConfig, port: int) -> str:
    # Behind a proxy this is the address for this machine: the proxy knows its own name.
    name = config.names[0] if config.names and not config.proxies else config.host
    scheme = "https" if config.tls_cert else "http"
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"


def place_of(config: UpConfig) -> HostConfig:
    """Where endpoints are: on loopback open, elsewhere with the server's certificate and for tokens alone.

    With an authority for clients they are everywhere only for whom it knows.
    """
    serve, _ = sections_of(Path(config.home))
    rate = serve.client_rate if config.client_rate is None else config.client_rate
    place = HostConfig(
        port=config.serve_port, grpc_port=config.grpc_port, limits=HttpLimits(client_rate=rate),
        queue_s=config.queue_s or 0.0, access_log=config.access_log, trace_share=config.trace,
    )  # fmt: skip
    if config.wants_token or config.tls_client_ca:
        place = msgspec.structs.replace(
            place, tls_cert=config.tls_cert, tls_key=config.tls_key, tls_client_ca=config.tls_client_ca
        )
    if not config.wants_token:
        return place
    return msgspec.structs.replace(
        place, host=config.host, wants_token=True, proxies=list(check_networks(config.proxies)),
        allowed_hosts=[config.host, *config.names] if config.proxies else [*config.names, config.host],
    )  # fmt: skip


def check_tls(config: UpConfig) -> None:
    """Refuse what would show tokens to the network, and a certificate that does not work.

    Raises:
        DeniedError: Others can reach it, and it has no certificate.
        InputError: The certificate or its key cannot be read, or they are no pair.
    """
    check_networks(config.proxies)
    if config.serving_processes > 1 and config.grpc_port is not None:
        raise InputError(
            f"gRPC wants one serving process, got {config.serving_processes}",
            hint="leave out --serving-processes, or --grpc-port",
        )
    if config.wants_token and not config.tls_cert and not config.proxies:
        raise DeniedError(
            f"{config.host} can be reached by others: tokens must not travel in the open",
            hint="name a certificate: --tls-cert FILE --tls-key FILE; or the proxy that ends TLS: "
            "--tls-terminated-by-proxy NETWORK; or bind 127.0.0.1",
        )
    if config.proxies and config.tls_cert:
        raise InputError(
            "either this server ends TLS or its proxy does: want --tls-cert or --tls-terminated-by-proxy, got both",
            hint="leave one of them out",
        )
    if config.proxies and not config.names:
        raise InputError("which name do clients use, who come by the proxy?", hint="--name HOST")
    if config.wants_token and config.host in ("0.0.0.0", "::") and not config.names:
        raise InputError(
            f"{config.host} is every address of this machine: which name do clients use?", hint="--name HOST"
        )
    if config.tls_client_ca and not config.tls_cert:
        raise InputError(
            "an authority for clients was given without a certificate of the server",
            hint="add --tls-cert FILE; a proxy that ends TLS asks for certificates itself",
        )
    if not config.tls_cert:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_cert, config.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        why = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else error.reason
        raise InputError(
            f"the certificate {config.tls_cert} with the key {config.tls_key or 'in it'} cannot be used: {why}",
            hint="want PEM files that belong together: --tls-cert FILE --tls-key FILE",
        ) from None
    server_context(config.tls_cert, config.tls_key, config.tls_client_ca)  # the authority


def bind(config: UpConfig) -> socket.socket:
    """A listening socket.

    Raises:
        DeniedError: Others can reach the host, and there is no certificate.
        UnavailableError: The port is taken.
    """
    check_tls(config)
    host, port = config.host, config.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UnavailableError(f"{host!r} is not an address of this machine: {error}") from None
    address = found[4]
    listener = socket.socket(found[0], socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UnavailableError(
            f"port {port} on {host} cannot be used: {error.strerror}", hint="--port 0 takes a free one"
        ) from None
    listener.listen(2048)
    listener.set_inheritable(True)
    return listener


def _fork(work: Callable[[], None]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    _become_child(parent, work)


def _become_child(parent: int, work: Callable[[], None]) -> NoReturn:
    """The child's whole life: it never returns into the parent's code."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:
            work()
        code = 0
    except MillraceError as error:
        log.error("%s", error.message)
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _once(work: Callable[[], None]) -> None:
    """Do something in a child and wait; its error is raised here."""
    read, write = os.pipe()

    def tell() -> None:
        try:
            work()
        except MillraceError as error:
            os.write(write, json.dumps(error.to_dict(), default=str).encode()[:60_000])

    pid = _fork(tell)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    if told:
        raise from_dict(json.loads(told))
    if status:
        raise UnavailableError("the home could not be opened", hint="the lines above say why; see `millrace doctor`")


def _answers(config: UpConfig, port: int) -> bool:
    """Whether an API process takes connections: the socket listens before there is one."""
    try:
        with socket.create_connection((config.host, port), timeout=2.0) as plain:
            if not config.tls_cert:
                return _is_well(plain)
            context = ssl.create_default_context()
            # It asks itself, and sends no secret: whose certificate this is does not matter.
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(plain) as probe:
                return _is_well(probe)
    except OSError:
        return False


def _is_well(probe: socket.socket) -> bool:
    probe.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    return probe.recv(64).startswith(b"HTTP/1.1 200")


def _stop(children: list[Child]) -> int:
    """SIGTERM to all, SIGKILL to those that have not ended within the grace."""
    alive = [child for child in children if child.pid]
    for child in alive:
        os.kill(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while alive:
        alive = [child for child in alive if os.waitpid(child.pid, os.WNOHANG)[0] == 0]
        if alive and time.monotonic() > deadline:
            for child in alive:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
            return 1
        time.sleep(0.02)
    return 0
