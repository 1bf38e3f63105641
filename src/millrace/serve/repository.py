"""The models that a serving process knows: loaded when they are wanted, unloaded when memory is, warm before routed."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from millrace.core.errors import (
    CapacityError,
    ConflictError,
    MillraceError,
    NotFoundError,
    StageError,
    UnavailableError,
)
from millrace.serve.batching import RUN_ERRORS
from millrace.serve.child import ServedModel
from millrace.serve.dataplane import DataPlane
from millrace.serve.opening import size_on_disk
from millrace.serve.revisions import Directory, Revision
from millrace.serve.runtimes.python import resident_bytes

_log = logging.getLogger(__name__)
MAX_HELD = 256  # requests that wait for one model to be loaded
RETIRE_S = 30.0
RETRY_S = 5.0  # of what could not be loaded, by a request for inference
NOT_LOADED = "it is not loaded: its first request loads it"
UNLOADED = "it was unloaded on request"


@runtime_checkable
class SupportsMemory(Protocol):
    """A runtime whose memory is not this process's."""

    @property
    def memory_bytes(self) -> int:
        """Resident."""
        ...


class _Entry:
    """An endpoint: its versions, and what became of them."""

    def __init__(self, models: list[ServedModel]) -> None:
        self.models = models
        self.reason = NOT_LOADED
        self.is_shut = False  # unloaded on request: a request for inference does not load it
        self.size_bytes = 0  # as measured when it was loaded last
        self.loaded_at_s = 0.0
        self.failed_at_s = -math.inf
        self.waiting = 0
        self.loading: asyncio.Task[None] | None = None

    @property
    def expected_bytes(self) -> int:
        return self.size_bytes or sum(map(size_on_disk, self.models))


class ModelRepository:
    """Loads and unloads the endpoints of a directory. For the event loop's thread, made inside the running loop.

    One endpoint is loaded at a time. Its new planes take the old ones' place when all of them have passed their
    self-test and are calibrated, never before. Where memory is bounded, the idle endpoint that was used least
    recently makes room; one with requests in it is never unloaded.

    Args:
        directory: What is served.
        models: What may be served; the versions of one name are one endpoint.
        open_plane: Loads a model, warm; called in a thread.
        budget_bytes: Of all loaded models together; None: no bound.
        loaded, retired: Called with each plane that begins and that has ended.
    """

    def __init__(
        self, directory: Directory, models: Sequence[ServedModel], open_plane: Callable[[ServedModel], DataPlane],
        budget_bytes: int | None = None, *, loaded: Callable[[DataPlane], None] = lambda plane: None,
        retired: Callable[[DataPlane], None] = lambda plane: None,
    ) -> None:  # fmt: skip
        self._directory, self._open_plane, self.budget_bytes = directory, open_plane, budget_bytes
        self._loaded, self._retired = loaded, retired
        self._entries: dict[str, _Entry] = {}
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        for name in dict.fromkeys(model.name for model in models):
            self._entries[name] = _Entry([model for model in models if model.name == name])
            directory.excuse(name, NOT_LOADED)

    # ------------------------------------------------------------------ asked by the protocols

    def awaits(self, name: str) -> bool:
        """Whether a request for inference loads it; what has failed is not tried again at once."""
        entry = self._entries.get(name)
        if entry is None or entry.is_shut or name in self._directory:
            return False
        return time.monotonic() - entry.failed_at_s >= RETRY_S

    async def ensure(self, name: str) -> None:
        """Wait until an endpoint is loaded, and load it where nobody does.

        Raises:
            UnavailableError: Too many wait already.
            MillraceError: It cannot be loaded.
        """
        entry = self._known(name)
        if name in self._directory:
            return
        if entry.waiting >= MAX_HELD:
            raise UnavailableError(f"model {name!r} is being loaded, and {entry.waiting} requests wait for it already")
        entry.waiting += 1
        try:
            await self._single(name, entry)
        finally:
            entry.waiting -= 1

    async def load(self, name: str) -> None:
        """Load an endpoint, or load it anew: what is served stays until the new planes are warm.

        Raises:
            NotFoundError: It is not known here.
            CapacityError: There is no room.
            MillraceError: It cannot be loaded.
        """
        await self._single(name, self._known(name))

    async def unload(self, name: str) -> None:
        """Serve an endpoint no longer until it is loaded on request; what it has taken is answered.

        Raises:
            NotFoundError: It is not known here.
            ConflictError: It is being loaded.
        """
        entry = self._known(name)
        if entry.loading is not None:
            raise ConflictError(f"model {name!r} is being loaded", hint="unload it when it is ready")
        entry.is_shut = True
        await self._unload(name, UNLOADED)

    def index(self) -> list[dict[str, str]]:
        """Every version that is known: name, version, state, reason."""
        rows: list[dict[str, str]] = []
        for name, entry in sorted(self._entries.items()):
            found = {one.plane.info.version: one.plane for one in self._revisions(name)}
            for model in entry.models:
                plane = found.get(model.version)
                is_ready = plane is not None and plane.is_ready
                reason = "" if is_ready else ("it does not answer" if plane is not None else entry.reason)
                state = "READY" if is_ready else "LOADING" if entry.loading and plane is None else "UNAVAILABLE"
                rows.append({"name": name, "version": model.version, "state": state, "reason": reason})
        return rows

    def memory(self) -> dict[str, int]:
        """Bytes by loaded endpoint, as measured."""
        return {name: entry.size_bytes for name, entry in self._entries.items() if name in self._directory}

    def has_room(self, name: str) -> bool:
        """Whether it can be loaded without another being unloaded."""
        budget = self.budget_bytes
        return budget is None or self._used(name) + self._known(name).expected_bytes <= budget

    # ------------------------------------------------------------------ loading

    def _known(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise NotFoundError(f"model {name[:80]!r} is not in this server's repository: want one of {known}")
        return entry

    def _revisions(self, name: str) -> list[Revision]:
        return list(self._directory.find(name).all.values()) if name in self._directory else []

    async def _single(self, name: str, entry: _Entry) -> None:
        """One load for all who ask for it meanwhile."""
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(name, entry))
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # each who waits sees it
        await asyncio.shield(entry.loading)

    async def _load(self, name: str, entry: _Entry) -> None:
        entry.reason = "it is being loaded"
        if name not in self._directory:
            self._directory.excuse(name, entry.reason)
        try:
            async with self._lock:
                await self._make_room(name, entry.expected_bytes)
                planes, size_bytes = await self._open_all(entry)
        except RUN_ERRORS as error:
            entry.reason = f"it could not be loaded: {error}"
            entry.failed_at_s = time.monotonic()
            if name not in self._directory:
                self._directory.excuse(name, entry.reason)
            if self._directory.is_told:  # before that, whoever starts the server is told
                _log.error("the model %r: %s", name, entry.reason)
            if isinstance(error, MillraceError):
                raise
            raise StageError(f"model {name!r}: {entry.reason}") from error
        finally:
            entry.loading = None
        entry.size_bytes, entry.is_shut, entry.reason = size_bytes, False, ""
        entry.loaded_at_s = time.time()
        for plane in planes:
            self._loaded(plane)
        revisions = [Revision(plane, model.weight) for plane, model in zip(planes, entry.models, strict=True)]
        self._retire(self._directory.put(name, revisions))
        await self._shrink(name)

    async def _open_all(self, entry: _Entry) -> tuple[list[DataPlane], int]:
        before = resident_bytes(os.getpid())
        planes: list[DataPlane] = []
        try:
            for model in entry.models:
                planes.append(await asyncio.to_thread(self._open_plane, model))
        except BaseException:
            for plane in planes:
                plane.close(wait_s=0.0)
                plane.runtime.unload()
            raise
        grown = max(0, resident_bytes(os.getpid()) - before)
        apart = sum(plane.runtime.memory_bytes for plane in planes if isinstance(plane.runtime, SupportsMemory))
        return planes, max(grown, sum(map(size_on_disk, entry.models))) + apart

    # ------------------------------------------------------------------ making room

    def _used(self, but: str) -> int:
        return sum(size for name, size in self.memory().items() if name != but)

    async def _make_room(self, name: str, wanted: int) -> None:
        """Unload until a model fits.

        Raises:
            CapacityError: It never will, or everything else is in use.
        """
        budget = self.budget_bytes
        if budget is None:
            return
        if wanted > budget:
            raise CapacityError(f"model {name!r} takes {_mb(wanted)}: want at most the memory budget of {_mb(budget)}",
                                hint="a larger --memory-budget")  # fmt: skip
        while self._used(name) + wanted > budget:
            if not await self._unload_one(name):
                raise CapacityError(
                    f"model {name!r} takes {_mb(wanted)}, and the models in use take {_mb(self._used(name))} of the"
                    f" memory budget of {_mb(budget)}", hint="ask again when they are idle, or a larger --memory-budget"
                )  # fmt: skip

    async def _shrink(self, name: str) -> None:
        """What was loaded may be larger than its files were."""
        budget = self.budget_bytes
        while budget is not None and sum(self.memory().values()) > budget:
            if not await self._unload_one(name):
                _log.warning("loaded models take %s, more than the memory budget of %s, and all of them are in use",
                             _mb(sum(self.memory().values())), _mb(budget))  # fmt: skip
                return

    async def _unload_one(self, but: str) -> bool:
        """Unload the idle endpoint that was used least recently; whether there was one."""
        idle = [name for name in self.memory() if name != but and self._is_idle(name)]
        if not idle:
            return False
        await self._unload(min(idle, key=self._last_used_s), "it made room for another: its next request loads it")
        return True

    def _is_idle(self, name: str) -> bool:
        is_loading = self._entries[name].loading is not None
        return not is_loading and not any(one.plane.admission.waiting for one in self._revisions(name))

    def _last_used_s(self, name: str) -> float:
        used_ms = [one.plane.metrics.last_inference_ms for one in self._revisions(name)]
        return max(self._entries[name].loaded_at_s, *[ms / 1e3 for ms in used_ms])

    async def _unload(self, name: str, reason: str) -> None:
        entry = self._entries[name]
        entry.reason = reason
        planes = self._directory.remove(name)
        self._directory.excuse(name, reason)
        for plane in planes:
            await self._drain(plane)

    def _retire(self, planes: list[DataPlane]) -> None:
        for plane in planes:
            task = asyncio.create_task(self._drain(plane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self, plane: DataPlane) -> None:
        """Let it answer what it has taken, then free it."""
        until_s = time.monotonic() + RETIRE_S
        while plane.admission.waiting and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        self._retired(plane)
        await asyncio.to_thread(_free, plane)


def _free(plane: DataPlane) -> None:
    plane.close(wait_s=1.0)
    plane.runtime.unload()
    gc.collect()
    if sys.platform == "linux":  # what is freed goes back to the system, so that the next measure is right
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
