"""One leads: several servers and loops on the same records, and a leader that sleeps past its lease."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from millrace.client.http import HttpTransport
from millrace.control.deployments import Reconciler
from millrace.control.loop import LEADER, LEASE_TTL_S, take_lead
from millrace.control.services import Services
from millrace.core.clock import FakeClock
from millrace.core.errors import ConflictError
from millrace.core.types import Endpoint, Event, Lease, Run
from millrace.security.chain import verify
from millrace.store.leases import renew
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import STORES, PostgresServer, new_records_url, open_place
from millrace.testing.server import RunningServer
from millrace.wiring import open_services

needs_postgres = pytest.mark.skipif(PostgresServer.find() is None, reason="no PostgreSQL server is installed")
pytestmark = pytest.mark.xdist_group("postgres")


def until(check: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def leader(records: SqlRecords) -> Lease:
    lease = records.get(Lease, LEADER)
    assert lease is not None
    return lease


def assert_chain_holds(records: SqlRecords, at_least: int) -> None:
    """Every event is sealed once, in one chain without a gap."""
    until(lambda: len(records.events(0, limit=100_000)) >= at_least, "every event is sealed")
    links = records.links(limit=100_000)
    checked = verify(links, head=records.head())
    assert (checked.broken, checked.seq) == (None, len(links))


# --------------------------------------------------------------------------- two servers


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[RunningServer, RunningServer, SqlRecords]]:
    """Two servers with homes of their own on the same Postgres; blobs in a folder that both see."""
    with ExitStack() as stack:
        url = new_records_url()
        variables = {"MILLRACE_RECORDS_URL": url, "MILLRACE_BLOBS_URL": f"file://{tmp_path}/blobs"}
        one = stack.enter_context(RunningServer(tmp_path / "one", environment=variables))
        two = stack.enter_context(RunningServer(tmp_path / "two", environment=variables))
        records = open_place(url)
        stack.callback(records.close)
        yield one, two, records


class Writer(threading.Thread):
    """Begins runs without a pause; keeps the ids of those that were acknowledged."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self._transport = HttpTransport(server.url)
        self._ending = threading.Event()
        self.acknowledged: list[str] = []

    def run(self) -> None:
        while not self._ending.is_set():
            self.acknowledged.append(self._transport.call("run.track", {"name": "written"}).id)

    def finish(self) -> list[str]:
        self._ending.set()
        self.join(30)
        self._transport.close()
        return self.acknowledged


def stop_between_transactions(pid: int, records: SqlRecords) -> None:
    """SIGSTOP; in a transaction it would keep everybody waiting until Postgres ends that, which takes a minute."""
    idle = (
        "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction' AND state_change < now() - interval '1s'"
    )
    while True:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        if not records.read(lambda connection: connection.execute(idle).fetchall()):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)


@needs_postgres
def test_a_leader_that_sleeps_past_its_lease_is_replaced_and_writes_nothing_more(
    pair: tuple[RunningServer, RunningServer, SqlRecords],
) -> None:
    one, two, records = pair
    first = leader(records)
    assert first.pid == one.children()["loop"]
    writers = [Writer(one), Writer(two)]
    for writer in writers:
        writer.start()
    stop_between_transactions(first.pid, records)
    try:
        until(lambda: leader(records).token > first.token, "another one leads", LEASE_TTL_S + 10)
        second = leader(records)
        assert second.pid == two.children()["loop"]
        until(lambda: f"token {second.token}" in two.log.read_text(), "and knows it")
    finally:
        os.kill(first.pid, signal.SIGCONT)
    until(lambda: "a newer leader has taken over" in one.log.read_text(), "the old one learns it when it wakes")
    time.sleep(0.5)
    acknowledged = [run for writer in writers for run in writer.finish()]
    assert leader(records).token == second.token, "it does not take the lead back"
    assert_chain_holds(records, len(acknowledged))
    assert set(acknowledged) <= {run.id for run in records.find(Run)}


@needs_postgres
def test_a_killed_leader_is_replaced_at_once_and_no_event_is_missing(
    pair: tuple[RunningServer, RunningServer, SqlRecords],
) -> None:
    one, two, records = pair
    writers = [Writer(one), Writer(two)]
    for writer in writers:
        writer.start()
    for _ in range(4):
        token, pid = leader(records).token, leader(records).pid
        os.kill(pid, signal.SIGKILL)
        until(lambda token=token: leader(records).token > token, "another one leads", LEASE_TTL_S / 2)
    acknowledged = [run for writer in writers for run in writer.finish()]
    assert len(acknowledged) > 40
    assert_chain_holds(records, len(acknowledged))
    assert set(acknowledged) <= {run.id for run in records.find(Run)}


# --------------------------------------------------------------------------- several loops

LOOP = """
import signal, sys
from millrace.control.loop import LEADER, Loop
from millrace.core.types import Event
from millrace.store.leases import check_fence
from millrace.wiring import open_services
services = open_services(sys.argv[1])
class Tells:
    def __call__(self, lease):
        with services.records.transaction() as transaction:
            check_fence(transaction, lease)
            transaction.append(Event(at=0.0, actor=sys.argv[2], verb="led", subject="loop", detail={"token": lease.token}))
    def close(self): pass
    step_down = close
loop = Loop(services, [Tells()], lease_ttl_s=1.5)
signal.signal(signal.SIGTERM, lambda *_: loop.stop())
loop.run()
services.close()
"""


@pytest.mark.parametrize("store", STORES)
def test_of_several_loops_exactly_one_writes_at_a_time(tmp_path: Path, store: str) -> None:
    if store == "postgres" and PostgresServer.find() is None:
        pytest.skip("no PostgreSQL server is installed")
    place = STORES[store](tmp_path)
    variables = {**os.environ, "MILLRACE_RECORDS_URL": place if store == "postgres" else ""}
    records = open_place(place)
    chance = random.Random(4)
    loops: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for round_number in range(6):
            while len(loops) < 3:
                name = f"{round_number}-{len(loops)}"
                loops[name] = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path), name], env=variables)
            seen = len(records.events(0, limit=100_000))
            until(lambda seen=seen: len(records.events(0, limit=100_000)) > seen + 2, "somebody leads")
            lease = records.get(Lease, LEADER)
            leads = next((name for name, loop in loops.items() if lease and loop.pid == lease.pid), None)
            if leads is None:
                continue
            if chance.random() < 0.5:
                loops[leads].kill()
                loops.pop(leads).wait()
            else:
                loops[leads].send_signal(signal.SIGSTOP)
                token = leader(records).token
                until(lambda token=token: leader(records).token > token, "a sleeper is replaced")
                loops[leads].send_signal(signal.SIGCONT)
    finally:
        for loop in loops.values():
            loop.terminate()
        for loop in loops.values():
            loop.wait(timeout=20)
    records.seal()
    tokens = [event.detail["token"] for event in records.events(0, limit=100_000)]
    assert tokens == sorted(tokens), "who was replaced writes nothing more"
    assert len(set(tokens)) > 3
    assert_chain_holds(records, len(tokens))
    records.close()


# --------------------------------------------------------------------------- without waiting


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(str(tmp_path / "home"))
    opened.clock = FakeClock()
    yield opened
    opened.close()


@pytest.mark.parametrize("jump_s", [LEASE_TTL_S + 0.1, 86_400.0])
def test_after_a_lease_has_run_out_the_old_one_can_write_nothing(services: Services, jump_s: float) -> None:
    """Also when it is the clock that jumped, and the old leader is awake."""
    records, clock = services.records, services.clock
    first = take_lead(services)
    assert first is not None
    assert take_lead(services) is None
    records.put(Endpoint(id="e", name="e", model="nothing", number=1, variant="", is_managed=True))
    clock.sleep(jump_s)
    second = take_lead(services)
    assert second is not None
    assert second.token == first.token + 1
    assert renew(records, first, clock, LEASE_TTL_S) is None
    for _ in range(2):
        with records.transaction() as transaction:
            transaction.append(Event(at=0.0, actor="a", verb="v", subject="s", detail={}))
        assert records.seal(fence=second.token) == 1
    with records.transaction() as transaction:
        transaction.append(Event(at=0.0, actor="a", verb="v", subject="s", detail={}))
    with pytest.raises(ConflictError, match="taken over"):
        records.seal(fence=first.token)
    with pytest.raises(ConflictError, match="is lost"):
        Reconciler(services)(first)
    assert records.get(Endpoint, "e").text == ""  # type: ignore[union-attr]
    Reconciler(services)(second)
    assert "no model 'nothing'" in records.get(Endpoint, "e").text  # type: ignore[union-attr]


def test_a_clock_that_jumps_back_leaves_the_leader_as_it_is(services: Services) -> None:
    first = take_lead(services)
    assert first is not None
    services.clock.sleep(-3600.0)
    assert take_lead(services) is None
    renewed = renew(services.records, first, services.clock, LEASE_TTL_S)
    assert renewed is not None
    services.clock.sleep(LEASE_TTL_S + 0.1)
    second = take_lead(services)
    assert second is not None
    assert second.token == first.token + 1
