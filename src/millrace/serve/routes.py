"""Which request means what: V2, predictions as rows, health and metrics over one data plane."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, ClassVar
from urllib.parse import unquote_to_bytes

import numpy as np
import orjson

from millrace.core.errors import InputError, StageError
from millrace.formats.rows import decode_answers, encode_rows
from millrace.serve import oip
from millrace.serve.admission import Refusal
from millrace.serve.batching import RUN_ERRORS, Job
from millrace.serve.dataplane import DataPlane
from millrace.serve.http import Exchange
from millrace.serve.service import Service

_OCTETS = b"application/octet-stream"
_PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"
Route = Callable[[Exchange], None]


class HttpJob(Job):
    """A job that answers an exchange."""

    __slots__ = ("exchange", "routes")
    route: ClassVar[str]

    def __init__(self, routes: Routes, exchange: Exchange, tensors: dict[str, np.ndarray]) -> None:
        super().__init__(tensors, len(exchange.body))
        self.routes = routes
        self.exchange = exchange

    def abort(self) -> None:
        """The client is gone."""
        self.routes.plane.cancel(self)

    def done(self) -> None:
        """Answer."""
        if self.error is not None:
            self.routes.fail(self.exchange, self.route, self.error)
            return
        try:
            self.send()
        except RUN_ERRORS as error:  # outputs that are not the signature's
            self.routes.fail(self.exchange, self.route, error)

    def send(self) -> None:
        """Answer with the outputs."""
        raise NotImplementedError


class InferJob(HttpJob):
    """V2."""

    __slots__ = ("request",)
    route = "infer"

    def __init__(
        self, routes: Routes, exchange: Exchange, tensors: dict[str, np.ndarray], request: oip.InferRequest
    ) -> None:
        super().__init__(routes, exchange, tensors)
        self.request = request

    def send(self) -> None:
        """Answer with tensors."""
        self.routes.send_tensors(self.exchange, self.request, self.outputs)


class PredictJob(HttpJob):
    """Rows."""

    __slots__ = ()
    route = "predict"

    def send(self) -> None:
        """Answer with labels and probabilities."""
        self.routes.send_answers(self.exchange, self.outputs)


class Routes:
    """The handler of a `Service`.

    Args:
        plane: What answers.
        server_version: For the metadata.
        max_body_bytes: Also of a body that comes compressed.
    """

    def __init__(self, plane: DataPlane, server_version: str, max_body_bytes: int) -> None:
        self.plane = plane
        self.service: Service  # set by the server, which needs the handler first
        self._server_version = server_version
        self._max_body_bytes = max_body_bytes
        self._codec = oip.Codec(plane.info.name, plane.info.version, plane.signature)
        self._heads: dict[tuple[int, int], bytes] = {}
        self._requests = plane.metrics.requests
        self._models = {b"infer": (b"POST", self.infer), b"ready": (b"GET", self._model_ready)}
        self._models |= {
            b"": (b"GET", self._model_metadata),
            b"config": (b"GET", self._model_config),
            b"stats": (b"GET", self._statistics),
        }
        self._routes: dict[bytes, tuple[bytes, Route]] = {
            b"/v2/health/live": (b"GET", self._live),
            b"/v2/health/ready": (b"GET", self._ready),
            b"/v2": (b"GET", self._server_metadata),
            b"/v2/models/stats": (b"GET", self._statistics),
            b"/v2/repository/index": (b"POST", self._repository_index),
            b"/v1/models": (b"GET", self._v1_models),
            b"/metrics": (b"GET", self._metrics),
        }
        self._posts: dict[bytes, Route] = {}  # targets seen, without parsing them again
        name = plane.info.name.encode()
        for target in (
            b"/v2/models/%s/infer" % name,
            b"/v2/models/%s/versions/%s/infer" % (name, plane.info.version.encode()),
        ):
            self._posts[target] = self.infer
        self._posts[b"/v1/models/%s:predict" % name] = self.predict

    # ------------------------------------------------------------------ routing

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, or queue it."""
        if exchange.method == b"POST":
            route = self._posts.get(exchange.target)
            if route is not None:
                route(exchange)
                return
        try:
            method, route = self._find(exchange.target)
        except LookupError as error:
            self._error(exchange, 404, str(error.args[0]))
            return
        if exchange.method != method and not (method == b"GET" and exchange.method == b"HEAD"):
            given = exchange.method[:20].decode("latin-1")
            self._error(exchange, 405, f"want {method.decode()}, got {given}", b"Allow: %s\r\n" % method)
            return
        route(exchange)

    def _find(self, target: bytes) -> tuple[bytes, Route]:
        path = unquote_to_bytes(target.partition(b"?")[0])
        path = path.rstrip(b"/") or b"/"
        if path in self._routes:
            return self._routes[path]
        parts = path.split(b"/")[1:]
        if parts[:2] == [b"v2", b"models"] and len(parts) >= 3:
            return self._find_model(parts[2], parts[3:])
        if parts[:2] == [b"v1", b"models"] and len(parts) == 3:
            name, colon, verb = parts[2].partition(b":")
            self._check_name(name)
            if not colon:
                return b"GET", self._v1_status
            if verb == b"predict":
                return b"POST", self.predict
        raise LookupError(f"there is nothing at {path[:200].decode('utf-8', 'replace')}")

    def _find_model(self, name: bytes, rest: list[bytes]) -> tuple[bytes, Route]:
        self._check_name(name)
        info = self.plane.info
        if rest[:1] == [b"versions"] and len(rest) >= 2:
            if rest[1] != info.version.encode():
                shown = rest[1][:40].decode("utf-8", "replace")
                raise LookupError(f"model {info.name!r} has no version {shown!r} here: want {info.version!r}")
            rest = rest[2:]
        if len(rest) > 1 or (verb := b"".join(rest)) not in self._models:
            raise LookupError(f"there is nothing at …/{b'/'.join(rest)[:80].decode('utf-8', 'replace')} of a model")
        return self._models[verb]

    def _check_name(self, name: bytes) -> None:
        if name != self.plane.info.name.encode():
            shown = name[:80].decode("utf-8", "replace")
            raise LookupError(f"model {shown!r} is not served here: want {self.plane.info.name!r}")

    def _error(self, exchange: Exchange, status: int, message: str, headers: bytes = b"") -> None:
        self._requests["other", status] += 1
        exchange.reply_error(status, message, headers)

    def _json(self, exchange: Exchange, value: Any, status: int = 200) -> None:
        self._requests["other", status] += 1
        exchange.reply_json(status, value)

    def count_refused(self, status: int) -> None:
        """Count an answer that the HTTP layer gave by itself."""
        self._requests["http", status] += 1

    # ------------------------------------------------------------------ inference

    def infer(self, exchange: Exchange) -> None:
        """V2: `POST /v2/models/{name}[/versions/{version}]/infer`."""
        headers = exchange.headers
        try:
            header = headers.get(b"inference-header-content-length")
            body = exchange.body if b"content-encoding" not in headers else self._decompressed(exchange)
            request = self._codec.decode(body, None if header is None else _whole(header))
        except InputError as error:
            self.fail(exchange, "infer", error)
            return
        self._submit(InferJob(self, exchange, request.tensors, request))

    def predict(self, exchange: Exchange) -> None:
        """Rows in, labels and probabilities out: `POST /v1/models/{name}:predict`."""
        try:
            body = exchange.body if b"content-encoding" not in exchange.headers else self._decompressed(exchange)
            tensors = encode_rows(self.plane.signature, _instances(body))
        except InputError as error:
            self.fail(exchange, "predict", error)
            return
        self._submit(PredictJob(self, exchange, tensors))

    def _submit(self, job: HttpJob) -> None:
        exchange = job.exchange
        refusal = self.plane.submit(job, exchange.connection.waiting - 1)
        if refusal is None:
            exchange.on_abort = job.abort
        else:
            self._refuse(exchange, job.route, refusal)

    def send_tensors(self, exchange: Exchange, request: oip.InferRequest, outputs: dict[str, Any]) -> None:
        """Answer V2."""
        document, blobs = self._codec.encode(request, outputs)
        self._requests["infer", 200] += 1
        if blobs:
            body = b"".join((document, *blobs))
            exchange.reply_raw(self._binary_head(len(document), len(body)), body)
        else:
            exchange.reply(200, document)

    def send_answers(self, exchange: Exchange, outputs: dict[str, Any]) -> None:
        """Answer with labels and probabilities."""
        answers = decode_answers(self.plane.signature, outputs)
        self._requests["predict", 200] += 1
        exchange.reply(200, orjson.dumps({"predictions": answers}))

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
        self._requests[route, status] += 1
        exchange.reply_error(status, message, headers)

    def _decompressed(self, exchange: Exchange) -> bytes:
        encoding = exchange.headers[b"content-encoding"]
        if encoding == b"identity":
            return exchange.body
        return decompress(exchange.body, encoding.decode("latin-1"), self._max_body_bytes)

    def _binary_head(self, document_bytes: int, body_bytes: int) -> bytes:
        head = self._heads.get((document_bytes, body_bytes))
        if head is None:
            head = (
                b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n"
                % (_OCTETS, document_bytes, body_bytes)
            )
            if len(self._heads) < 1024:
                self._heads[document_bytes, body_bytes] = head
        return head

    # ------------------------------------------------------------------ documents

    def _live(self, exchange: Exchange) -> None:
        self._json(exchange, {"live": True})

    def _ready(self, exchange: Exchange) -> None:
        ready = self.plane.is_ready
        self._json(exchange, {"ready": ready}, 200 if ready else 503)

    def _model_ready(self, exchange: Exchange) -> None:
        ready = self.plane.is_ready
        self._json(exchange, {"name": self.plane.info.name, "ready": ready}, 200 if ready else 503)

    def _server_metadata(self, exchange: Exchange) -> None:
        self._json(exchange, oip.server_metadata(self._server_version))

    def _model_metadata(self, exchange: Exchange) -> None:
        info = self.plane.info
        self._json(exchange, oip.model_metadata(info.name, info.version, self.plane.signature))

    def _model_config(self, exchange: Exchange) -> None:
        self._json(exchange, oip.model_config(self.plane.info.name, self.plane.signature, self.plane.batcher.max_batch))

    def _statistics(self, exchange: Exchange) -> None:
        self._json(exchange, oip.statistics(self.plane.info.name, self.plane.info.version, self.plane.metrics))

    def _repository_index(self, exchange: Exchange) -> None:
        info = self.plane.info
        state = "READY" if self.plane.is_ready else "UNAVAILABLE"
        self._json(exchange, [{"name": info.name, "version": info.version, "state": state, "reason": ""}])

    def _v1_models(self, exchange: Exchange) -> None:
        self._json(exchange, {"models": [self.plane.info.name]})

    def _v1_status(self, exchange: Exchange) -> None:
        info = self.plane.info
        status = {"name": info.name, "version": info.version, "variant": info.variant, "ready": self.plane.is_ready}
        self._json(exchange, status)

    def _metrics(self, exchange: Exchange) -> None:
        info, admission = self.plane.info, self.plane.admission
        gauges = {
            "millrace_queue_requests": admission.waiting,
            "millrace_queue_limit": admission.limit,
            "millrace_connections": len(self.service.connections),
            "millrace_ready": int(self.plane.is_ready),
        }
        text = self.plane.metrics.render(info.name, info.version, gauges)
        self._requests["other", 200] += 1
        exchange.reply(200, text.encode(), _PROMETHEUS)


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
