"""The calls of `inference.GRPCInferenceService` over what HTTP serves: the same directory, guard, quotas and queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError

from millrace.core.errors import UnavailableError
from millrace.serve import documents
from millrace.serve.admission import Refusal
from millrace.serve.batching import RUN_ERRORS, Job
from millrace.serve.catalog import KEY_HEADER, Catalog
from millrace.serve.clients import Client
from millrace.serve.dataplane import DataPlane
from millrace.serve.grpc.calls import Call, Request, StreamedCall
from millrace.serve.grpc.codec import Asked, InferRequest, Repeated, Repeats, answer
from millrace.serve.grpc.heads import CallHead, Failed, failed_with, read_head
from millrace.serve.grpc.http2 import Connection, Stream
from millrace.serve.grpc.messages import message_type
from millrace.serve.oip import Codec
from millrace.serve.revisions import Revisions

NAME = "inference.GRPCInferenceService"
_INFER, _STREAM = f"/{NAME}/ModelInfer".encode(), f"/{NAME}/ModelStreamInfer".encode()
_ANSWERED = ("infer", 200)
_PATHS = {  # of the methods that HTTP has elsewhere than below the model's own path
    "RepositoryModelLoad": "/v2/repository/models/{}/load", "RepositoryModelUnload": "/v2/repository/models/{}/unload",
}  # fmt: skip
Method = Callable[[Any, Mapping[bytes, bytes]], Awaitable[dict[str, Any]] | dict[str, Any]]


class InferJob(Job):
    """A job that answers a call, or a message of a stream; all is set by `Inferences`."""

    __slots__ = ("asked", "codec", "plane", "request")
    plane: DataPlane
    codec: Codec
    asked: Asked
    request: Request

    def abort(self) -> None:
        """The client is gone."""
        self.plane.cancel(self)

    def done(self) -> None:
        """Answer."""
        error = self.error
        if error is None:
            try:
                message = answer(self.codec, self.asked, self)
            except RUN_ERRORS as caught:  # outputs that are not the signature's
                error = caught
            else:
                self.plane.metrics.requests[_ANSWERED] += 1
                self.request.reply(message)
                return
        failed = failed_with(error)
        self.plane.metrics.requests["infer", failed.status] += 1
        self.request.fail(failed)


class Inferences:
    """Answers every method. For the event loop's thread.

    Args:
        catalog: HTTP's view of the directory; what it shares with gRPC is taken from it.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._directory, self._service = catalog, catalog.directory, catalog.service
        self._codecs: WeakKeyDictionary[DataPlane, Codec] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._repeats = Repeats()
        self._directory.changed.append(self._repeats.clear)
        methods: dict[str, Method] = {
            "ServerLive": self._live, "ServerReady": self._ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._metadata, "ModelMetadata": self._model_metadata, "ModelConfig": self._config,
            "ModelStatistics": self._statistics, "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load, "RepositoryModelUnload": self._unload,
        }  # fmt: skip
        self._methods: dict[bytes, Callable[[Call, bytes], None]] = {
            f"/{NAME}/{name}".encode(): self._plain(name, method) for name, method in methods.items()
        }
        self._methods |= {_INFER: self.infer, _STREAM: self.infer}

    def connect(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self._service, self._read_head, self._stream)

    def _read_head(self, fields: list[tuple[bytes, bytes]]) -> CallHead:
        return read_head(fields, self._service, self._methods)

    def _stream(self, connection: Connection, id: int, head: Any) -> Stream:
        return (StreamedCall if head.target == _STREAM and not head.refusal else Call)(connection, id, head, self)

    def call(self, call: Call, message: bytes) -> None:
        """Answer the message of a call."""
        self._methods[call.head.target](call, message)

    def _plain(self, name: str, method: Method) -> Callable[[Call, bytes], None]:
        request_type, response_type = message_type(f"{name}Request"), message_type(f"{name}Response")

        def call(call: Call, message: bytes) -> None:
            headers = call.head.headers
            try:
                request = _parsed(request_type, message)
                self._check(name, getattr(request, "name", "") or getattr(request, "model_name", ""), headers)
                found = method(request, headers)
            except Failed as failed:
                call.fail(failed)
            except RUN_ERRORS as error:
                call.fail(failed_with(error))
            else:
                if isinstance(found, dict):
                    reply(call, found)
                else:
                    self._begin(wait(call, found), call)

        def reply(call: Call, fields: dict[str, Any]) -> None:
            self._service.refused(200)
            call.reply(response_type(**fields).SerializeToString())

        async def wait(call: Call, found: Awaitable[dict[str, Any]]) -> None:
            reply(call, await found)

        return call

    def _begin(self, work: Any, request: Request) -> None:
        """Do what takes a while; an error of it is the request's."""

        async def run() -> None:
            try:
                await work
            except Failed as failed:
                request.fail(failed)
            except RUN_ERRORS as error:
                request.fail(failed_with(error))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ who asks

    def _check(self, method: str, name: str, headers: Mapping[bytes, bytes]) -> None:
        """Ask the guard about the path that means the same over HTTP."""
        guard = self._service.guard
        if guard is None or method in ("ServerLive", "ServerReady"):
            return
        within = _PATHS.get(method, "/v2/models/{}")
        path = within.format(quote(name, safe="")) if name else "/v2"
        denial = guard.check(path.encode(), headers)
        if denial is not None:
            raise Failed(denial.status, denial.message)

    def _client(self, request: Request) -> Client | None:
        service = self._service
        if service.clients is None:
            return None
        if service.guard is None:
            return service.clients.of_address(request.connection.peer)
        head = request.head
        if head.client is None:
            head.client = service.clients.find(service.guard.who(head.headers))
        return head.client

    def _visible(self, headers: Mapping[bytes, bytes]) -> list[Revisions]:
        guard = self._service.guard
        return [one for one in self._directory if guard is None or guard.sees(headers, one.name)]

    # ------------------------------------------------------------------ documents

    def _plane(self, name: str, version: str) -> DataPlane:
        endpoint = self._directory.find(name)
        return endpoint.at(version) if version else endpoint.primary

    def _live(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        return {"live": True}

    def _ready(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        return {"ready": self._directory.is_ready}

    def _model_ready(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        try:
            return {"ready": self._plane(request.name, request.version).is_ready}
        except UnavailableError:
            return {"ready": False}

    def _metadata(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        return documents.server_metadata(self._catalog.server_version)

    def _model_metadata(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        plane = self._plane(request.name, request.version)
        versions = list(self._directory.find(request.name).all)
        return documents.model_metadata(plane.info.name, versions, plane.signature, plane.platform)

    def _config(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        plane = self._plane(request.name, request.version)
        max_batch = plane.batcher.max_batch
        return {"config": documents.model_config(plane.info.name, plane.signature, max_batch, plane.platform)}

    def _statistics(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        if request.version:
            planes = [self._plane(request.name, request.version)]
        elif request.name:
            planes = self._directory.find(request.name).planes
        else:
            planes = [plane for endpoint in self._visible(headers) for plane in endpoint.planes]
        return {"model_stats": [
            documents.statistics(plane.info.name, plane.info.version, plane.metrics)["model_stats"][0]
            for plane in planes
        ]}  # fmt: skip

    def _index(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        visible = {endpoint.name for endpoint in self._visible(headers)}
        is_guarded = self._service.guard is not None
        rows = self._catalog.loading.repository.index()
        return {"models": [
            row for row in rows
            if (not is_guarded or row["name"] in visible) and (not request.ready or row["state"] == "READY")
        ]}  # fmt: skip

    async def _load(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        await self._catalog.loading.repository.load(request.model_name)
        return {}

    async def _unload(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        await self._catalog.loading.repository.unload(request.model_name)
        return {}

    # ------------------------------------------------------------------ inference

    def early(self, call: Call, beginning: bytes, size: int) -> bool:
        """Whether a large `ModelInfer` was refused by its beginning, where its model's name stands."""
        name = name_of(beginning) if call.head.target == _INFER else None
        if name is None:
            return False
        try:
            self._check("ModelInfer", name, call.head.headers)
        except Failed as failed:
            call.fail(failed)
            return True
        if name not in self._directory:
            return False
        plane = self._directory.find(name).primary
        refusal = plane.refusal(size, len(call.connection.streams) - 1, self._client(call))
        if refusal is not None:
            self._refuse(call, plane, refusal, size)
        return refusal is not None

    def infer(self, request: Request, message: bytes) -> None:
        """`ModelInfer`, or a message of `ModelStreamInfer`."""
        known = self._repeats.find(message)
        try:
            if known is not None:
                repeated, data = known
                self._check("ModelInfer", repeated.name, request.head.headers)
                job = InferJob(None, len(message), repeated.packing, data)
                self._submit(request, repeated.plane, repeated.asked, job)
                return
            asked = _parsed(InferRequest, message)
            request.request_id = asked.id
            self._check("ModelInfer", asked.model_name, request.head.headers)
            plane = self._find(asked.model_name, asked.model_version, request.head.headers)
            if plane is None:
                self._begin(self._awaited(request, asked, message), request)
            else:
                self._decode(request, plane, asked, message)
        except Failed as failed:
            request.fail(failed)
        except RUN_ERRORS as error:
            request.fail(failed_with(error))

    async def _awaited(self, request: Request, asked: Any, message: bytes) -> None:
        """Once its model is loaded."""
        await self._catalog.loading.repository.ensure(asked.model_name)
        plane = self._find(asked.model_name, asked.model_version, request.head.headers)
        assert plane is not None
        self._decode(request, plane, asked, message)

    def _find(self, name: str, version: str, headers: Mapping[bytes, bytes]) -> DataPlane | None:
        """Which plane is to answer; None: its model will be loaded now."""
        try:
            endpoint = self._directory.find(name)
        except UnavailableError:
            if self._catalog.loading.repository.awaits(name):
                return None
            raise
        return endpoint.at(version) if version else endpoint.pick(headers.get(KEY_HEADER))

    def _decode(self, request: Request, plane: DataPlane, message: Any, data: bytes) -> None:
        refusal = plane.refusal(len(data), len(request.connection.streams) - 1, self._client(request))
        if refusal is not None:
            self._refuse(request, plane, refusal, len(data))
            return
        codec = self._codec(plane)
        try:
            asked = Asked(message, codec)
        except RUN_ERRORS as error:
            request.info = plane.info
            failed = failed_with(error)
            plane.metrics.requests["infer", failed.status] += 1
            request.fail(failed)
            return
        job = InferJob(asked.tensors, len(data))
        if codec.packing is not None and (message.model_version or self._directory.find(message.model_name).is_single):
            self._repeats.learn(message, data, Repeated(message.model_name, plane, codec.packing, asked))
        self._submit(request, plane, asked, job)

    def _submit(self, request: Request, plane: DataPlane, asked: Asked, job: InferJob) -> None:
        """Queue a job that will answer, or refuse it."""
        request.request_id, request.info = asked.id, plane.info
        request.waiting = job
        if self._service.access_log is not None:
            request.job = job
        job.plane, job.codec, job.asked, job.request = plane, self._codec(plane), asked, request
        job.client = self._client(request)
        job.deadline_ns = deadline_ns(request.began_ns, request.call_head.timeout_ns, asked.timeout_us)
        refusal = plane.submit(job, len(request.connection.streams) - 1)
        if refusal is not None:
            request.waiting = None
            self._refuse(request, plane, refusal, job.size_bytes)

    def _refuse(self, request: Request, plane: DataPlane, refusal: Refusal, size_bytes: int) -> None:
        """The refusal, held back as HTTP's are."""
        request.info = plane.info
        failed = Failed(refusal.status, refusal.message, refusal.retry_after_s)

        def send() -> None:
            plane.metrics.requests["infer", failed.status] += 1
            request.fail(failed)

        if not self._service.pacer.hold(send, plane.admission.hold_s, size_bytes):
            send()

    def _codec(self, plane: DataPlane) -> Codec:
        codec = self._codecs.get(plane)
        if codec is None:
            codec = self._codecs[plane] = Codec(plane.info.name, plane.info.version, plane.signature)
        return codec


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Failed(400, f"the message is not a {kind.DESCRIPTOR.name}") from None


def name_of(beginning: bytes) -> str | None:
    """The model's name, where a request's first bytes tell it.

    Example:
        >>> name_of(InferRequest(model_name="digits", id="7").SerializeToString()), name_of(b"")
        ('digits', None)
    """
    if len(beginning) < 2 or beginning[0] != 0x0A or beginning[1] > 0x7F or len(beginning) < 2 + beginning[1]:
        return None
    return beginning[2 : 2 + beginning[1]].decode("utf-8", "replace")


def deadline_ns(began_ns: int, timeout_ns: int, timeout_us: int) -> int:
    """The earlier of the call's deadline and of the request's parameter; 0: none.

    Example:
        >>> deadline_ns(1000, 1_000_000, 5), deadline_ns(1000, 0, 0)
        (6000, 0)
    """
    if not timeout_us:
        return began_ns + timeout_ns if timeout_ns else 0
    return began_ns + min(timeout_ns or timeout_us * 1000, timeout_us * 1000)
