"""Inference over HTTP: V2 tensors, and rows with labels as answers."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any, ClassVar

import orjson

from millrace.core.errors import InputError, StageError
from millrace.core.types import Struct
from millrace.formats.rows import decode_answers, encode_rows
from millrace.serve.admission import Refusal
from millrace.serve.answers import Answers, binary_head
from millrace.serve.batching import RUN_ERRORS, Job, Packing
from millrace.serve.dataplane import DataPlane
from millrace.serve.exchange import Exchange
from millrace.serve.oip import BINARY, JSON, Codec, Wanted

_INFERRED, _PREDICTED = ("infer", 200), ("predict", 200)


class HttpJob(Job):
    """A job that answers an exchange; both are set by `Inference.submit`."""

    __slots__ = ("exchange", "inference")
    route: ClassVar[str]
    exchange: Exchange
    inference: Inference

    def abort(self) -> None:
        """The client is gone."""
        self.inference.plane.cancel(self)

    def done(self) -> None:
        """Answer."""
        error = self.error
        if error is None:
            try:
                self.send()
                return
            except RUN_ERRORS as caught:  # outputs that are not the signature's
                error = caught
        self.inference.fail(self.exchange, self.route, error)

    def send(self) -> None:
        """Answer with the outputs."""
        raise NotImplementedError


class InferJob(HttpJob):
    """V2."""

    __slots__ = ("wanted",)
    route = "infer"
    wanted: Wanted

    def send(self) -> None:
        """Answer with tensors."""
        exchange, inference, wanted = self.exchange, self.inference, self.wanted
        service = exchange.connection.service
        if exchange.keep_alive and not service.is_draining and (wanted is BINARY or wanted is JSON):
            answers = inference.answers
            response = (answers.binary if wanted is BINARY else answers.json)(self, service.date_line)
            if response is not None:
                inference.requests[_INFERRED] += 1
                exchange.send(response)
                return
        document, blob = inference.codec.encode(wanted, self)
        inference.requests[_INFERRED] += 1
        if blob:
            exchange.reply_raw(binary_head(len(document), len(blob)), document + blob)
        else:
            exchange.reply(200, document)


class PredictJob(HttpJob):
    """Rows."""

    __slots__ = ()
    route = "predict"

    def send(self) -> None:
        """Answer with labels and probabilities."""
        inference, shared = self.inference, self.shared
        if shared.answers is None:
            shared.answers = decode_answers(inference.plane.signature, shared.tensors)
        body = orjson.dumps({"predictions": shared.answers[self.start : self.start + self.rows]})
        inference.requests[_PREDICTED] += 1
        self.exchange.reply(200, body)


class Repeats(Struct, frozen=True):
    """Stands for `infer` once a request's head is known together with the JSON of its body.

    What follows is the one tensor: with the same number of bytes it is right, else `infer` judges anew.
    """

    inference: Inference
    json: bytes
    body_bytes: int
    wanted: Wanted
    packing: Packing | None

    def infer(self, exchange: Exchange) -> None:
        """Queue a request."""
        data, at = exchange.data, exchange.body_at
        if not data.startswith(self.json, at) or len(data) - at != self.body_bytes:
            self.inference.infer(exchange)
            return
        job = InferJob(None, self.body_bytes, self.packing, data[at + len(self.json) :])
        job.wanted = self.wanted
        self.inference.submit(job, exchange)


class Inference:
    """Queues inference requests, and answers them.

    Args:
        plane: What runs them.
        max_body_bytes: Also of a body that comes compressed.
    """

    def __init__(self, plane: DataPlane, max_body_bytes: int) -> None:
        self.plane = plane
        self.codec = Codec(plane.info.name, plane.info.version, plane.signature)
        self._max_body_bytes = max_body_bytes
        self.requests = plane.metrics.requests
        self.answers = Answers(self.codec, plane.signature)
        self.is_pinned = True  # whether what came here once comes here again, for as long as its head is known

    def infer(self, exchange: Exchange) -> None:
        """V2: `POST /v2/models/{name}[/versions/{version}]/infer`."""
        headers = exchange.head.headers
        is_plain = b"content-encoding" not in headers
        try:
            header = headers.get(b"inference-header-content-length")
            body = exchange.body if is_plain else self._decompressed(exchange)
            request = self.codec.decode(body, None if header is None else _whole(header))
        except InputError as error:
            self.fail(exchange, "infer", error)
            return
        if request.repeats and is_plain and self.is_pinned:
            exchange.head.route = Repeats(self, request.repeats, len(body), request.wanted, self.codec.packing).infer
        job = InferJob(request.tensors, len(exchange.data) - exchange.body_at, self.codec.packing, request.data)
        job.wanted = request.wanted
        self.submit(job, exchange)

    def predict(self, exchange: Exchange) -> None:
        """Rows in, labels and probabilities out: `POST /v1/models/{name}:predict`."""
        try:
            body = exchange.body if b"content-encoding" not in exchange.head.headers else self._decompressed(exchange)
            tensors = encode_rows(self.plane.signature, _instances(body))
        except InputError as error:
            self.fail(exchange, "predict", error)
            return
        self.submit(PredictJob(tensors, len(exchange.data) - exchange.body_at), exchange)

    def submit(self, job: HttpJob, exchange: Exchange) -> None:
        """Queue a job that will answer, or refuse it."""
        job.inference = self
        job.exchange = exchange
        refusal = self.plane.submit(job, len(exchange.connection.queue) - 1)
        if refusal is None:
            exchange.waiting = job
        else:
            self._refuse(exchange, job.route, refusal)

    def _refuse(self, exchange: Exchange, route: str, refusal: Refusal) -> None:
        """Hold the refusal back and read nothing meanwhile: a retry storm must not take the cores."""
        connection = exchange.connection
        headers = b"Retry-After: %d\r\n" % refusal.retry_after_s

        def send() -> None:
            connection.release()
            self._fail_with(exchange, route, refusal.status, refusal.message, headers)

        connection.hold()
        asyncio.get_running_loop().call_later(self.plane.admission.hold_s, send)

    def fail(self, exchange: Exchange, route: str, error: Exception) -> None:
        """Answer with what went wrong."""
        if isinstance(error, InputError):
            self._fail_with(exchange, route, 400, error.message)
        elif isinstance(error, StageError):
            self._fail_with(exchange, route, 500, error.message)
        else:
            self._fail_with(
                exchange, route, 500, f"the model failed on this request: {type(error).__name__}: {error}"[:500]
            )

    def _fail_with(self, exchange: Exchange, route: str, status: int, message: str, headers: bytes = b"") -> None:
        self.requests[route, status] += 1
        exchange.reply_error(status, message, headers)

    def _decompressed(self, exchange: Exchange) -> bytes:
        encoding = exchange.head.headers[b"content-encoding"]
        if encoding == b"identity":
            return exchange.body
        return decompress(exchange.body, encoding.decode("latin-1"), self._max_body_bytes)


def _whole(header: bytes) -> int:
    if not header.isdigit() or len(header) > 18:
        raise InputError(f"Inference-Header-Content-Length: want a number, got {header[:40].decode('latin-1')!r}")
    return int(header)


def _instances(body: bytes) -> Any:
    try:
        document = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the request is not JSON: {error}") from None
    if not isinstance(document, dict) or "instances" not in document:
        raise InputError('want an object {"instances": [row, …]}')
    return document["instances"]


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """A body that came compressed; never more than `max_bytes` of it.

    Args:
        body: As it came.
        encoding: gzip or deflate.
        max_bytes: Bound of the result.

    Raises:
        InputError: Another encoding, damaged bytes, or too many.

    Example:
        >>> decompress(zlib.compress(b"abc"), "deflate", 10)
        b'abc'
    """
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        raise InputError(f"Content-Encoding: want gzip, deflate or none, got {encoding[:40]!r}")
    decompressor = zlib.decompressobj(wbits=47)  # gzip or zlib, by its first bytes
    try:
        result = decompressor.decompress(body, max_bytes)
    except zlib.error as error:
        raise InputError(f"the body is not {encoding}: {error}") from None
    if decompressor.unconsumed_tail:
        raise InputError(f"want a body of at most {max_bytes} bytes, got more after decompression")
    if not decompressor.eof:
        raise InputError(f"the body is not {encoding}: it ends too early")
    return result
