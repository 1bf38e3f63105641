"""Requests kept with their answers: sampled, masked, in JSON lines that `data.source` reads. Never in the way."""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import log1p
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import orjson

from millrace.core.spec import Capture
from millrace.formats.rows import decode_answers
from millrace.formats.signature import Signature
from millrace.serve.batching import Call

MASKED = "<masked>"
PART_BYTES = 16 << 20
MAX_WAITING_BYTES = 8 << 20
_GATHER_S = 0.2
_PERSONAL = (
    (re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"), "<email>"),
    (re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])"), "<address>"),
    (re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{2,4}){3,8}(?!\w)"), "<number>"),  # IBAN
    (re.compile(r"(?<![\w.])\+?\(?\d(?:[ ()/.-]{0,2}\d){6,18}(?![\w.])"), "<number>"),  # telephone, card, insurance
)
_log = logging.getLogger(__name__)


class Captured(NamedTuple):
    """Rows of one request, as the model saw and answered them."""

    at_s: float
    tensors: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    size_bytes: int


def folder_of(captures: Path, endpoint: str) -> Path:
    """Where the parts of an endpoint lie.

    Example:
        >>> folder_of(Path("captured"), "a/b").as_posix()
        'captured/a%2Fb'
    """
    return captures / quote(endpoint, safe="")


def without_personal(text: str) -> str:
    """A text without e-mail addresses, IP addresses, IBANs and numbers of seven or more digits.

    Example:
        >>> without_personal("ada@example.org, +44 20 7946 0958: 3 items from 10.0.0.7")
        '<email>, <number>: 3 items from <address>'
    """
    for pattern, name in _PERSONAL:
        text = pattern.sub(name, text)
    return text


class Recorder:
    """Keeps a share of an endpoint's requests. `take` is for the event loop's thread; a thread of its own writes.

    Args:
        capture: Share, columns to mask, bytes on disk.
        folder: Of the endpoint's parts.
        signature: What the rows and answers mean.
        version: Of the model.
    """

    def __init__(self, capture: Capture, folder: Path, signature: Signature, version: str) -> None:
        self.rows = self.dropped = 0
        self._capture, self._folder, self._signature, self._version = capture, folder, signature, version
        self._waiting: list[Captured] = []
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._is_closed = self._has_failed = False
        self._part = Part(folder, version, capture.max_bytes)
        self._skip = self._next_skip()

    def _next_skip(self) -> int:
        """How many requests are passed over until the next: drawn, so that most cost one subtraction."""
        if self._capture.share >= 1:
            return 0
        return int(log1p(-random.random()) / log1p(-self._capture.share))

    def take(self, call: Call) -> None:
        """Keep those requests of a call whose turn it is."""
        if self._skip >= len(call.jobs):
            self._skip -= len(call.jobs)
            return
        for job in call.jobs:
            if self._skip:
                self._skip -= 1
                continue
            self._skip = self._next_skip()
            tensors, outputs = job.tensors, job.outputs
            size_bytes = sum(values.nbytes for part in (tensors, outputs) for values in part.values())
            if self._waiting_bytes + size_bytes > MAX_WAITING_BYTES:
                self.dropped += job.rows
                continue
            self._waiting_bytes += size_bytes
            self._waiting.append(Captured(time.time(), tensors, {k: v.copy() for k, v in outputs.items()}, size_bytes))
        if self._waiting and not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what is left; a disk that does not answer within two seconds is left behind."""
        self._is_closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.wait()
            if not self._is_closed:
                time.sleep(_GATHER_S)
            self._wake.clear()
            self._write_waiting()
        self._write_waiting()
        self._part.close()

    def _write_waiting(self) -> None:
        taken, self._waiting = self._waiting, []
        for one in taken:
            rows = len(next(iter(one.tensors.values())))
            self._waiting_bytes -= one.size_bytes
            try:
                lines = [orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in self.rows_of(one)]
                self._part.write(b"".join(lines))
            except OSError as error:
                self.dropped += rows
                if not self._has_failed:
                    self._has_failed = True
                    _log.error("requests cannot be kept in %s: %s; they are dropped and counted", self._folder, error)
            else:
                self._has_failed = False
                self.rows += rows

    def rows_of(self, one: Captured) -> list[dict[str, Any]]:
        """What is written of a request: columns, the answer, and where it came from."""
        answers = decode_answers(self._signature, one.outputs)
        at = datetime.fromtimestamp(one.at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        rows: list[dict[str, Any]] = [{"captured_at": at, "model_version": self._version} for _ in answers]
        for spec in self._signature.inputs:
            values = one.tensors[spec.name]
            flat = values.reshape(len(values), -1).tolist()
            for row, cells in zip(rows, flat, strict=True):
                if len(spec.columns) == len(cells):
                    row |= {name: self._cell(name, cell) for name, cell in zip(spec.columns, cells, strict=True)}
                else:
                    row[spec.name] = MASKED if spec.name in self._capture.mask else self._plain(cells)
        for row, answer in zip(rows, answers, strict=True):
            row |= _answer_of(self._signature, answer)
        return rows

    def _cell(self, name: str, value: Any) -> Any:
        """A number that is masked is null: its column stays one of numbers."""
        if name in self._capture.mask:
            return MASKED if isinstance(value, str | bytes) else None
        return self._plain([value])[0]

    def _plain(self, values: Sequence[Any]) -> list[Any]:
        return [self._text(value) if isinstance(value, str | bytes) else _number(value) for value in values]

    def _text(self, value: str | bytes) -> str:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return without_personal(text) if self._capture.find_personal else text


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _answer_of(signature: Signature, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer under a name that is not the label's: it is what the model said, not what is true."""
    if "value" in answer:
        return {f"answered_{signature.label}": answer["value"]}
    shares = answer["probabilities"]
    return {f"answered_{signature.label}": answer["label"], "confidence": max(shares.values(), default=None)}


class Part:
    """The file that is written now, and the room that all of an endpoint's take: the oldest ones go. For one thread.

    Args:
        folder: Made when the first line comes.
        version: Of the model, for the name.
        max_bytes: Of all parts in the folder.
    """

    def __init__(self, folder: Path, version: str, max_bytes: int) -> None:
        self._folder, self._version, self._max_bytes = folder, quote(version, safe=""), max_bytes
        self._part_bytes = min(PART_BYTES, max(1, max_bytes // 4))
        self._fd = -1
        self._size_bytes = 0

    def write(self, data: bytes) -> None:
        """Append whole lines, all of them or none.

        Raises:
            OSError: The disk does not take them.
        """
        if self._fd < 0 or self._size_bytes + len(data) > self._part_bytes:
            self._begin(len(data))
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._size_bytes)
            raise
        self._size_bytes += len(data)

    def close(self) -> None:
        """Nothing more comes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self, size_bytes: int) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(max(size_bytes, self._part_bytes))
        name = f"{time.time_ns():019d}-v{self._version}-{os.getpid()}-{random.getrandbits(32):08x}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._folder / name, flags, 0o600)
        self._size_bytes = 0

    def _make_room(self, wanted_bytes: int) -> None:
        """Delete the oldest parts; names begin with when they did."""
        parts = [(path, path.stat().st_size) for path in sorted(self._folder.glob("*.jsonl"))]
        total = sum(size for _, size in parts)
        for path, size in parts:
            if total + wanted_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
