"""Answers to plain V2 requests (every output, no id), put together from parts that were rendered before."""

from __future__ import annotations

import math

from millrace.formats.signature import Signature
from millrace.serve.batching import Job
from millrace.serve.encodings import SMALLEST
from millrace.serve.oip import BINARY, Codec
from millrace.serve.tensors import itemsize, rows_to_json

_MAX_FRONTS = 1024  # numbers of rows that were asked for
_JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
_JSON_END = b"]}]}"


class Answers:
    """Renders whole responses for connections that stay open. For models with one output of a fixed shape.

    What the answers of one call have in common is made once, and so is what the answers of as many rows
    have in common. Every method returns None where the model is another one, or gave something else than
    its signature says: `Codec.encode` describes what is there.

    Args:
        codec: Renders what is not in store.
        signature: The model's.
    """

    def __init__(self, codec: Codec, signature: Signature) -> None:
        self._codec = codec
        only = signature.outputs[0] if len(signature.outputs) == 1 else None
        is_fixed = only is not None and only.dtype not in ("string", "bfloat16") and -1 not in only.shape[1:]
        self._spec = only if is_fixed else None
        self._row_bytes = math.prod(only.shape[1:]) * itemsize(only) if only is not None and is_fixed else 0
        self._date_line = b""
        self._fronts: dict[int, bytes] = {}  # rows → a binary answer up to its tensor; with the date
        self._openings: dict[int, bytes] = {}  # rows → a JSON body up to its numbers

    def is_small(self, rows: int) -> bool:
        """Whether an answer of so many rows may have less than what is worth compressing, in either form."""
        return rows * self._row_bytes < SMALLEST

    def binary(self, job: Job, date_line: bytes) -> bytes | None:
        """The response with a binary tensor.

        Args:
            job: Answered.
            date_line: The Date header.
        """
        shared = job.shared
        if shared.blob is None:
            shared.blob = shared.tensors[self._spec.name].tobytes() if self._spec and self._fits(job) else b""
        if not shared.blob:
            return None
        if date_line is not self._date_line:
            self._fronts.clear()
            self._date_line = date_line
        front = self._fronts.get(job.rows) or self._front(job)
        start = job.start * self._row_bytes
        return front + shared.blob[start : start + job.rows * self._row_bytes]

    def json(self, job: Job, date_line: bytes) -> bytes | None:
        """The response with numbers as JSON; arguments as for `binary`."""
        shared = job.shared
        if shared.json is None:
            shared.json = rows_to_json(shared.tensors[self._spec.name]) if self._spec and self._fits(job) else []
        if not shared.json:
            return None
        opening = self._openings.get(job.rows) or self._opening(job)
        data = shared.json[job.start] if job.rows == 1 else b",".join(shared.json[job.start : job.start + job.rows])
        length = len(opening) + len(data) + len(_JSON_END)
        return b"%s%d\r\n%s\r\n%s%s%s" % (_JSON_HEAD, length, date_line, opening, data, _JSON_END)

    def _fits(self, job: Job) -> bool:
        spec, tensors = self._spec, job.shared.tensors
        if spec is None or len(tensors) != 1:
            return False
        values = tensors[spec.name]
        return values.dtype == spec.dtype and list(values.shape[1:]) == spec.shape[1:]

    def _front(self, job: Job) -> bytes:
        document, blob = self._codec.encode(BINARY, job)
        front = b"%s%s\r\n%s" % (binary_head(len(document), len(blob or b"")), self._date_line, document)
        if len(self._fronts) < _MAX_FRONTS:
            self._fronts[job.rows] = front
        return front

    def _opening(self, job: Job) -> bytes:
        assert self._spec is not None
        opening = self._codec.opening(self._spec.name, (job.rows, *self._spec.shape[1:]))
        if len(self._openings) < _MAX_FRONTS:
            self._openings[job.rows] = opening
        return opening


def binary_head(document_bytes: int, blob_bytes: int) -> bytes:
    """Status line and headers of an answer with binary tensors.

    Example:
        >>> binary_head(100, 40).splitlines()[-1]
        b'Content-Length: 140'
    """
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n" % (document_bytes, document_bytes + blob_bytes)
    )
