"""SIGINT and SIGTERM as a call, wherever they find this process: also while an event is being printed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def calling_on_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """`handler` for both while inside. Only a process's main thread can ask for them: elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
