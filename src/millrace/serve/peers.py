"""What the processes of a group have counted, added up: whoever is asked for metrics asks the others."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from millrace.core.types import Struct
from millrace.serve.metrics import METRICS

_log = logging.getLogger(__name__)
GONE = "gone"  # the name of the file with what those had counted that are no more
ASK_S = 2.0  # a peer that does not answer by then counts with what it kept last
_LEAST = frozenset({"millrace_ready"})
_MOST = frozenset({"millrace_queue_predicted_seconds", "millrace_breaker_open"})
_SUFFIXES = ("_bucket", "_sum", "_count")


class Snapshot(Struct, frozen=True, kw_only=True):
    """What one process has counted.

    `endpoints`: Prometheus text by endpoint, under "" that of the server itself; `statistics`: V2 documents by
    endpoint. `folded`: names of processes that are no more, whose counts are in it.
    """

    endpoints: dict[str, str] = {}
    statistics: dict[str, list[dict[str, Any]]] = {}
    folded: list[str] = []


class Peers:
    """The other processes of a group, found in a folder of Unix sockets. For the event loop's thread.

    Each also keeps what it has counted in a file: what a killed process had counted does not vanish from the sums.

    Args:
        folder: Of the group, for its user alone.
        own: Reads what this process has counted.
    """

    def __init__(self, folder: Path, own: Callable[[], Snapshot]) -> None:
        self._folder, self._own = folder, own
        self._name = f"{os.getpid()}-{time.time_ns()}"
        self._server: asyncio.Server | None = None
        self._kept = b""

    async def start(self) -> None:
        """Answer the others."""
        path = self._folder / f"{self._name}.sock"
        try:
            self._server = await asyncio.start_unix_server(self._answer, path)
        except OSError as error:  # such as a path that is too long for a socket
            _log.warning("what this process counts is a moment old where others are asked for it: %s", error)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(msgspec.msgpack.encode(self._own()))
        writer.close()

    def keep(self) -> None:
        """Write down what has been counted, for when this process is no more."""
        data = msgspec.msgpack.encode(self._own())
        if data != self._kept:
            self._kept = data
            path = self._folder / f"{self._name}.new"
            try:
                path.write_bytes(data)
                path.replace(self._folder / f"{self._name}.kept")
            except OSError as error:  # a full disk, or no descriptor: the next time
                _log.warning("what this process counts is not kept: %s", error)

    async def ask(self) -> list[Snapshot]:
        """What each process has counted, this one first; of those that are no more, what does not fall."""
        while True:
            gone = _read(self._folder, GONE)
            names = {path.stem for path in self._folder.iterdir()} - {self._name, GONE}
            names -= {*gone.folded} if gone is not None else set()
            found = await asyncio.gather(*[self._ask(name) for name in sorted(names)])
            if _read(self._folder, GONE) == gone:  # else files were put together meanwhile
                return [one for one in (self._own(), gone, *found) if one is not None]

    async def _ask(self, name: str) -> Snapshot | None:
        try:
            async with asyncio.timeout(ASK_S):
                reader, writer = await asyncio.open_unix_connection(self._folder / f"{name}.sock")
                data = await reader.read()
                writer.close()
            return msgspec.msgpack.decode(data, type=Snapshot)
        except (OSError, TimeoutError, msgspec.MsgspecError):
            kept = _read(self._folder, name)
            return None if kept is None else _grown(kept)

    def stop(self) -> None:
        """Keep the last of it; no more answers."""
        self.keep()
        if self._server is not None:
            self._server.close()


def _read(folder: Path, name: str) -> Snapshot | None:
    try:
        return msgspec.msgpack.decode((folder / f"{name}.kept").read_bytes(), type=Snapshot)
    except FileNotFoundError:
        return None


def fold(folder: Path, pid: int) -> None:
    """Put what a process has counted that is no more to that of those before it. For the parent of the group alone.

    Whoever adds up meanwhile counts it once: either here, or in its own file.

    Args:
        folder: Of the group.
        pid: Of the process.
    """
    names = sorted({path.stem for path in folder.glob(f"{pid}-*")})
    parts = [part for name in (GONE, *names) if (part := _read(folder, name)) is not None]
    texts = [_grown(part).endpoints for part in parts]
    statistics = [part.statistics for part in parts]
    added = Snapshot(
        endpoints={
            one: added_texts([text[one] for text in texts if one in text])
            for one in dict.fromkeys([one for text in texts for one in text])
        },
        statistics={
            one: added_statistics([part[one] for part in statistics if one in part])
            for one in dict.fromkeys([one for part in statistics for one in part])
        },
        folded=names,
    )
    try:
        (folder / f"{GONE}.new").write_bytes(msgspec.msgpack.encode(added))
        (folder / f"{GONE}.new").replace(folder / f"{GONE}.kept")
        for path in [path for name in names for path in folder.glob(f"{name}.*")]:
            path.unlink()
    except OSError as error:  # a full disk: its own file still counts
        _log.warning("what process %d has counted stays in a file of its own: %s", pid, error)


def _grown(snapshot: Snapshot) -> Snapshot:
    """Without gauges: they are of what is running."""
    kept = {name: _without_gauges(text) for name, text in snapshot.endpoints.items()}
    return msgspec.structs.replace(snapshot, endpoints=kept)


def _without_gauges(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("#") or not _is_gauge(line)]
    return "\n".join(lines) + "\n"


def _is_gauge(sample: str) -> bool:
    known = METRICS.get(sample.partition("{")[0].partition(" ")[0])
    return known is not None and known[0] == "gauge"


def added_texts(texts: Iterable[str]) -> str:
    """Prometheus text of several processes as that of one: a series is the sum of theirs.

    Of `millrace_ready` it is the least, of times and of the breaker the most.

    Example:
        >>> one, two = ("# TYPE a counter\\na 1\\nmillrace_ready 1\\n", "# TYPE a counter\\na 2\\nmillrace_ready 0\\n")
        >>> print(added_texts([one, two]), end="")
        # TYPE a counter
        a 3
        millrace_ready 0
    """
    lines: dict[str, float | None] = {}  # in the order of their first mention; None: no sample
    for text in texts:
        for line in text.splitlines():
            if line.startswith("#"):
                lines.setdefault(line, None)
                continue
            series, _, value = line.rpartition(" ")
            before = lines.get(series)
            lines[series] = float(value) if before is None else _both(series.partition("{")[0], before, float(value))
    return "".join([line + "\n" if value is None else f"{line} {value:.10g}\n" for line, value in lines.items()])


def _both(name: str, one: float, other: float) -> float:
    if name in _LEAST:
        return min(one, other)
    return max(one, other) if name in _MOST else one + other


def added_statistics(documents: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """V2 statistics of several processes as those of one.

    Example:
        >>> one, two = ({"name": "m", "version": "1", "inference_count": count} for count in (1, 2))
        >>> added_statistics([[one], [two]])
        [{'name': 'm', 'version': '1', 'inference_count': 3}]
    """
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for model in [model for models in documents for model in models]:
        key = (model["name"], model["version"])
        found[key] = _added(found[key], model) if key in found else model
    return list(found.values())


def _added(one: Any, other: Any, name: str = "") -> Any:
    if isinstance(one, bool):
        return one or other
    if name == "calibration":
        return one  # how the model is called, not what was counted
    if isinstance(one, dict):
        return {key: _added(one[key], other[key], key) if key in one and key in other else (one | other)[key]
                for key in one | other}  # fmt: skip
    if name == "batch_stats":
        sizes = {batch["batch_size"]: batch for batch in one}
        for batch in other:
            size = batch["batch_size"]
            sizes[size] = {**_added(sizes[size], batch), "batch_size": size} if size in sizes else batch
        return [sizes[size] for size in sorted(sizes)]
    if isinstance(one, int | float):
        return max(one, other) if name == "last_inference" else one + other
    return one
