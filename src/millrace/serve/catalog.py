"""HTTP's view of a directory: which route a request means, for any number of endpoints at one address."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from millrace.core.errors import MillraceError, NotFoundError, UnavailableError
from millrace.serve import documents
from millrace.serve.access import PREFIX, model_of, path_of
from millrace.serve.admission import Refusal
from millrace.serve.clients import Client
from millrace.serve.dataplane import DataPlane
from millrace.serve.exchange import Exchange
from millrace.serve.loading import FixedModels, Loading, Repository
from millrace.serve.metrics import server_lines
from millrace.serve.page import ASSET_HEADERS, ASSETS, HEADERS, HTML_TYPE, asset, list_page
from millrace.serve.peers import Peers, Snapshot, added_statistics, added_texts
from millrace.serve.revisions import Directory, Revisions
from millrace.serve.routes import Route, Routes
from millrace.serve.service import Service

_PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"
KEY_HEADER = b"x-routing-key"  # requests with the same one go to the same revision
_PREDICTING = frozenset({b"infer", b"predict"})


class Catalog:
    """The handler of a `Service`. For the event loop's thread.

    Args:
        directory: What is served.
        server_version: For the metadata.
        max_body_bytes: Also of a body that comes compressed.
    """

    def __init__(self, directory: Directory, server_version: str, max_body_bytes: int) -> None:
        self.directory = directory
        self.service: Service  # set by the server, which needs the handler first
        self.server_version, self._max_body_bytes = server_version, max_body_bytes
        self._models: dict[DataPlane, Routes] = {}  # of what is served
        self._answered: Counter[int] = Counter()  # without a model, by status
        self.loading = Loading(FixedModels(directory), self._error)  # another where not all models are loaded
        self._targets: dict[bytes, Route] = {}  # of POSTs that always mean the same
        self.peers: Peers | None = None  # of the processes that serve the same at the same port
        self._asking: set[asyncio.Task[None]] = set()
        directory.changed.append(self._forget)
        self._routes: dict[bytes, tuple[bytes, Callable[[Exchange], None]]] = {
            b"/v2/health/live": (b"GET", self._live),
            b"/v2/health/ready": (b"GET", self._ready),
            b"/v2": (b"GET", self._metadata),
            b"/v2/models/stats": (b"GET", self._statistics),
            b"/v2/repository/index": (b"POST", self._index),
            b"/v1/models": (b"GET", self._list),
            b"/metrics": (b"GET", self._metrics),
            b"/": (b"GET", self._page),
            **{path: (b"GET", self._asset) for path in ASSETS},
        }

    def refuse_early(self, target: bytes, size_bytes: int, held: int, client: Client | None, /) -> Refusal | None:
        """Why a body need not be read, decided by its request's head."""
        name = model_of(path_of(target)).decode("utf-8", "replace")
        if name not in self.directory:
            return None
        return self.directory.find(name).primary.refusal(size_bytes, held, client)

    def serve_repository(self, repository: Repository) -> None:
        """Models are loaded and unloaded by this from now on."""
        self.loading = Loading(repository, self._error)

    def _forget(self) -> None:
        """What was served under a name may be served by another model now."""
        self._targets.clear()
        served = {plane for endpoint in self.directory for plane in endpoint.planes}
        self._models = {plane: routes for plane, routes in self._models.items() if plane in served}
        self.service.forget_heads()

    # ------------------------------------------------------------------ routing

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, or queue it."""
        head = exchange.head
        known = self._targets.get(head.target)
        if known is not None and head.method == b"POST":
            head.route = known  # where the head is known again
            known(exchange)
            return
        try:
            path = path_of(head.target)
            method, route = self._routes.get(path) or self._find(path, exchange)
        except MillraceError as error:
            if isinstance(error, UnavailableError) and self.loading.hold(exchange, self.handle):
                return
            is_missing = isinstance(error, NotFoundError)
            self._error(
                exchange, 404 if is_missing else 503, error.message, b"" if is_missing else b"Retry-After: 1\r\n"
            )
            return
        if head.method != method and not (method == b"GET" and head.method == b"HEAD"):
            given = head.method[:20].decode("latin-1")
            self._error(exchange, 405, f"want {method.decode()}, got {given}", b"Allow: %s\r\n" % method)
            return
        route(exchange)

    def _find(self, path: bytes, exchange: Exchange) -> tuple[bytes, Route]:
        """The route of a model's path.

        Raises:
            NotFoundError: There is none.
            UnavailableError: There will be.
        """
        if path.startswith(PREFIX) and (change := self.loading.route(path, exchange, self.service.guard)) is not None:
            return b"POST", change
        name = model_of(path)
        if not name:
            raise _nothing_at(path)
        endpoint = self.directory.find(name.decode("utf-8", "replace"))
        parts = path.split(b"/")
        if parts[1] == b"v1":
            verb, rest, plane = parts[3].partition(b":")[2], parts[4:], None
        else:
            rest, plane = parts[4:], None
            if rest[:1] == [b"versions"] and len(rest) >= 2:
                plane, rest = endpoint.at(rest[1].decode("utf-8", "replace")), rest[2:]
            verb, rest = b"".join(rest[:1]), rest[1:]
        always = plane or (endpoint.primary if endpoint.is_single or verb not in _PREDICTING else None)
        routes = self._routes_of(always or endpoint.pick(exchange.head.headers.get(KEY_HEADER)), endpoint)
        if verb == b"stats" and parts[1] == b"v2" and not rest:
            version = None if plane is None else plane.info.version
            return b"GET", lambda exchange: self._statistics_of([endpoint], exchange, version)
        found = (routes.v1 if parts[1] == b"v1" else routes.v2).get(verb)
        if found is None or rest:
            raise _nothing_at(path)
        if always is not None and verb in _PREDICTING and len(self._targets) < 1024:
            self._targets[exchange.head.target] = found[1]
        return found

    def _routes_of(self, plane: DataPlane, endpoint: Revisions) -> Routes:
        routes = self._models.get(plane)
        if routes is None:
            routes = self._models[plane] = Routes(plane, self._max_body_bytes)
        routes.versions = list(endpoint.all)
        routes.inference.is_pinned = endpoint.is_single
        return routes

    def count_refused(self, status: int) -> None:
        """Count an answer that the HTTP layer gave by itself."""
        self._answered[status] += 1

    def _error(self, exchange: Exchange, status: int, message: str, headers: bytes) -> None:
        self._answered[status] += 1
        exchange.reply_error(status, message, headers)

    def _json(self, exchange: Exchange, value: Any, status: int = 200) -> None:
        self._answered[status] += 1
        exchange.reply_json(status, value)

    # ------------------------------------------------------------------ documents

    @property
    def shared(self) -> list[bytes]:
        """The paths that concern all models."""
        return list(self._routes)

    def _visible(self, exchange: Exchange) -> list[Revisions]:
        """What whoever asks may call."""
        guard, headers = self.service.guard, exchange.head.headers
        return [one for one in self.directory if guard is None or guard.sees(headers, one.name)]

    def _live(self, exchange: Exchange) -> None:
        self._json(exchange, {"live": True})

    def _ready(self, exchange: Exchange) -> None:
        ready = self.directory.is_ready
        self._json(exchange, {"ready": ready}, 200 if ready else 503)

    def _metadata(self, exchange: Exchange) -> None:
        self._json(exchange, documents.server_metadata(self.server_version))

    def _statistics(self, exchange: Exchange) -> None:
        self._statistics_of(self._visible(exchange), exchange)

    def _statistics_of(self, endpoints: list[Revisions], exchange: Exchange, version: str | None = None) -> None:
        names = [endpoint.name for endpoint in endpoints]

        def reply(snapshots: list[Snapshot]) -> None:
            models = added_statistics([one.statistics.get(name, []) for name in names for one in snapshots])
            wanted = [model for model in models if version in (None, model["version"])]
            self._json(exchange, {"model_stats": wanted})

        self._ask(reply)

    def _index(self, exchange: Exchange) -> None:
        guard, headers = self.service.guard, exchange.head.headers
        wants_ready = documents.wants_ready(exchange.body)
        if wants_ready is None:
            self._error(exchange, 400, 'want {"ready": true}, {"ready": false} or no body', b"")
            return
        rows = [row for row in self.loading.repository.index() if not wants_ready or row["state"] == "READY"]
        self._json(exchange, [row for row in rows if guard is None or guard.sees(headers, row["name"])])

    def _list(self, exchange: Exchange) -> None:
        self._json(exchange, {"models": [endpoint.name for endpoint in self._visible(exchange)]})

    def _page(self, exchange: Exchange) -> None:
        self._answered[200] += 1
        page = list_page([endpoint.name for endpoint in self._visible(exchange)])
        exchange.reply(200, page.encode(), HTML_TYPE, HEADERS)

    def _asset(self, exchange: Exchange) -> None:
        found = asset(path_of(exchange.head.target))
        self._answered[200] += 1
        exchange.reply(200, found.data, found.media_type, ASSET_HEADERS)

    def _metrics(self, exchange: Exchange) -> None:
        self._answered[200] += 1
        names = [*(endpoint.name for endpoint in self._visible(exchange)), ""]

        def reply(snapshots: list[Snapshot]) -> None:
            texts = [added_texts([one.endpoints.get(name, "") for one in snapshots]) for name in names]
            exchange.reply(200, merge_expositions(texts).encode(), _PROMETHEUS)

        self._ask(reply)

    def _ask(self, reply: Callable[[list[Snapshot]], None]) -> None:
        """Call `reply` with what has been counted by each process that serves at this port."""
        peers = self.peers
        if peers is None:
            reply([self.snapshot()])
            return

        async def ask() -> None:
            reply(await peers.ask())

        task = asyncio.get_running_loop().create_task(ask())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def snapshot(self) -> Snapshot:
        """What this process has counted."""
        guard, log = self.service.guard, self.service.access_log
        denied = Counter[str]() if guard is None else guard.denied
        texts = {"": server_lines(self._answered, len(self.service.connections), 0 if log is None else log.dropped)}
        statistics = dict[str, list[dict[str, Any]]]()
        for endpoint in self.directory:
            name, planes = endpoint.name, endpoint.planes
            texts[name] = merge_expositions(
                [self._routes_of(plane, endpoint).exposition(denied[name]) for plane in planes]
            )
            statistics[name] = [model for plane in planes for model in self._routes_of(plane, endpoint).statistics()]
        return Snapshot(endpoints=texts, statistics=statistics)


def _nothing_at(path: bytes) -> NotFoundError:
    return NotFoundError(f"there is nothing at {path[:200].decode('utf-8', 'replace')}")


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
