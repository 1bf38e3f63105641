"""A PostgreSQL server for tests: its own folder and port, started, stopped and killed at will.

Example:
    >>> server = PostgresServer.find() and PostgresServer(durable=False)
    >>> if server:
    ...     with server:
    ...         url = server.create_database()
    ...     url.startswith("postgresql://millrace@127.0.0.1:")
    ... else:
    ...     True
    True
"""

from __future__ import annotations

import atexit
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest

from millrace.core.clock import Clock
from millrace.store import postgres, records_sql
from millrace.store.leases import process_start

_ACCOUNT = "postgres"  # the server refuses to run as root


@cache
def shared_server() -> PostgresServer:
    """One quick server for all tests of this process, removed at its end; skips where none is installed."""
    if PostgresServer.find() is None:
        pytest.skip("no PostgreSQL server is installed")
    server = PostgresServer(durable=False)
    atexit.register(server.remove)
    server.start()
    return server


@cache
def _template() -> str:
    url = shared_server().create_database()
    postgres.open_records(url).close()
    return url.rpartition("/")[2]


def new_records_url() -> str:
    """The URL of new, empty records on the shared server; skips where none is installed."""
    return shared_server().create_database(_template())


# Every store of records by name, each with what makes a new, empty place in a folder: see `open_place`.
STORES: dict[str, Callable[[Path], str]] = {
    "sqlite": lambda folder: str(folder / "records.db"),
    "postgres": lambda _: new_records_url(),
}


def open_place(place: str, clock: Clock | None = None) -> records_sql.SqlRecords:
    """Open the records at a path or a URL, as a home would."""
    if place.startswith("postgresql://"):
        return postgres.open_records(place, clock)
    return records_sql.open_records(Path(place), clock)


class PostgresServer:
    """One server on 127.0.0.1, in a temporary folder that `remove` deletes. As root it runs as `postgres`.

    Args:
        durable: Leave fsync on, for tests that crash it.
        settings: Further settings, `name=value`.
    """

    def __init__(self, durable: bool = True, settings: tuple[str, ...] = ()) -> None:
        found = self.find()
        if found is None:
            raise FileNotFoundError("no PostgreSQL server is installed: `initdb` was not found")
        self._programs = found
        self._names = itertools.count(1)
        self._process: subprocess.Popen[Any] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="millrace-pg-"))
        self._identity: dict[str, Any] = {"cwd": self.folder, "env": {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}}
        if os.geteuid() == 0:
            account = pwd.getpwnam(_ACCOUNT)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._identity |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        quick = () if durable else ("fsync=off", "full_page_writes=off")
        self._settings = ("listen_addresses=127.0.0.1", *quick, *settings)
        self._run(
            "initdb", "-D", "data", "-U", "millrace", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"
        )

    @staticmethod
    def find() -> Path | None:
        """The folder of the newest server programs here, or None: tests skip without."""
        on_path = shutil.which("initdb")
        folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
        folders.sort(key=lambda folder: int(folder.parent.name) if folder.parent.name.isdigit() else 0)
        if on_path:
            folders.append(Path(on_path).resolve().parent)
        if not folders or (os.geteuid() == 0 and _ACCOUNT not in {entry.pw_name for entry in pwd.getpwall()}):
            return None
        return folders[-1]

    def url(self, database: str = "postgres") -> str:
        """Where a database is."""
        return f"postgresql://millrace@127.0.0.1:{self.port}/{database}"

    def start(self, timeout_s: float = 30.0) -> None:
        """Start, or start again on the same folder, and wait until it answers."""
        options = [part for setting in self._settings for part in ("-c", setting)]
        log = (self.folder / "log").open("ab")
        with log:
            process: subprocess.Popen[Any] = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", "-k", self.folder, "-p", str(self.port), *options],
                stdout=log, stderr=log, **self._identity,
            )  # fmt: skip
        self._process = process
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it and wait: SIGINT in order, SIGQUIT at once and as after a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=60)
            self._process = None

    def kill(self) -> None:
        """kill -9 of the server and of every process it has started."""
        if self._process is None:
            return
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for victim in (pid, *map(int, children)):
            if process_start(victim):
                os.kill(victim, signal.SIGKILL)
        self._process.wait()
        self._process = None
        while any(process_start(int(child)) for child in children):  # they hold the shared memory
            time.sleep(0.005)

    def create_database(self, template: str = "template0") -> str:
        """A new database, a copy of `template` (31 ms); its URL."""
        name = f"t{next(self._names)}"
        strategy = " STRATEGY file_copy" if self._version() >= 150000 else ""
        self._ask(f"CREATE DATABASE {name} TEMPLATE {template}{strategy}")
        return self.url(name)

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def __enter__(self) -> PostgresServer:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], capture_output=True, check=False, **self._identity
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr.decode(errors='replace')}")

    def _answers(self) -> bool:
        try:
            self._version()
        except psycopg.OperationalError:
            return False
        return True

    def _version(self) -> int:
        with psycopg.connect(self.url(), connect_timeout=2) as connection:
            return connection.info.server_version

    def _ask(self, statement: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())
