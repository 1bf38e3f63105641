"""Processes that work on tasks, as many at once as there are; what they say comes back to one loop."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from millrace.core.errors import MillraceError, StageError


class Work(Protocol):
    """What a worker does with a task; it is made once in each process."""

    def __call__(self, task: Any, say: Callable[[Any], None]) -> Any:
        """The result; `say` takes news while it works."""
        ...


class Pool:
    """Runs tasks in processes of its own; with one worker in this one. A context.

    Args:
        make: Makes the work, in the worker; it and its arguments travel there.
        arguments: Of `make`.
        workers: How many.
    """

    def __init__(self, make: Callable[..., Work], arguments: tuple[Any, ...], workers: int) -> None:
        self._work = make(*arguments) if workers <= 1 else None
        self._idle: list[Connection] = []
        self._busy: list[Connection] = []
        self._processes: dict[Connection, BaseProcess] = {}
        spawning = multiprocessing.get_context("spawn")  # threads of libraries do not survive a fork
        for _ in range(workers if workers > 1 else 0):
            mine, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
            process.start()
            theirs.close()
            self._processes[mine] = process
            self._idle.append(mine)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            if self._busy:
                process.terminate()
        for process in self._processes.values():
            process.join()

    def run(self, tasks: Iterator[Any], on_news: Callable[[Any], None]) -> Iterator[Any]:
        """Results of all tasks, as they come; a task is taken when a worker is free.

        Args:
            tasks: Anything that travels between processes.
            on_news: Called with what workers say.

        Raises:
            MillraceError: A task failed; the others are given up.
            StageError: A worker was killed.
        """
        if self._work is not None:
            for task in tasks:
                yield self._work(task, on_news)
            return
        has_more = True
        while True:
            while has_more and self._idle:
                task = next(tasks, None)
                if task is None:
                    has_more = False
                    break
                connection = self._idle.pop()
                self._send(connection, task)
                self._busy.append(connection)
            if not self._busy:
                return
            for connection in wait(self._busy):
                is_result, value = self._receive(connection)  # type: ignore[arg-type]
                if is_result:
                    yield value
                else:
                    on_news(value)

    def _send(self, connection: Connection, task: Any) -> None:
        try:
            connection.send(task)
        except OSError:
            raise self._lost(connection) from None

    def _receive(self, connection: Connection) -> tuple[bool, Any]:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            raise self._lost(connection) from None
        if kind == "error":
            raise value
        if kind == "result":
            self._busy.remove(connection)
            self._idle.append(connection)
        return kind == "result", value

    def _lost(self, connection: Connection) -> StageError:
        process = self._processes[connection]
        process.join(5.0)
        return StageError(
            f"a worker ended with code {process.exitcode} before its part was finished",
            hint="out of memory? --workers 1 needs less; the same command goes on where it stopped",
        )


def _serve(connection: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """A worker's life: until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent, who ends us

    def say(news: Any) -> None:
        try:
            connection.send(("news", news))
        except OSError:
            raise SystemExit(1) from None  # whoever wanted this has gone

    try:
        work = make(*arguments)
        while True:
            connection.send(("result", work(connection.recv(), say)))
    except MillraceError as error:
        with suppress(OSError):
            connection.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
