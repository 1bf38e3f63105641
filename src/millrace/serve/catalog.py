"""Which model a request names: many models at one address, each with the routes that it would have alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from millrace.serve import documents
from millrace.serve.access import model_of, path_of
from millrace.serve.dataplane import DataPlane
from millrace.serve.exchange import Exchange
from millrace.serve.routes import Routes
from millrace.serve.service import Service

_PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"


class Catalog:
    """The handler of a `Service` with any number of models. For the event loop's thread.

    Args:
        server_version: For the metadata.
        max_body_bytes: Also of a body that comes compressed.
    """

    def __init__(self, server_version: str, max_body_bytes: int) -> None:
        self.service: Service  # set by the server, which needs the handler first
        self._version, self._max_body_bytes = server_version, max_body_bytes
        self._models: dict[bytes, Routes] = {}
        self._absent: dict[bytes, str] = {}
        self.is_told = False  # what to serve; before that, nobody's model is unknown
        self._refused = 0
        self._routes: dict[bytes, tuple[bytes, Callable[[Exchange], None]]] = {
            b"/v2/health/live": (b"GET", self._live),
            b"/v2/health/ready": (b"GET", self._ready),
            b"/v2": (b"GET", self._metadata),
            b"/v2/models/stats": (b"GET", self._statistics),
            b"/v2/repository/index": (b"POST", self._index),
            b"/v1/models": (b"GET", self._list),
            b"/metrics": (b"GET", self._metrics),
        }

    def put(self, plane: DataPlane) -> DataPlane | None:
        """Serve a model from the next request on; the one that it replaces, whose requests still run."""
        name = plane.info.name.encode()
        old = self._models.get(name)
        routes = Routes(plane, self._version, self._max_body_bytes)
        routes.service = self.service
        self._models[name] = routes
        self._absent.pop(name, None)
        self.service.forget_heads()  # which lead to the routes of the old one
        return old.plane if old is not None else None

    def remove(self, name: str) -> DataPlane | None:
        """Serve a model no longer."""
        self._absent.pop(name.encode(), None)
        old = self._models.pop(name.encode(), None)
        self.service.forget_heads()
        return old.plane if old is not None else None

    def excuse(self, name: str, why: str) -> None:
        """Say of a model that is to be served why it is not (yet), for as long as there is none."""
        self._absent[name.encode()] = why

    def excused(self) -> list[str]:
        """The models of which that was said."""
        return [name.decode() for name in self._absent]

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, or queue it."""
        path = path_of(exchange.head.target)
        found = self._routes.get(path)
        if found is None:
            routes = self._models.get(model_of(path))
            if routes is None:
                self._unknown(exchange, path)
            else:
                routes.handle(exchange)
            return
        method, route = found
        if exchange.head.method == method or (method == b"GET" and exchange.head.method == b"HEAD"):
            route(exchange)
        else:
            given = exchange.head.method[:20].decode("latin-1")
            exchange.reply_error(405, f"want {method.decode()}, got {given}", b"Allow: %s\r\n" % method)

    def count_refused(self, status: int) -> None:
        """Count an answer that the HTTP layer gave by itself."""
        self._refused += 1

    def _unknown(self, exchange: Exchange, path: bytes) -> None:
        self._refused += 1
        name = model_of(path)
        if not name:
            exchange.reply_error(404, f"there is nothing at {path[:200].decode('utf-8', 'replace')}")
            return
        why = self._absent.get(name, "" if self.is_told else "it is just starting")
        if why:
            text = f"model {name[:80].decode('utf-8', 'replace')!r} is not served at this moment: {why}"
            exchange.reply_error(503, text, b"Retry-After: 1\r\n")
            return
        known = ", ".join(sorted(one.decode() for one in self._models)) or "none"
        exchange.reply_error(
            404, f"model {name[:80].decode('utf-8', 'replace')!r} is not served here: want one of {known}"
        )

    # ------------------------------------------------------------------ documents

    @property
    def shared(self) -> list[bytes]:
        """The paths that concern all models."""
        return list(self._routes)

    def _planes(self, exchange: Exchange) -> list[DataPlane]:
        """Those that whoever asks may call."""
        guard, headers = self.service.guard, exchange.head.headers
        planes = [self._models[name].plane for name in sorted(self._models)]
        return planes if guard is None else [one for one in planes if guard.sees(headers, one.info.name)]

    def _live(self, exchange: Exchange) -> None:
        exchange.reply_json(200, {"live": True})

    def _ready(self, exchange: Exchange) -> None:
        ready = self.is_told and all(routes.plane.is_ready for routes in self._models.values())
        exchange.reply_json(200 if ready else 503, {"ready": ready})

    def _metadata(self, exchange: Exchange) -> None:
        exchange.reply_json(200, documents.server_metadata(self._version))

    def _statistics(self, exchange: Exchange) -> None:
        parts: list[Any] = []
        for plane in self._planes(exchange):
            parts += documents.statistics(plane.info.name, plane.info.version, plane.metrics)["model_stats"]
        exchange.reply_json(200, {"model_stats": parts})

    def _index(self, exchange: Exchange) -> None:
        exchange.reply_json(200, [
            {"name": plane.info.name, "version": plane.info.version,
             "state": "READY" if plane.is_ready else "UNAVAILABLE", "reason": ""}
            for plane in self._planes(exchange)
        ])  # fmt: skip

    def _list(self, exchange: Exchange) -> None:
        exchange.reply_json(200, {"models": [plane.info.name for plane in self._planes(exchange)]})

    def _metrics(self, exchange: Exchange) -> None:
        texts = [self._models[plane.info.name.encode()].exposition() for plane in self._planes(exchange)]
        exchange.reply(200, merge_expositions(texts).encode(), _PROMETHEUS)


def merge_expositions(texts: list[str]) -> str:
    """Several models' metrics as one document: each family's help and type stand once, before its samples.

    Example:
        >>> one, two = ("# TYPE a gauge\\na{m=\\"x\\"} 1\\n", "# TYPE a gauge\\na{m=\\"y\\"} 2\\n")
        >>> print(merge_expositions([one, two]), end="")
        # TYPE a gauge
        a{m="x"} 1
        a{m="y"} 2
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            elif line:
                samples.setdefault(family, []).append(line)
    lines = [line for family in samples for line in (*heads.get(family, []), *samples[family])]
    return "\n".join(lines) + "\n" if lines else ""
