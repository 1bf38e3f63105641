"""The loop of a server: its rounds."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from millrace.control import loop as loops
from millrace.core.types import Lease
from millrace.wiring import open_dispatcher


class Rounds:
    """Counts them."""

    def __init__(self) -> None:
        self.begun: queue.Queue[int] = queue.Queue()

    def __call__(self, lease: Lease) -> None:
        self.begun.put(lease.token)

    def close(self) -> None:
        pass

    def step_down(self) -> None:
        pass


def test_what_wakes_it_begins_a_round_at_once_and_so_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "TICK_S", 600.0)
    dispatcher, rounds = open_dispatcher(str(tmp_path / "home")), Rounds()
    loop = loops.Loop(dispatcher.services, [rounds])
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        rounds.begun.get(timeout=20)
        for _ in range(3):
            loop.wake()  # several at once are one
        rounds.begun.get(timeout=20)
    finally:
        loop.stop()
        thread.join(20)
    assert not thread.is_alive()
    assert rounds.begun.qsize() <= 1
    dispatcher.close()
