"""Inference over HTTP: V2 tensors, and rows with labels as answers."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import orjson

from millrace.core.errors import DeadlineError, ExtraMissingError, InputError, MillraceError, UnavailableError
from millrace.core.types import Struct
from millrace.formats.rows import decode_answers, encode_rows
from millrace.serve.admission import Refusal
from millrace.serve.answers import Answers, binary_head
from millrace.serve.batching import RUN_ERRORS, Job, Packing
from millrace.serve.dataplane import DataPlane
from millrace.serve.encodings import INLINE_BYTES, SMALLEST, accepted, compress
from millrace.serve.exchange import JSON_TYPE, Exchange
from millrace.serve.forms import Form, kind_of, likely_first, read_form, wants_csv, write_csv
from millrace.serve.oip import BINARY, JSON, MAX_TIMEOUT_US, Codec, Wanted

TIMEOUT_HEADER = b"x-request-timeout-ms"
_CSV_TYPE = b"text/csv; charset=utf-8"
_JSON_FORM = Form()
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

    __slots__ = ("encoding", "wanted")
    route = "infer"
    wanted: Wanted
    encoding: str  # how a body of some size is to be compressed; empty: not at all

    def send(self) -> None:
        """Answer with tensors."""
        exchange, inference, wanted, encoding = self.exchange, self.inference, self.wanted, self.encoding
        service = exchange.connection.service
        if exchange.keep_alive and not service.is_draining and (wanted is BINARY or wanted is JSON):
            answers = inference.answers
            response = None
            if not encoding or answers.is_small(self.rows):
                response = (answers.binary if wanted is BINARY else answers.json)(self, service.date_line)
            if response is not None and (not encoding or len(response) < SMALLEST):
                inference.requests[_INFERRED] += 1
                exchange.send(response)
                return
        document, blob = inference.codec.encode(wanted, self)
        inference.requests[_INFERRED] += 1
        if encoding and len(document) + len(blob or b"") >= SMALLEST:
            self._send_compressed(document, blob)
        elif blob is not None:
            exchange.reply_raw(binary_head(len(document), len(blob)), document + blob)
        else:
            exchange.reply(200, document)

    def _send_compressed(self, document: bytes, blob: bytes | None) -> None:
        exchange, encoding = self.exchange, self.encoding
        headers = b"Content-Encoding: %s\r\nVary: Accept-Encoding\r\n" % encoding.encode()
        body = document if blob is None else document + blob
        if blob is not None:
            headers += b"Inference-Header-Content-Length: %d\r\n" % len(document)
        kind = JSON_TYPE if blob is None else b"application/octet-stream"
        if len(body) <= INLINE_BYTES:
            exchange.reply(200, compress(body, encoding), kind, headers)
            return
        work = asyncio.get_running_loop().run_in_executor(None, compress, body, encoding)
        work.add_done_callback(lambda done: exchange.reply(200, done.result(), kind, headers))


class PredictJob(HttpJob):
    """Rows."""

    __slots__ = ()
    route = "predict"

    def send(self) -> None:
        """Answer with labels and probabilities."""
        inference, shared = self.inference, self.shared
        if shared.answers is None:
            shared.answers = decode_answers(inference.plane.signature, shared.tensors)
        inference.requests[_PREDICTED] += 1
        self.reply(shared.answers[self.start : self.start + self.rows])

    def reply(self, answers: list[Any]) -> None:
        """Answer with these."""
        self.exchange.reply(200, orjson.dumps({"predictions": answers}))


class FormJob(PredictJob):
    """Rows of a CSV, or a picture."""

    __slots__ = ("form",)
    form: Form

    def reply(self, answers: list[Any]) -> None:
        """Answer as the form wants it."""
        if self.form.wants_csv:
            self.exchange.reply(200, write_csv(answers).encode(), _CSV_TYPE)
        else:
            shown = [likely_first(answer) for answer in answers] if self.form.is_picture else answers
            self.exchange.reply(200, orjson.dumps({"predictions": shown}))


class Repeats(Struct, frozen=True):
    """Stands for `infer` once a request's head is known together with the JSON of its body.

    What follows is the one tensor: with the same number of bytes it is right, else `infer` judges anew.
    """

    inference: Inference
    json: bytes
    body_bytes: int
    wanted: Wanted
    encoding: str
    packing: Packing | None
    timeout_ns: int

    def infer(self, exchange: Exchange) -> None:
        """Queue a request."""
        data, at = exchange.data, exchange.body_at
        if not data.startswith(self.json, at) or len(data) - at != self.body_bytes:
            self.inference.infer(exchange)
            return
        job = InferJob(None, self.body_bytes, self.packing, data[at + len(self.json) :])
        job.wanted, job.encoding = self.wanted, self.encoding
        if self.timeout_ns:
            job.deadline_ns = time.perf_counter_ns() + self.timeout_ns
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
        if self._is_refused(exchange, "infer"):
            return
        began_ns = time.perf_counter_ns()
        headers = exchange.head.headers
        is_plain = b"content-encoding" not in headers
        try:
            timeout_ns = _timeout_ns(headers)
            header = headers.get(b"inference-header-content-length")
            body = exchange.body if is_plain else self._decompressed(exchange)
            request = self.codec.decode(body, None if header is None else _whole(header))
        except InputError as error:
            self.fail(exchange, "infer", error)
            return
        wanted = request.wanted
        accepts = headers.get(b"accept-encoding")
        encoding = "" if accepts is None else accepted(accepts)
        if wanted.timeout_us:
            timeout_ns = min(timeout_ns or wanted.timeout_us * 1000, wanted.timeout_us * 1000)
        if request.repeats and is_plain and self.is_pinned:
            exchange.head.route = Repeats(
                self, request.repeats, len(body), wanted, encoding, self.codec.packing, timeout_ns
            ).infer  # fmt: skip
        job = InferJob(request.tensors, len(exchange.data) - exchange.body_at, self.codec.packing, request.data)
        job.wanted, job.encoding = wanted, encoding
        if timeout_ns:
            job.deadline_ns = began_ns + timeout_ns
        self.submit(job, exchange)

    def predict(self, exchange: Exchange) -> None:
        """Rows in, labels and probabilities out: `POST /v1/models/{name}:predict`."""
        if self._is_refused(exchange, "predict"):
            return
        began_ns = time.perf_counter_ns()
        headers = exchange.head.headers
        try:
            timeout_ns = _timeout_ns(headers)
            body = exchange.body if b"content-encoding" not in headers else self._decompressed(exchange)
            job = self._predict_job(headers, body, len(exchange.data) - exchange.body_at)
        except (InputError, ExtraMissingError) as error:
            self.fail(exchange, "predict", error)
            return
        if timeout_ns:
            job.deadline_ns = began_ns + timeout_ns
        self.submit(job, exchange)

    def _predict_job(self, headers: Mapping[bytes, bytes], body: bytes, size_bytes: int) -> PredictJob:
        content_type = headers.get(b"content-type", b"")
        kind, accept = kind_of(content_type), headers.get(b"accept", b"")
        if kind:
            tensors, form = read_form(self.plane.signature, kind, content_type, body, self.plane.examples)
        else:
            tensors, form = encode_rows(self.plane.signature, _instances(body)), _JSON_FORM
        if form is _JSON_FORM and b"csv" not in accept:
            return PredictJob(tensors, size_bytes)
        job = FormJob(tensors, size_bytes)
        job.form = form._replace(wants_csv=wants_csv(accept))
        return job

    def _is_refused(self, exchange: Exchange, route: str) -> bool:
        """Whether a request was refused before its body was looked at."""
        connection = exchange.connection
        client = None if connection.service.clients is None else connection.client_of(exchange.head)
        size_bytes = len(exchange.data) - exchange.body_at
        refusal = self.plane.refusal(size_bytes, len(connection.queue) - 1, client)
        if refusal is None:
            return False
        self._refuse(exchange, route, refusal)
        return True

    def submit(self, job: HttpJob, exchange: Exchange) -> None:
        """Queue a job that will answer, or refuse it."""
        job.inference = self
        job.exchange = exchange
        connection = exchange.connection
        if connection.service.clients is not None:
            job.client = connection.client_of(exchange.head)
        refusal = self.plane.submit(job, len(connection.queue) - 1)
        if refusal is None:
            exchange.waiting = job
        else:
            self._refuse(exchange, job.route, refusal)

    def _refuse(self, exchange: Exchange, route: str, refusal: Refusal) -> None:
        """Hold the refusal back and read nothing meanwhile: a retry storm must not take the cores."""
        connection = exchange.connection
        size_bytes = len(exchange.data)
        exchange.data, exchange.body_at = b"", 0  # it is held without its body

        def send() -> None:
            connection.release()
            self._fail_with(exchange, route, refusal.status, refusal.message, refusal.headers)

        if connection.service.pacer.hold(send, self.plane.admission.hold_s, size_bytes):
            connection.hold()
        else:  # who is cut off has to connect again: that is a pause too
            exchange.keep_alive = False
            self._fail_with(exchange, route, refusal.status, refusal.message, refusal.headers)

    def fail(self, exchange: Exchange, route: str, error: Exception) -> None:
        """Answer with what went wrong."""
        if isinstance(error, InputError):
            self._fail_with(exchange, route, 400, error.message)
        elif isinstance(error, DeadlineError):
            self._fail_with(exchange, route, 504, error.message)
        elif isinstance(error, UnavailableError):
            self._fail_with(exchange, route, 503, error.message, b"Retry-After: 1\r\n")
        elif isinstance(error, ExtraMissingError):
            self._fail_with(exchange, route, 501, f"{error.message}: {error.hint}")
        elif isinstance(error, MillraceError):
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


def _timeout_ns(headers: Mapping[bytes, bytes]) -> int:
    """Nanoseconds within which an answer is wanted; 0: whenever it comes."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return 0
    if not given.isdigit() or len(given) > 8 or not 0 < int(given) <= MAX_TIMEOUT_US // 1000:
        shown = given[:40].decode("latin-1")
        raise InputError(f"X-Request-Timeout-Ms: want whole milliseconds, 1 to a day, got {shown!r}")
    return int(given) * 1_000_000


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
