"""Which request means what: V2, predictions as rows, health and metrics over one data plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

from millrace.serve import documents
from millrace.serve.dataplane import DataPlane
from millrace.serve.exchange import Exchange
from millrace.serve.inference import Inference
from millrace.serve.service import Service

_PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"
Route = Callable[[Exchange], None]


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
        self._requests = plane.metrics.requests
        self.inference = inference = Inference(plane, max_body_bytes)
        self._models = {b"infer": (b"POST", inference.infer), b"ready": (b"GET", self._model_ready)}
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
            self._posts[target] = inference.infer
        self._posts[b"/v1/models/%s:predict" % name] = inference.predict

    # ------------------------------------------------------------------ routing

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, or queue it."""
        if exchange.head.method == b"POST":
            route = self._posts.get(exchange.head.target)
            if route is not None:
                exchange.head.route = route  # where it is known again
                route(exchange)
                return
        try:
            method, route = self._find(exchange.head.target)
        except LookupError as error:
            self._error(exchange, 404, str(error.args[0]))
            return
        if exchange.head.method != method and not (method == b"GET" and exchange.head.method == b"HEAD"):
            given = exchange.head.method[:20].decode("latin-1")
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
                return b"POST", self.inference.predict
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
        self._json(exchange, documents.server_metadata(self._server_version))

    def _model_metadata(self, exchange: Exchange) -> None:
        info = self.plane.info
        self._json(exchange, documents.model_metadata(info.name, info.version, self.plane.signature))

    def _model_config(self, exchange: Exchange) -> None:
        self._json(
            exchange, documents.model_config(self.plane.info.name, self.plane.signature, self.plane.batcher.max_batch)
        )

    def _statistics(self, exchange: Exchange) -> None:
        self._json(exchange, documents.statistics(self.plane.info.name, self.plane.info.version, self.plane.metrics))

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
        self._requests["other", 200] += 1
        exchange.reply(200, self.exposition().encode(), _PROMETHEUS)

    def exposition(self) -> str:
        """The model's metrics in Prometheus' text format."""
        info, admission = self.plane.info, self.plane.admission
        gauges = {
            "millrace_queue_requests": admission.waiting,
            "millrace_queue_limit": admission.limit,
            "millrace_connections": len(self.service.connections),
            "millrace_ready": int(self.plane.is_ready),
            "millrace_denied_total": guard.denied[info.name] if (guard := self.service.guard) is not None else 0,
        }
        return self.plane.metrics.render(info.name, info.version, gauges)
