"""A server on another machine: what an operation names by path travels as bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from millrace.client.http import MSGPACK, PREFIX, HttpTransport, error_of, reaching
from millrace.core.errors import ConflictError, CorruptError, InputError, NotFoundError
from millrace.core.operations.registry import ExportResponse, OpenModelResponse
from millrace.core.operations.runs import RunEvent, RunView
from millrace.core.project_files import project_files
from millrace.core.types import Artifact, ModelVersion, TreeEntry

CHUNK_BYTES = 1 << 20
PAST_SERVER_BYTES = 16 << 20  # smaller files are quicker through it
UPLOAD_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class RemoteTransport(HttpTransport):
    """Implements `core.ports.Transport` for a server that does not share this machine's files.

    Files that a request names are uploaded first, and the request then names the upload; models that an
    answer names by folder are downloaded into a cache and verified. Equal bytes travel once.
    """

    def call(self, operation: str, body: Mapping[str, Any]) -> Any:
        """Ask for one operation."""
        localized: dict[str, Callable[[dict[str, Any]], Any]] = {
            "run.get": self._run,
            "model.open": self._open,
            "model.export": self._export,
            "model.compress": self._refuse_compress,
        }
        if operation in localized:
            return localized[operation](dict(body))
        return super().call(operation, self._with_uploads(operation, dict(body)))

    def stream(self, operation: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """Ask for an operation that answers with a sequence."""
        if operation == "endpoint.serve":
            raise InputError(
                "`serve` would serve on the server's machine, and only as long as this command lasts",
                hint=f"millrace deploy {body.get('model', 'MODEL')} --endpoint NAME",
            )
        for item in super().stream(operation, body):
            if isinstance(item, RunEvent) and item.report_path:
                item = msgspec.structs.replace(item, report_path=f"{self.url}/runs/{body['run']}")
            yield item

    def fetch_page(self, url: str) -> Path:
        """A page of the server as a file here, fetched with this connection's token."""
        with reaching(self.url):
            answer = self._http.get(url, headers={"Accept": "text/html"})
        if answer.is_error:
            raise NotFoundError(f"{url} answers {answer.status_code}", hint="open it in a browser: it says why")
        path = _cache() / "pages" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.part")
        new.write_bytes(answer.content)
        os.replace(new, path)
        return path

    def upload(self, path: Path) -> Artifact:
        """Store a file on the server."""
        digest, size = _digest_of(path), path.stat().st_size
        if size >= PAST_SERVER_BYTES:
            stored = self._upload_past_server(path, digest, size)
            if stored is not None:
                return stored
        with reaching(self.url), path.open("rb") as file:
            answer = self._http.post(
                f"{PREFIX}/blobs", content=iter(lambda: file.read(CHUNK_BYTES), b""), headers={"Accept": MSGPACK}
            )
        if answer.is_error:
            raise error_of(answer)
        stored = msgspec.msgpack.decode(answer.content, type=Artifact)
        if stored.digest != digest:
            raise CorruptError(f"{path} was changed while it was uploaded: {digest} became {stored.digest}")
        return stored

    def _upload_past_server(self, path: Path, digest: str, size: int) -> Artifact | None:
        """Straight into the object store, where the server's blobs are in one that this machine reaches."""
        wanted = {"digest": digest, "size_bytes": size}
        place = self.call("blob.presign", wanted)
        if place is None:
            return None
        try:
            with path.open("rb") as file, httpx.Client(timeout=UPLOAD_TIMEOUT, trust_env=False) as store:
                # Nothing of this connection's own headers: they hold the token.
                answer = store.request(
                    place.method, place.url, content=iter(lambda: file.read(CHUNK_BYTES), b""),
                    headers={**place.headers, "Content-Length": str(size)},
                )  # fmt: skip
        except httpx.TransportError:
            return None  # a store that only the server reaches
        return None if answer.is_error else self.call("blob.confirm", wanted)

    def upload_folder(self, folder: Path) -> Artifact:
        """Store a folder's files and their listing on the server."""
        entries = []
        for path in project_files(folder):
            stored = self.upload(path)
            place = path.relative_to(folder).as_posix()
            entries.append(TreeEntry(path=place, digest=stored.digest, size_bytes=stored.size_bytes))
        return super().call("tree.put", {"entries": entries})

    def download(self, digest: str, path: Path) -> None:
        """A blob as a new file, verified.

        Raises:
            CorruptError: The bytes have another digest.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.part")
        found = hashlib.sha256()
        with reaching(self.url), self._http.stream("GET", f"{PREFIX}/blobs/{quote(digest, safe=':')}") as answer:
            if answer.is_error:
                answer.read()
                raise error_of(answer)
            with new.open("wb") as file:
                for part in answer.iter_raw(CHUNK_BYTES):
                    found.update(part)
                    file.write(part)
        if f"sha256:{found.hexdigest()}" != digest:
            new.unlink()
            raise CorruptError(f"{self.url} sent other bytes than {digest} has")
        os.replace(new, path)

    def _with_uploads(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        if operation in ("run.submit", "run.plan"):
            spec = Path(body["spec_path"]).absolute()
            if not spec.is_file():
                raise NotFoundError(f"there is no file {spec}", hint="`millrace init` writes a spec")
            body["spec_path"] = f"tree:{self.upload_folder(spec.parent).digest}/{spec.name}"
        elif operation in ("run.artifact", "model.register"):
            for name in ("path", "data"):
                if body.get(name) is not None:
                    body[name] = self._reference(Path(body[name]).absolute())
        return body

    def _reference(self, path: Path) -> str:
        if path.is_dir():
            return f"tree:{self.upload_folder(path).digest}/."
        if not path.is_file():
            raise NotFoundError(f"there is no file or folder {path}")
        return f"blob:{self.upload(path).digest}/{path.name}"

    def _run(self, body: dict[str, Any]) -> RunView:
        """A run; its report is the page of the server, not a path of the server's machine."""
        view: RunView = super().call("run.get", body)
        return view if view.report_path is None else msgspec.structs.replace(
            view, report_path=f"{self.url}/runs/{view.run.id}/report"
        )  # fmt: skip

    def _open(self, body: dict[str, Any]) -> OpenModelResponse:
        version = self._version(body["model"])
        folder = _cache() / "bundles" / version.bundle.digest.replace(":", "-")
        if not folder.is_dir():
            new = folder.with_name(f"{folder.name}.{os.getpid()}")
            self._fetch_bundle(version, new)
            try:
                new.rename(folder)
            except OSError:  # another process was quicker
                shutil.rmtree(new)
        return OpenModelResponse(
            name=version.name, number=version.number, folder=str(folder), digest=version.bundle.digest,
            variant=version.chosen_variant,
        )  # fmt: skip

    def _export(self, body: dict[str, Any]) -> ExportResponse:
        version = self._version(body["model"])
        target = Path(body["to"]).absolute()
        if target.is_dir() and any(target.iterdir()) and not (target / "model.onnx").is_file():
            raise ConflictError(
                f"{target} is not empty and not an earlier export", hint="name an empty or a new folder"
            )
        self._fetch_bundle(version, target)
        beside = {
            "MODEL_CARD.md": version.card,
            "signature.json": version.signature,
            "measurements.json": version.measurements,
        }
        for name, artifact in beside.items():
            if artifact is not None:
                self.download(artifact.digest, target / name)
        files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
        return ExportResponse(folder=str(target), files=files)

    def _version(self, reference: str) -> ModelVersion:
        version: ModelVersion = super().call("model.get", {"model": reference}).version
        if version.format != "bundle":
            raise InputError(f"{version.name} v{version.number} is kept as it was logged, and is never loaded")
        return version

    def _fetch_bundle(self, version: ModelVersion, folder: Path) -> None:
        for entry in super().call("tree.get", {"digest": version.bundle.digest}):
            self.download(entry.digest, folder / entry.path)

    def _refuse_compress(self, body: dict[str, Any]) -> Any:
        raise InputError(
            "compressing a file needs no server: it measures the machine that it runs on",
            hint=f"unset MILLRACE_URL and run `millrace compress {body.get('path', '')}` again",
        )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace"


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
