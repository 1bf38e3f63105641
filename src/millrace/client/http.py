"""The Transport over HTTP: the same operations, asked of a running server."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import httpx_sse
import msgspec

from millrace.core.errors import InputError, MillraceError, NotFoundError, UnavailableError, from_dict
from millrace.core.operations import Operation
from millrace.core.operations.table import OPERATIONS
from millrace.core.spec_errors import decode_hook

PREFIX = "/api/v1"
MSGPACK = "application/msgpack"
CONNECT_TIMEOUT_S = 5.0
# A server that is cut off says nothing: the kernel asks whether it is there, however long an answer takes.
_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 35_000}
ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _PROBES.items() if hasattr(socket, name)),
]
RETRIES = 3  # of the connection only: a request that may have arrived is never sent twice
_SSE_IDLE_S = 60.0
LOCAL_PATHS: dict[str, tuple[str, ...]] = {  # request fields that name a file or folder of the caller
    "run.submit": ("spec_path",),
    "run.plan": ("spec_path",),
    "run.artifact": ("path",),
    "model.register": ("path", "data"),
    "model.compress": ("path", "data", "to"),
    "model.export": ("to",),
}
RESUME_S = 20.0  # how long a broken stream waits for its server to come back


class HttpTransport:
    """Implements `core.ports.Transport`. Thread-safe.

    Args:
        url: The server, for example `http://127.0.0.1:7070`.
        token: What proves who is asking, where the server wants to know.
        ca_file: A file of certificates to trust, for a server whose own is signed by no public authority.

    Raises:
        InputError: The URL is not one of HTTP, the token is none, or `ca_file` holds no certificates.
    """

    def __init__(self, url: str, token: str = "", ca_file: str = "") -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"a server's URL must begin with http:// or https://, got {url!r}")
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/")  # shown in errors: without a password
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)  # an operation takes as long as it takes
        if not (token.isascii() and token.isprintable()):
            raise InputError("a token has ASCII characters alone: this is none", hint="copy it anew")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # to open the public authorities' certificates takes 30 ms, and over plain HTTP nobody's are looked at
        trusted = _trusting(ca_file) if ca_file or parsed.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        carrier = httpx.HTTPTransport(verify=trusted, retries=RETRIES, trust_env=False, socket_options=ALIVE)
        self._http = httpx.Client(base_url=parsed, timeout=timeout, transport=carrier, trust_env=False, headers=headers)

    def call(self, operation: str, body: Mapping[str, Any]) -> Any:
        """Ask for one operation.

        Raises:
            UnavailableError: The server cannot be reached.
            MillraceError: Whatever the operation raises there.
        """
        chosen = _find(operation)
        with reaching(self.url):
            answer = self._http.send(self._request(chosen, _with_absolute_paths(operation, body), MSGPACK))
        if answer.is_error:
            raise error_of(answer)
        return msgspec.msgpack.decode(answer.content, type=chosen.response, strict=False, dec_hook=decode_hook)

    def stream(self, operation: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """Ask for an operation that answers with a sequence; goes on after a broken line where it can."""
        chosen = _find(operation)
        return self._events(chosen, dict(body))

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def _events(self, chosen: Operation, body: dict[str, Any]) -> Iterator[Any]:
        cursor: int | None = None
        deadline = 0.0
        while True:
            try:
                with reaching(self.url):
                    for item in self._once(chosen, body):
                        deadline = 0.0
                        yield item
                return
            except _BrokenStreamError as broken:
                cursor = cursor if broken.cursor is None else broken.cursor
                if chosen.resume_field is None or cursor is None:
                    raise UnavailableError(f"{self.url} ended {chosen.name} before it was finished") from None
            except UnavailableError:  # it may be just restarting
                deadline = deadline or time.monotonic() + RESUME_S
                if chosen.resume_field is None or cursor is None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            body = {**body, chosen.resume_field: cursor}

    def _once(self, chosen: Operation, body: dict[str, Any]) -> Iterator[Any]:
        request = self._request(chosen, body, "text/event-stream")
        request.extensions["timeout"] = {**request.extensions["timeout"], "read": _SSE_IDLE_S}
        answer = self._http.send(request, stream=True)
        cursor: int | None = None
        try:
            if answer.is_error:
                answer.read()
                raise error_of(answer)
            for event in httpx_sse.EventSource(answer).iter_sse():
                if event.event == "end":
                    return
                if event.event == "error":
                    raise from_dict(msgspec.json.decode(event.data))
                cursor = int(event.id) if event.id else None
                yield msgspec.json.decode(event.data, type=chosen.response, dec_hook=decode_hook)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout):
            raise _BrokenStreamError(cursor) from None
        finally:
            answer.close()
        raise _BrokenStreamError(cursor)  # the server ended the line without saying that it was the end

    def _request(self, chosen: Operation, body: Mapping[str, Any], accept: str) -> httpx.Request:
        fields = msgspec.to_builtins(dict(body), builtin_types=(bytes,))
        path = chosen.path
        for name in list(fields):
            if f"{{{name}}}" in path:
                path = path.replace(f"{{{name}}}", quote(str(fields.pop(name)), safe="@:"))
        if "{" in path:
            raise InputError(f"{chosen.name} wants {path[path.index('{') :]}")
        headers = {"Accept": accept}
        if chosen.method in ("POST", "PUT", "PATCH"):
            headers["Content-Type"] = MSGPACK
            return self._http.build_request(
                chosen.method, PREFIX + path, headers=headers, content=msgspec.msgpack.encode(fields)
            )
        query = {name: str(value).lower() if isinstance(value, bool) else value
                 for name, value in fields.items() if value is not None}  # fmt: skip
        return self._http.build_request(chosen.method, PREFIX + path, headers=headers, params=query)

    def __repr__(self) -> str:
        return f"HttpTransport({self.url!r})"


class _BrokenStreamError(Exception):
    """The line was cut; `cursor` is the id of the last event."""

    def __init__(self, cursor: int | None) -> None:
        super().__init__()
        self.cursor = cursor


class reaching:
    """Turns what httpx says of an unreachable server into our error."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, httpx.TransportError):
            raise UnavailableError(
                f"the server {self._url} cannot be reached: {error or type(error).__name__}", hint=_way_on(error)
            ) from error


def _way_on(error: Exception) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "if that is your server: name the certificate of its authority, MILLRACE_CA_FILE=cert.pem"
    return "is it running? `millrace up` starts one; unset MILLRACE_URL to work without"


def _trusting(ca_file: str) -> ssl.SSLContext | bool:
    if not ca_file:
        return True
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{ca_file} cannot be read as certificates: {error}", hint="want a PEM file") from None
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a server's own certificate, whoever signed it, will do
    return context


def _with_absolute_paths(operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The server has another working directory. References to uploads stay as they are."""
    fields = dict(body)
    for name in LOCAL_PATHS.get(operation, ()):
        value = fields.get(name)
        if isinstance(value, str) and not value.startswith(("blob:sha256:", "tree:sha256:")):
            fields[name] = str(Path(value).absolute())
    return fields


def _find(operation: str) -> Operation:
    chosen = OPERATIONS.get(operation)
    if chosen is None:
        raise NotFoundError(f"there is no operation {operation!r}")
    return chosen


def error_of(answer: httpx.Response) -> MillraceError:
    """The error in a problem document; anything else did not come from a Millrace."""
    try:
        value = msgspec.json.decode(answer.content)
    except msgspec.MsgspecError:
        value = None
    if isinstance(value, dict) and "code" in value:
        return from_dict({"message": value.get("detail", ""), **value})
    return UnavailableError(f"{answer.url} answered {answer.status_code}, and not as a Millrace does")
