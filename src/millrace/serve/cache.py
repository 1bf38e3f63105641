"""Answers kept by the digest of their inputs: bounded in number, bytes and time; off unless it is asked for."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from millrace.core.spec import Cache
from millrace.serve.admission import Refusal
from millrace.serve.batching import Call, Job, Outputs
from millrace.serve.dataplane import DataPlane

_OVERHEAD_BYTES = 512  # of an entry, besides its arrays
_LARGEST_SHARE = 8  # an answer larger than this part of the cache is not kept


class _Entry(NamedTuple):
    tensors: dict[str, np.ndarray]
    size_bytes: int
    ends_s: float


class Answers:
    """The least recently used answers go first. For the event loop's thread.

    Args:
        limits: `entries` and `max_bytes` at most, each for `ttl_s` seconds.
        now_s: A monotonic clock.

    Example:
        >>> answers = Answers(Cache(entries=1))
        >>> answers.put(b"a", {"y": np.zeros(1)})
        >>> answers.put(b"b", {"y": np.ones(1)})
        >>> answers.get(b"a"), answers.get(b"b")
        (None, {'y': array([1.])})
    """

    def __init__(self, limits: Cache, now_s: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._now_s = limits, now_s
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        """How many there are."""
        return len(self._entries)

    def get(self, digest: bytes) -> dict[str, np.ndarray] | None:
        """The outputs of these inputs, if they are here and not too old."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        if entry.ends_s <= self._now_s():
            self._drop(digest)
            return None
        self._entries.move_to_end(digest)
        return entry.tensors

    def put(self, digest: bytes, outputs: Mapping[str, np.ndarray]) -> None:
        """Keep outputs: a copy, since they are rows of a whole batch."""
        size_bytes = _OVERHEAD_BYTES + sum(_size_of(values) for values in outputs.values())
        if digest in self._entries:
            self._drop(digest)
        if size_bytes > self._limits.max_bytes // _LARGEST_SHARE:
            return
        tensors = {name: np.array(values) for name, values in outputs.items()}
        for values in tensors.values():
            values.flags.writeable = False
        self._entries[digest] = _Entry(tensors, size_bytes, self._now_s() + self._limits.ttl_s)
        self.size_bytes += size_bytes
        while len(self._entries) > self._limits.entries or self.size_bytes > self._limits.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, digest: bytes) -> None:
        self.size_bytes -= self._entries.pop(digest).size_bytes


class CachedPlane(DataPlane):
    """A data plane that answers from memory what it has answered before. Errors are never kept.

    It is of one revision, like every data plane: another version of the model begins with an empty one.
    """

    def __init__(self, limits: Cache, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answers = Answers(limits)
        self._hits: set[Job] = set()  # to be answered in this tick of the loop

    def submit(self, job: Job, held_by_connection: int = 0) -> Refusal | None:
        """As of every data plane; what is known takes no place in the queue."""
        start_ns = time.perf_counter_ns()
        job.digest = digest_of(job)
        found = self.answers.get(job.digest)
        took_ns = time.perf_counter_ns() - start_ns
        if found is None:
            refusal = super().submit(job, held_by_connection)
            if refusal is None:
                self.metrics.misses += 1
                self.metrics.miss_ns += took_ns
            return refusal
        self.metrics.hits += 1
        self.metrics.hit_ns += took_ns
        job.enqueued_ns = start_ns
        self._hits.add(job)
        asyncio.get_running_loop().call_soon(self._answer, job, found)
        return None

    def _answer(self, job: Job, found: Mapping[str, np.ndarray]) -> None:
        if job not in self._hits:
            return  # its client has gone
        self._hits.discard(job)
        job.shared, job.start, job.is_done = Outputs(found), 0, True
        now_ns = time.perf_counter_ns()
        job.done()
        self.metrics.latency.add((now_ns - job.enqueued_ns) * 1e-9)
        if self.collector is not None:
            self.collector.add(job.tensors, found)

    def cancel(self, job: Job) -> None:
        """The client is gone."""
        if job in self._hits:
            self._hits.discard(job)
            job.is_cancelled = True
        else:
            super().cancel(job)

    def _finish(self, batch: list[Job], calls: list[Call]) -> None:
        super()._finish(batch, calls)
        for call in calls:
            for job in call.jobs:
                if job.error is None and job.digest:
                    self.answers.put(job.digest, job.outputs)


def digest_of(job: Job) -> bytes:
    """The digest of a request's tensors, however they were sent."""
    packing = job.packing
    if packing is not None and job.data is not None:
        head = f"{packing.name}\0float32\0{[job.rows, packing.width]}\0".encode()
        return hashlib.blake2b(head + job.data, digest_size=24).digest()
    state = hashlib.blake2b(digest_size=24)
    for name, values in job.tensors.items():
        state.update(f"{name}\0{values.dtype}\0{list(values.shape)}\0".encode())
        if values.dtype == object:
            for text in values.reshape(-1):
                data = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
                state.update(len(data).to_bytes(8, "big") + data)
        else:
            state.update(np.ascontiguousarray(values).tobytes())
    return state.digest()


def _size_of(values: np.ndarray) -> int:
    return values.nbytes + (sum(64 + 4 * len(str(one)) for one in values.reshape(-1)) if values.dtype == object else 0)
