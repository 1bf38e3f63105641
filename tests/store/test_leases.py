"""Leases: a dead holder is replaced at once, a live one never, across hosts time decides."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.clock import FakeClock, SystemClock
from millrace.core.errors import ConflictError, DiskFullError
from millrace.core.types import Lease
from millrace.store import leases
from millrace.store.leases import LeaseKeeper, acquire, check_fence, holder_is_dead, process_start, release, renew
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import STORES, open_place

HOLDER = """
import sys, time
from millrace.core.clock import SystemClock
from millrace.store.leases import acquire
from millrace.testing.postgres import open_place
lease = acquire(open_place(sys.argv[1]), "run/1", SystemClock(), 0.001)
print(lease is not None, flush=True)
time.sleep(600)
"""


@pytest.fixture(params=STORES)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return STORES[request.param](tmp_path)


@pytest.fixture
def records(place: str):
    opened = open_place(place)
    yield opened
    opened.close()


def held(records: SqlRecords, name: str = "run/1") -> Lease:
    """The lease as stored."""
    lease = records.get(Lease, name)
    assert lease is not None
    return lease


def test_a_live_holder_is_not_replaced_even_after_its_time(records: SqlRecords) -> None:
    clock = FakeClock()
    lease = acquire(records, "run/1", clock, 10.0)
    assert lease is not None
    assert (lease.pid, lease.token, lease.held, lease.expires_at) == (os.getpid(), 1, True, clock.now() + 10.0)
    assert not holder_is_dead(lease)
    clock.sleep(1000.0)
    assert acquire(records, "run/1", clock, 10.0) is None
    assert acquire(records, "run/2", clock, 10.0) is not None


def test_a_killed_holder_is_replaced_at_once_and_a_stopped_one_is_not(records: SqlRecords, place: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    os.kill(process.pid, signal.SIGSTOP)
    assert acquire(records, "run/1", SystemClock(), 3600.0) is None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet reaped: a zombie
    assert holder_is_dead(held(records))
    lease = acquire(records, "run/1", SystemClock(), 3600.0)
    assert lease is not None
    assert (lease.token, lease.pid) == (2, os.getpid())
    process.communicate()


def test_a_reused_pid_is_another_process(records: SqlRecords) -> None:
    clock = FakeClock()
    lease = acquire(records, "run/1", clock, 10.0)
    assert lease is not None
    records.put(msgspec.structs.replace(lease, process_started="1"))
    assert holder_is_dead(held(records))
    assert acquire(records, "run/1", clock, 10.0) is not None


def test_across_hosts_the_time_decides(records: SqlRecords) -> None:
    clock = FakeClock()
    lease = acquire(records, "run/1", clock, 10.0)
    assert lease is not None
    records.put(msgspec.structs.replace(lease, boot_id="another boot/pid:[1]", pid=2**22 + 1))
    assert not holder_is_dead(held(records))
    clock.sleep(9.9)
    assert acquire(records, "run/1", clock, 10.0) is None
    clock.sleep(0.1)
    taken = acquire(records, "run/1", clock, 10.0)
    assert taken is not None
    assert taken.token == 2
    assert renew(records, lease, clock, 10.0) is None
    assert not release(records, lease)
    with pytest.raises(ConflictError, match="token 1 is lost: token 2"), records.transaction() as transaction:
        check_fence(transaction, lease)
    with records.transaction() as transaction:
        check_fence(transaction, taken)


def test_a_released_lease_is_free_and_its_token_stays(records: SqlRecords) -> None:
    clock = FakeClock()
    for token in (1, 2, 3):
        lease = acquire(records, "run/1", clock, 10.0)
        assert lease is not None
        assert lease.token == token
        assert release(records, lease)
        assert not release(records, lease)
        assert renew(records, lease, clock, 10.0) is None
    with pytest.raises(ConflictError, match="nobody"), records.transaction() as transaction:
        check_fence(transaction, lease)


ACTIONS = st.sampled_from(["acquire", "release", "renew", "die", "wait", "move"])


class Model:
    """What a lease must do: who may take it follows from four facts."""

    def __init__(self) -> None:
        self.token, self.expires_at = 0, 0.0
        self.held = self.dead = self.elsewhere = False

    def is_free(self, now_s: float) -> bool:
        """Not held, held by a process proven dead here, or out of sight and out of time."""
        return not self.held or (self.dead and not self.elsewhere) or (self.elsewhere and self.expires_at <= now_s)


NAMES = itertools.count()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ACTIONS, max_size=12))
def test_tokens_only_grow_and_two_never_hold(records: SqlRecords, actions: list[str]) -> None:
    clock, model, name = FakeClock(), Model(), f"x{next(NAMES)}"
    current: Lease | None = None
    for action in actions:
        stored = records.get(Lease, name)
        if action == "wait":
            clock.sleep(6.0)
        elif action == "acquire":
            got = acquire(records, name, clock, 10.0)
            assert (got is not None) == model.is_free(clock.now())
            if got is not None:
                model.token, model.expires_at = model.token + 1, clock.now() + 10.0
                model.held, model.dead, model.elsewhere = True, False, False
                assert got.token == model.token
                current = got
        elif current is None or stored is None:
            continue
        elif action == "release":
            assert release(records, current) == model.held
            model.held = False
        elif action == "renew":
            assert (renew(records, current, clock, 10.0) is not None) == model.held
            model.expires_at = clock.now() + 10.0 if model.held else model.expires_at
        elif action == "die":
            records.put(msgspec.structs.replace(stored, process_started="0"))
            model.dead = True
        elif action == "move":
            records.put(msgspec.structs.replace(stored, boot_id="elsewhere"))
            model.elsewhere = True


def test_of_many_threads_one_gets_it(records: SqlRecords) -> None:
    got: list[Lease | None] = []
    clock = FakeClock()
    threads = [
        threading.Thread(target=lambda: got.append(acquire(records, "run/1", clock, 10.0))) for _ in range(8)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in got) == 1


def test_the_keeper_renews_and_releases(records: SqlRecords) -> None:
    clock = FakeClock()
    lease = acquire(records, "run/1", clock, 0.03)
    assert lease is not None
    with LeaseKeeper(records, lease, clock, 0.03) as keeper:
        clock.sleep(5.0)
        while held(records).expires_at < clock.now():
            threading.Event().wait(0.005)
        assert not keeper.lost
        assert keeper.lease.token == 1
    assert not held(records).held


def test_the_keeper_notices_a_loss_and_leaves_the_new_holder_alone(records: SqlRecords) -> None:
    clock = FakeClock()
    lease = acquire(records, "run/1", clock, 0.03)
    assert lease is not None
    with LeaseKeeper(records, lease, clock, 0.03) as keeper:
        with records.transaction() as transaction:
            stored = transaction.get(Lease, "run/1")
            assert stored is not None
            transaction.put(msgspec.structs.replace(stored, token=2, pid=1))
        while not keeper.lost:
            threading.Event().wait(0.005)
    assert (held(records).held, held(records).token) == (True, 2)


def test_a_release_that_fails_is_tried_again(records: SqlRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a live process with a full disk at the wrong moment would hold the lease for its whole life."""
    clock = FakeClock()
    lease = acquire(records, "run/1", clock, 0.03)
    assert lease is not None
    true_release = leases.release
    failures = [DiskFullError("full"), DiskFullError("full")]

    def failing(*given: object) -> bool:
        if failures:
            raise failures.pop()
        return true_release(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(leases, "release", failing)
    with LeaseKeeper(records, lease, clock, 0.03):
        pass
    while held(records).held:
        threading.Event().wait(0.005)
    assert failures == []


def test_process_start_reads_names_with_brackets(tmp_path: Path) -> None:
    program = tmp_path / "a ) S (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([str(program), "-c", "input()"], stdin=subprocess.PIPE)
    started = process_start(process.pid)
    assert started is not None
    assert started.isdigit()
    assert process_start(process.pid) == started
    process.communicate(b"\n")
    assert process_start(process.pid) is None
