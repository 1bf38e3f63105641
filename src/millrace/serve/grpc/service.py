"""The calls of `inference.GRPCInferenceService` over what HTTP serves: the same directory, guard, quotas and queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, unquote
from weakref import WeakKeyDictionary

import grpc
from google.protobuf.message import DecodeError

from millrace.core.errors import (
    ConflictError,
    DeadlineError,
    InputError,
    MillraceError,
    NotFoundError,
    UnavailableError,
)
from millrace.serve import documents
from millrace.serve.admission import Refusal
from millrace.serve.batching import RUN_ERRORS, Job
from millrace.serve.catalog import KEY_HEADER, Catalog
from millrace.serve.clients import Client
from millrace.serve.dataplane import DataPlane
from millrace.serve.grpc.codec import Asked, InferRequest, InferResponse, answer
from millrace.serve.grpc.messages import message_type
from millrace.serve.oip import Codec
from millrace.serve.revisions import Revisions

NAME = "inference.GRPCInferenceService"
Context = grpc.aio.ServicerContext[Any, Any]
_StreamResponse = message_type("ModelStreamInferResponse")
_Code = grpc.StatusCode
_CODES = {
    400: _Code.INVALID_ARGUMENT, 401: _Code.UNAUTHENTICATED, 403: _Code.PERMISSION_DENIED, 404: _Code.NOT_FOUND,
    409: _Code.FAILED_PRECONDITION, 429: _Code.RESOURCE_EXHAUSTED, 500: _Code.INTERNAL, 503: _Code.UNAVAILABLE,
    504: _Code.DEADLINE_EXCEEDED,
}  # fmt: skip
_MAX_STREAMED = 64  # requests of one stream that wait or run at once


class Failed(Exception):
    """A call ends with this: HTTP's status and a sentence."""

    def __init__(self, status: int, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class _InferJob(Job):
    __slots__ = ("answered",)
    answered: asyncio.Future[None]

    def done(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)


class Inferences:
    """Answers every method. For the event loop's thread.

    Args:
        catalog: HTTP's view of the directory; what it shares with gRPC is taken from it.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._directory = catalog, catalog.directory
        self._codecs: WeakKeyDictionary[DataPlane, Codec] = WeakKeyDictionary()
        self.in_flight = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """For a `grpc.aio` server."""
        methods: dict[str, Callable[[Any, Mapping[bytes, bytes]], Awaitable[Any] | Any]] = {
            "ServerLive": self._live, "ServerReady": self._ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._metadata, "ModelMetadata": self._model_metadata, "ModelConfig": self._config,
            "ModelStatistics": self._statistics, "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load, "RepositoryModelUnload": self._unload,
        }  # fmt: skip
        handlers = {name: grpc.unary_unary_rpc_method_handler(self._plain(name, method))
                    for name, method in methods.items()}  # fmt: skip
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self.infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream)
        return grpc.method_handlers_generic_handler(NAME, handlers)

    def _plain(self, name: str, method: Callable[[Any, Mapping[bytes, bytes]], Any]) -> Callable[..., Awaitable[bytes]]:
        request_type, response_type = message_type(f"{name}Request"), message_type(f"{name}Response")

        async def call(data: bytes, context: Context) -> bytes:
            try:
                request, headers = _parsed(request_type, data), _headers(context)
                self._check(name, request, headers)
                found = method(request, headers)
                fields = await found if asyncio.iscoroutine(found) else found
                return response_type(**fields).SerializeToString()
            except Failed as failed:
                await _abort(context, failed)
            except MillraceError as error:
                await _abort(context, failed_with(error))
            raise AssertionError("an aborted call does not go on")

        return call

    # ------------------------------------------------------------------ who asks

    def _check(self, method: str, request: Any, headers: Mapping[bytes, bytes]) -> None:
        """Ask the guard about the path that means the same over HTTP."""
        guard = self._catalog.service.guard
        if guard is None or method in ("ServerLive", "ServerReady"):
            return
        name = getattr(request, "name", "") or getattr(request, "model_name", "")
        path = f"/v2/models/{quote(name, safe='')}" if name else "/v2"
        denial = guard.check(path.encode(), headers)
        if denial is not None:
            raise Failed(denial.status, denial.message)

    def _client(self, context: Context, headers: Mapping[bytes, bytes]) -> Client | None:
        service = self._catalog.service
        if service.clients is None:
            return None
        if service.guard is not None:
            return service.clients.find(service.guard.who(headers))
        return service.clients.of_address(unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]"))

    def _visible(self, headers: Mapping[bytes, bytes]) -> list[Revisions]:
        guard = self._catalog.service.guard
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
        return documents.model_metadata(plane.info.name, versions, plane.signature)

    def _config(self, request: Any, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        plane = self._plane(request.name, request.version)
        return {"config": documents.model_config(plane.info.name, plane.signature, plane.batcher.max_batch)}

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
        is_guarded = self._catalog.service.guard is not None
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

    async def infer(self, data: bytes, context: Context) -> bytes:
        """`ModelInfer`."""
        self.in_flight += 1
        try:
            request = _parsed(InferRequest, data)
            response = await self._infer(request, len(data), context, _headers(context))
            return response.SerializeToString()
        except Failed as failed:
            await _abort(context, failed)
            raise AssertionError("an aborted call does not go on") from None
        finally:
            self.in_flight -= 1

    async def stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """`ModelStreamInfer`: answers in the order of the requests; one that fails does not end the stream."""
        headers = _headers(context)
        tasks: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_MAX_STREAMED)

        async def read() -> None:
            async for data in requests:
                await tasks.put(asyncio.create_task(self._streamed(data, context, headers)))
            await tasks.put(None)

        self.in_flight += 1
        reader = asyncio.create_task(read())
        try:
            while (task := await tasks.get()) is not None:
                yield await task
        finally:
            self.in_flight -= 1
            reader.cancel()
            while not tasks.empty():
                if (left := tasks.get_nowait()) is not None:
                    left.cancel()

    async def _streamed(self, data: bytes, context: Context, headers: Mapping[bytes, bytes]) -> bytes:
        id = ""
        try:
            request = _parsed(InferRequest, data)
            id = request.id
            response = await self._infer(request, len(data), context, headers)
            return _StreamResponse(infer_response=response).SerializeToString()
        except Failed as failed:
            return _StreamResponse(
                error_message=failed.message, infer_response=InferResponse(id=id)
            ).SerializeToString()

    async def _infer(self, request: Any, size_bytes: int, context: Context, headers: Mapping[bytes, bytes]) -> Any:
        self._check("ModelInfer", request, headers)
        began_ns = time.perf_counter_ns()
        try:
            plane = await self._find(request, headers)
        except MillraceError as error:
            raise failed_with(error) from None
        try:
            client = self._client(context, headers)
            refusal = plane.refusal(size_bytes, 0, client)
            if refusal is not None:
                raise await self._refused(plane, refusal)
            codec = self._codec(plane)
            asked = Asked(request, codec)
            job = _InferJob(asked.tensors, size_bytes)
            job.client = client
            job.deadline_ns = _deadline_ns(began_ns, context.time_remaining(), asked.timeout_us)
            await self._run(plane, job)
            response = answer(codec, asked, job)
            if asked.is_final_told:
                response.parameters["triton_final_response"].bool_param = True
        except Failed as failed:
            plane.metrics.requests["infer", failed.status] += 1
            raise
        except RUN_ERRORS as error:
            failed = failed_with(error)
            plane.metrics.requests["infer", failed.status] += 1
            raise failed from None
        plane.metrics.requests["infer", 200] += 1
        return response

    async def _run(self, plane: DataPlane, job: _InferJob) -> None:
        job.answered = asyncio.get_running_loop().create_future()
        refusal = plane.submit(job)
        if refusal is not None:
            raise await self._refused(plane, refusal)
        try:
            await job.answered
        except asyncio.CancelledError:  # the client is gone
            plane.cancel(job)
            raise
        if job.error is not None:
            raise job.error

    async def _refused(self, plane: DataPlane, refusal: Refusal) -> Failed:
        """The refusal, held back as HTTP's are."""
        turn = asyncio.Event()
        if self._catalog.service.pacer.hold(turn.set, plane.admission.hold_s):
            await turn.wait()
        return Failed(refusal.status, refusal.message, refusal.retry_after_s)

    async def _find(self, request: Any, headers: Mapping[bytes, bytes]) -> DataPlane:
        name = request.model_name
        try:
            endpoint = self._directory.find(name)
        except UnavailableError:
            repository = self._catalog.loading.repository
            if not repository.awaits(name):
                raise
            await repository.ensure(name)
            endpoint = self._directory.find(name)
        return endpoint.at(request.model_version) if request.model_version else endpoint.pick(headers.get(KEY_HEADER))

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


def _headers(context: Context) -> dict[bytes, bytes]:
    """Metadata as HTTP's headers."""
    return {
        key.encode(): value.encode() if isinstance(value, str) else value
        for key, value in context.invocation_metadata() or ()
    }


def _deadline_ns(began_ns: int, left_s: float | None, timeout_us: int) -> int:
    """The earlier of the call's deadline and of the request's parameter; 0: none.

    Example:
        >>> _deadline_ns(1000, 1e-3, 5), _deadline_ns(1000, None, 0)
        (6000, 0)
    """
    limits = [int(left_s * 1e9)] if left_s is not None and left_s < 86_400 else []
    limits += [timeout_us * 1000] if timeout_us else []
    return began_ns + max(1, min(limits)) if limits else 0


def failed_with(error: Exception) -> Failed:
    """How a call ends with an error: as over HTTP.

    Example:
        >>> failed_with(InputError("want a row")).status, failed_with(KeyError("x")).status
        (400, 500)
    """
    if not isinstance(error, MillraceError):
        return Failed(500, f"the model failed on this request: {type(error).__name__}: {error}"[:500])
    kinds = (
        (InputError, 400),
        (NotFoundError, 404),
        (ConflictError, 409),
        (DeadlineError, 504),
        (UnavailableError, 503),
    )
    return Failed(next((status for kind, status in kinds if isinstance(error, kind)), 500), error.message)


async def _abort(context: Context, failed: Failed) -> None:
    metadata = (("retry-after", str(failed.retry_after_s)),) if failed.retry_after_s else ()
    await context.abort(_CODES.get(failed.status, _Code.INTERNAL), failed.message, metadata)
