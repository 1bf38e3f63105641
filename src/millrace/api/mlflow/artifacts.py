"""Artifacts through the server: list, up, down, delete; in parts where a file is large."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, BinaryIO, cast

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millrace.api import bodies
from millrace.api.mlflow import files, limits, requests
from millrace.api.mlflow.calls import JSON, Call, Tracking, answering, decoded, refuse_other_types
from millrace.api.mlflow.errors import unsupported
from millrace.api.mlflow.runs import stored_run
from millrace.api.mlflow.shapes import run_root
from millrace.api.mlflow.streams import receive_blob, send_file
from millrace.control import recorded
from millrace.core.errors import InputError, NotFoundError
from millrace.core.ports import Blobs
from millrace.core.types import UPLOADS, Artifact, ArtifactFile

MAX_PARTS = 10_000
ROOTS = ("/api/2.0/mlflow-artifacts", "/ajax-api/2.0/mlflow-artifacts")
_UPLOAD = msgspec.json.Decoder(requests.Upload, strict=False)
Respond = Callable[[Request], Awaitable[Response]]


def list_of_run(tracking: Tracking, body: requests.Listing) -> Any:
    """What is in a folder of a run's files."""
    run = stored_run(tracking, limits.run_id_of(body))
    folder = _folder(body.path)
    found = files.all_files(tracking.services, run.id)
    root = run_root(tracking.projects.of_key(run.project), run.id)
    return {"root_uri": root, "files": files.listing(found, folder, folder)}


def _folder(path: str | None) -> str:
    return limits.safe_path(path.rstrip("/")) if path and path.rstrip("/") else ""


def refuse_presigned(tracking: Tracking, body: requests.Presigned) -> Any:
    """Artifacts are proxied: the store behind has no address for clients."""
    if body.path:
        limits.safe_path(body.path)
    raise InputError("artifacts go through this server: it gives no URLs of the store behind it")


def artifact_routes(tracking: Tracking) -> list[Route]:
    """The routes that move bytes."""
    doors = _Doors(tracking)
    found: list[Route] = []
    for root in ROOTS:
        found += [
            Route(root + "/artifacts", answering(doors.list), methods=["GET"]),
            Route(root + "/artifacts/{path:path}", answering(doors.download), methods=["GET"]),
            Route(root + "/artifacts/{path:path}", answering(doors.upload), methods=["PUT"]),
            Route(root + "/artifacts/{path:path}", answering(doors.delete), methods=["DELETE"]),
            Route(root + "/mpu/create/{path:path}", answering(doors.create_upload), methods=["POST"]),
            Route(root + "/mpu/complete/{path:path}", answering(doors.complete_upload), methods=["POST"]),
            Route(root + "/mpu/abort/{path:path}", answering(doors.abort_upload), methods=["POST"]),
            Route(root + "/mpu/part/{upload}/{number:int}", answering(doors.upload_part), methods=["PUT"]),
            Route(root + "/presigned/{path:path}", answering(doors.presigned), methods=["GET"]),
        ]
    return [*found, Route("/get-artifact", answering(doors.download_of_run), methods=["GET"])]


class _Doors:
    """The endpoints. Each does its work as an operation of the table, in a thread."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    async def list(self, request: Request) -> Response:
        """What is in a folder below the artifact root; names are relative to it."""
        path = request.query_params.get("path", "").strip("/") if "path" in request.query_params else ""
        given = request.query_params.get("path", "")
        if given.startswith("/"):
            limits.safe_path(given)
        place = files.place_of(path) if path else files.Place(owner=files.SHARED_OWNER)

        def work() -> Any:
            return {"files": files.listing(files.all_files(self._tracking.services, place.owner), place.path, "")}

        return await self._perform("run.get", place.owner, work)

    async def download(self, request: Request) -> Response:
        """The bytes of a file; ranges are served."""
        return await self._send(files.place_of(request.path_params["path"]))

    async def download_of_run(self, request: Request) -> Response:
        """The bytes of a run's file, as MLflow's pages ask for them."""
        run_id = request.query_params.get("run_id") or request.query_params.get("run_uuid")
        path = limits.safe_path(limits.required(request.query_params.get("path"), "path"))
        return await self._send(files.Place(owner=limits.required(run_id, "run_id"), path=path))

    async def _send(self, place: files.Place) -> Response:
        def work() -> Response:
            artifact = files.find_file(self._tracking.services, place)
            return send_file(self._tracking.services.blobs.path(artifact.digest), posixpath.basename(place.path))

        return await self._perform("run.get", place.owner, work)

    async def upload(self, request: Request) -> Response:
        """Keep a file; the bytes are durable, then the record is."""
        place = files.place_of(request.path_params["path"])
        if not place.path:
            raise InputError("the path names a folder, not a file")
        await run_in_threadpool(self._tracking.dispatcher.check, "run.artifact", f"run:{place.owner}")
        artifact = await receive_blob(request, self._tracking.services.blobs)
        return await self._perform("run.artifact", place.owner, lambda: self._keep(place, artifact), place.path)

    async def delete(self, request: Request) -> Response:
        """Forget a file or a folder; what is not there is gone already."""
        place = files.place_of(request.path_params["path"])

        def work() -> None:
            recorded.drop_files(self._tracking.services, place.owner, place.path)

        return await self._perform("run.artifact", place.owner, work, place.path)

    async def presigned(self, request: Request) -> Response:
        """Not done: artifacts are proxied."""
        files.place_of(request.path_params["path"])
        raise unsupported("downloads by URLs of the store behind the server are not supported")

    # ------------------------------------------------------------------ in parts

    async def create_upload(self, request: Request) -> Response:
        """One URL for each part. Whoever knows the upload's id may send parts: it cannot be guessed."""
        self._target(request, body := await self._body(request))
        count = body.num_parts if body.num_parts is not None else 1
        if not 1 <= count <= MAX_PARTS:
            raise InputError(f"want 1 to {MAX_PARTS} parts, got {count}")
        upload = secrets.token_hex(24)
        root = str(request.base_url).rstrip("/") + ROOTS[0]
        credentials = [
            {"url": f"{root}/mpu/part/{upload}/{number}", "part_number": number, "headers": {}}
            for number in range(1, count + 1)
        ]
        return _json({"upload_id": upload, "credentials": credentials})

    async def upload_part(self, request: Request) -> Response:
        """Keep one part."""
        upload, number = request.path_params["upload"], request.path_params["number"]
        if not 1 <= number <= MAX_PARTS or len(upload) != 48:
            raise NotFoundError("there is no such upload")
        place = files.Place(owner=UPLOADS + upload, path=str(number))
        await run_in_threadpool(self._tracking.dispatcher.check, "run.log", f"run:{place.owner}")
        artifact = await receive_blob(request, self._tracking.services.blobs)
        answer = await self._perform("run.log", place.owner, lambda: self._keep(place, artifact))
        answer.headers["ETag"] = f'"{artifact.digest.removeprefix("sha256:")}"'
        return answer

    async def complete_upload(self, request: Request) -> Response:
        """Join the parts into the file."""
        target = self._target(request, body := await self._body(request))
        owner = UPLOADS + limits.required(body.upload_id, "upload_id")
        wanted = sorted((part.part_number or 0, (part.etag or "").strip('"')) for part in body.parts or ())

        def work() -> None:
            services = self._tracking.services
            stored = {int(file.path): file.artifact for file in services.records.find(ArtifactFile, {"owner": owner})}
            known = [(number, stored[number].digest.removeprefix("sha256:")) for number in sorted(stored)]
            if not wanted or wanted != known:
                raise InputError(f"the parts {[number for number, _ in wanted]} are not those that were sent")
            joined = _Joined(services.blobs, [stored[number].digest for number in sorted(stored)])
            self._keep(target, services.blobs.put(cast(BinaryIO, joined)))
            recorded.drop_files(services, owner, "")

        return await self._perform("run.artifact", target.owner, work, target.path)

    async def abort_upload(self, request: Request) -> Response:
        """Forget the parts."""
        self._target(request, body := await self._body(request))
        owner = UPLOADS + limits.required(body.upload_id, "upload_id")

        def work() -> None:
            recorded.drop_files(self._tracking.services, owner, "")

        return await self._perform("run.log", owner, work)

    def _target(self, request: Request, body: requests.Upload) -> files.Place:
        """The folder is in the URL, the file's name is the end of the client's own path."""
        name = posixpath.basename(limits.required(body.path, "path").replace("\\", "/"))
        return files.place_of(posixpath.join(request.path_params["path"].rstrip("/"), name))

    async def _body(self, request: Request) -> requests.Upload:
        data = await bodies.read_body(request)
        refuse_other_types(request, data)
        return decoded(_UPLOAD, data or b"{}")

    def _keep(self, place: files.Place, artifact: Artifact) -> None:
        file = ArtifactFile(
            id=place.id, created_at=self._tracking.services.clock.now(), owner=place.owner, path=place.path,
            artifact=artifact,
        )  # fmt: skip
        recorded.keep_file(self._tracking.services, file)

    async def _perform(self, operation: str, owner: str, work: Callable[[], Any], path: str = "") -> Response:
        def performed() -> Any:
            detail = {"path": path[:300]} if path else None
            return self._tracking.dispatcher.perform(operation, f"run:{owner}", lambda _: work(), detail)

        answer = await run_in_threadpool(performed)
        return answer if isinstance(answer, Response) else _json({} if answer is None else answer)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)


class _Joined:
    """Several blobs as one stream."""

    def __init__(self, blobs: Blobs, digests: list[str]) -> None:
        self._pieces = self._read(blobs, digests)

    @staticmethod
    def _read(blobs: Blobs, digests: list[str]) -> Iterator[bytes]:
        for digest in digests:
            with blobs.open(digest) as file:
                while piece := file.read(1 << 20):
                    yield piece

    def read(self, size: int = -1) -> bytes:
        """The next piece, which may be shorter; b"" at the end."""
        return next(self._pieces, b"")


_RUN: dict[str, Any] = {"noun": "run", "field": "run_id"}
CALLS = (
    Call(method="GET", path="/artifacts/list", operation="run.get", handler=list_of_run, request=requests.Listing,
         **_RUN),
    Call(method="POST", path="/artifacts/presigned-upload-url", operation="run.get", handler=refuse_presigned,
         request=requests.Presigned, **_RUN),
    Call(method="POST", path="/artifacts/presigned-download-url", operation="run.get", handler=refuse_presigned,
         request=requests.Presigned, **_RUN),
)  # fmt: skip
