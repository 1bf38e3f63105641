"""Two hosts over one Postgres, and those who come to them at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from argon2 import PasswordHasher

from millrace.control.dispatch import Dispatcher
from millrace.core.errors import MillraceError
from millrace.testing.postgres import new_records_url
from millrace.wiring import open_dispatcher

Homes = list[Dispatcher]


@contextmanager
def two_homes(folder: Path, patch: pytest.MonkeyPatch, **settings: str) -> Iterator[Homes]:
    """A home each, and new records that are both's. Passwords are quick to hash."""
    quick = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    patch.setattr("millrace.security.passwords._HASHER", quick)
    patch.setattr("millrace.security.passwords._nobodys", lambda: quick.hash("nobody"))
    for name, value in {"records_url": new_records_url(), **settings}.items():
        patch.setenv(f"MILLRACE_{name.upper()}", value)
    homes = [open_dispatcher(str(folder / name)) for name in ("left", "right")]
    try:
        yield homes
    finally:
        for home in homes:
            home.close()


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returned or was refused with; an error of the database's own ends the test."""
    together = threading.Barrier(len(works))

    def one(work: Callable[[], Any]) -> Any:
        together.wait(30)
        try:
            return work()
        except MillraceError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, works))


def behind(home: Dispatcher, work: Callable[[], Any], change: Callable[[Any], object]) -> Future[Any]:
    """`work` up to where it waits to write, then `change` of somebody who was quicker, then the rest of it."""
    pool = ThreadPoolExecutor(1)
    with home.services.records.transaction() as transaction:
        done = pool.submit(work)
        with psycopg.connect(home.services.setting("records_url"), autocommit=True) as watcher:
            asked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = " \
                "(SELECT oid FROM pg_database WHERE datname = current_database())"  # fmt: skip
            while not done.done() and watcher.execute(asked).fetchone() == (0,):
                time.sleep(0.005)
        change(transaction)
    pool.shutdown()
    return done


def of_type(found: list[Any], kind: type[Any]) -> list[Any]:
    return [one for one in found if isinstance(one, kind)]
