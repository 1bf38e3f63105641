"""Groups of serving processes: the parent listens, and any number of replicas take connections from its socket.

What a replica that dies or drains has not taken another one takes; where there is none, connections wait in the socket
until there is one. Nothing here waits for a process: each has a thread that does.
"""

from __future__ import annotations

import logging
import queue
import select
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from millrace.control.scaling import Bounds, Meter, Scaler
from millrace.core.errors import MillraceError
from millrace.core.types import Endpoint
from millrace.serve.access import Denied
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.listen import bind
from millrace.serve.peers import fold
from millrace.serve.telemetry import TelemetryFrame

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 30.0
PORT_WAIT_S = 15.0  # longer than a host drains
DRAIN_MARGIN_S = 5.0  # beyond the time of its drain a process is killed
CRASHES_OF_A_LOOP = 5
LOOK_S = 0.5  # between decisions how many replicas there are to be
SHARED = ""  # the key of the group that hosts all endpoints but isolated ones
log = logging.getLogger(__name__)
Wanted = dict[str, list[HostedModel]]  # by endpoint


def key_of(endpoint: Endpoint) -> str:
    """Of the group that serves an endpoint."""
    return endpoint.name if endpoint.is_isolated else SHARED


class News:
    """What serving processes have said since the last round: put there by their threads, taken by the loop's.

    `wake` is called when there is something that should not wait for the next round.
    """

    def __init__(self) -> None:
        self.frames: queue.Queue[tuple[Replica, str, TelemetryFrame]] = queue.Queue()
        self.states: queue.Queue[tuple[Replica, ModelState]] = queue.Queue()
        self.denied: queue.Queue[Denied] = queue.Queue()
        self.wake: Callable[[], None] = lambda: None


class Replica:
    """A serving process from its start to its end, for both of which a thread waits.

    Args:
        key: Of its group.
        config: Where it listens.
        listener: The socket of the group.
        news: Where what it says goes.

    Raises:
        OSError: No process could be started.
    """

    def __init__(self, key: str, config: HostConfig, listener: socket.socket, news: News) -> None:
        self.key, self._news = key, news
        self.is_ready = False  # it listens to what it is told
        self.error: MillraceError | None = None  # why it never was
        self.code: int | None = None  # once it has ended and everything that it said is read
        self.applied: Wanted = {}
        self.loaded: dict[str, str] = {}  # endpoints that it serves, and in which version
        self.is_loading = True  # nothing is known yet of what it was told to serve
        self.began = time.monotonic()
        self.kill_at = float("inf")
        self.process = HostProcess(
            config, lambda name, frame: news.frames.put((self, name, frame)), self._take_state, news.denied.put,
            listener=listener,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._follow, name="replica", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    def feed(self, wanted: Wanted) -> None:
        """Serve these and no others."""
        self.loaded = {name: version for name, version in self.loaded.items() if name in wanted}
        self.is_loading = True
        self.process.apply([model for revisions in wanted.values() for model in revisions])
        self.applied = dict(wanted)

    def leave(self, drain_s: float) -> None:
        """Drain: it takes no more connections, answers what it has taken, and ends."""
        self.kill_at = time.monotonic() + drain_s + DRAIN_MARGIN_S
        self.process.terminate()

    def finish(self) -> None:
        """Wait for the end after `leave`; kill it when its time is up."""
        self._thread.join(max(0.0, self.kill_at - time.monotonic()))
        if self.code is None:
            self.process.kill()
            self._thread.join()

    def _follow(self) -> None:
        try:
            self.process.wait_ready()
            self.is_ready = True
            self._news.wake()
        except MillraceError as error:
            self.error = error
        self.code = self.process.wait()
        self._news.wake()

    def _take_state(self, state: ModelState) -> None:
        self._news.states.put((self, state))
        self._news.wake()


class Slot:
    """A place of a group for one process after another; each is started later, as long as they keep dying early."""

    def __init__(self) -> None:
        self.replica: Replica | None = None
        self.crashes = 0
        self.due_at = 0.0

    def note_death(self, began: float) -> None:
        """Plan the restart: at once for one that lived long."""
        now = time.monotonic()
        self.crashes = 1 if now - began > STEADY_S else self.crashes + 1
        self.due_at = now + BACKOFF_S[min(self.crashes, len(BACKOFF_S)) - 1]
        self.replica = None


class Host:
    """A group of serving processes at one address.

    Args:
        key: The isolated endpoint's name, or `SHARED`.
        port: 0 takes a free one, and keeps it.
        place: Where processes listen, and whom they answer.
        news: Where what they say goes.
    """

    def __init__(self, key: str, port: int, place: HostConfig, news: News) -> None:
        self.key, self.port = key, port
        self._place, self._news = place, news
        self._listener: socket.socket | None = None
        self._peers = ""
        self._waits_for_port_until = 0.0
        self._port_due_at = 0.0
        self.slots: list[Slot] = []
        self.leaving: list[Replica] = []
        self.applied: Wanted = {}  # last, to any of them
        self.scaler: Scaler | None = None  # None: as many as are wanted, always
        self.meter = Meter()
        self._look_at = 0.0

    @property
    def replicas(self) -> list[Replica]:
        """Those that run and are to."""
        return [slot.replica for slot in self.slots if slot.replica is not None]

    @property
    def ready(self) -> list[Replica]:
        """Those that listen to what they are told."""
        return [replica for replica in self.replicas if replica.is_ready and replica.code is None]

    def serving(self, endpoint: str) -> list[Replica]:
        """Those that answer for an endpoint."""
        return [replica for replica in self.ready if endpoint in replica.loaded]

    @property
    def crashes(self) -> int:
        """How often in a row the one that dies most has died."""
        return max((slot.crashes for slot in self.slots), default=0)

    @property
    def is_in_crash_loop(self) -> bool:
        """One died so often, so soon, that something is wrong with what it serves."""
        return self.crashes >= CRASHES_OF_A_LOOP

    @property
    def knocks(self) -> bool:
        """Whether connections wait that nobody has taken."""
        if self._listener is None:
            return False
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        return bool(poll.poll(0))

    def take_ended(self) -> list[Replica]:
        """Those that ended by themselves since the last time; those that were to leave are forgotten, or killed."""
        ended = []
        for slot in self.slots:
            replica = slot.replica
            if replica is not None and replica.code is not None:
                slot.note_death(replica.began)
                self._forget(replica)
                ended.append(replica)
        for replica in self.leaving:
            if replica.code is not None:
                self._forget(replica)
            elif time.monotonic() > replica.kill_at:
                log.error("a serving process did not drain in time: it is killed")
                replica.process.kill()
        self.leaving = [replica for replica in self.leaving if replica.code is None]
        return ended

    def _forget(self, replica: Replica) -> None:
        self.meter.forget(replica.pid)
        if self._peers:
            fold(Path(self._peers), replica.pid)

    def count(self, bounds: Bounds, *, is_anew: bool) -> int:
        """How many replicas there are to be.

        Args:
            bounds: What somebody wants.
            is_anew: What is to be served is not what was: somebody has to load it.
        """
        if bounds.least == bounds.most:
            self.scaler = None
            return bounds.most
        now = time.monotonic()
        if self.scaler is None:
            self.scaler = Scaler(bounds, now, max(bounds.least, len(self.slots), 1))
        self.scaler.bounds = bounds
        if is_anew or any(replica.is_loading for replica in self.replicas):
            self.scaler.touch(now)
        if now >= self._look_at or (not self.slots and self.knocks):
            self._look_at = now + LOOK_S
            serving = sum(bool(replica.loaded) for replica in self.ready)
            before, load = self.scaler.replicas, self.meter.read(serving, knocks=self.knocks)
            if self.scaler.decide(now, load) != before:
                log.info("%s: %d replicas instead of %d, for %s", self.key, self.scaler.replicas, before, load)
        return self.scaler.replicas

    def feed(self, replica: Replica, wanted: Wanted) -> None:
        """Tell one of its replicas what to serve."""
        replica.feed(wanted)
        self.applied = dict(wanted)

    def resize(self, count: int) -> None:
        """So many slots; of too many those that serve least leave."""
        while len(self.slots) > count:
            slot = min(reversed(self.slots), key=lambda one: 0 if one.replica is None else 1 + len(one.replica.loaded))
            self.slots.remove(slot)
            if slot.replica is not None:
                slot.replica.leave(self._place.drain_s)
                self.leaving.append(slot.replica)
        self.slots += [Slot() for _ in range(count - len(self.slots))]

    def hurry(self) -> None:
        """Somebody may have mended it: what waits to be started again is due."""
        self._port_due_at = 0.0
        for slot in self.slots:
            slot.due_at = 0.0

    def start_due(self, is_group: bool, is_patient: bool) -> None:
        """Start what is due.

        Args:
            is_group: Its processes add up what they count.
            is_patient: One takes no connections before it has loaded what it is to serve.

        Raises:
            MillraceError: The port cannot be used.
            OSError: No process could be started.
        """
        now = time.monotonic()
        due = [slot for slot in self.slots if slot.replica is None and now >= slot.due_at]
        if not due or now < self._port_due_at or not self._open_door():
            return
        assert self._listener is not None
        if is_group and not self._peers:
            self._peers = tempfile.mkdtemp(prefix="millrace-")
        config = msgspec.structs.replace(
            self._place, port=self.port, grpc_port=self._place.grpc_port if self.key == SHARED else None,
            peers=self._peers, is_patient=is_patient,
        )  # fmt: skip
        for slot in due:
            try:
                slot.replica = Replica(self.key, config, self._listener, self._news)
            except OSError:
                slot.note_death(now)
                raise

    def _open_door(self) -> bool:
        """Listen. False while processes of a server before drain at the port, but not for ever."""
        if self._listener is not None:
            return True
        place, now = self._place, time.monotonic()
        is_guarded = (place.wants_token or bool(place.tls_client_ca)) and bool(place.tls_cert or place.proxies)
        try:
            self._listener = bind(place.host, self.port, is_guarded=is_guarded)
        except MillraceError:
            self._waits_for_port_until = self._waits_for_port_until or now + PORT_WAIT_S
            self._port_due_at = now + 1.0
            if now < self._waits_for_port_until:
                return False
            self._port_due_at = now + BACKOFF_S[-2]
            raise
        self.port = self._listener.getsockname()[1]
        self._waits_for_port_until = 0.0
        return True

    def close_door(self) -> None:
        """Listen no more; the port is remembered."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._peers:
            shutil.rmtree(self._peers, ignore_errors=True)
            self._peers = ""

    def rest(self) -> None:
        """Nothing is wanted of it any more."""
        self.resize(0)
        self.applied, self.scaler = {}, None
        if not self.leaving:
            self.close_door()

    def stop(self) -> list[Replica]:
        """Begin to stop everything; those that are to be waited for."""
        self.resize(0)
        return self.leaving

    def forget(self) -> None:
        """Everything has ended."""
        self.leaving = []
        self.meter = Meter()
        self.rest()
