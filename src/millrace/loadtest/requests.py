"""The requests of a load test: where they go, and rows in them."""

from __future__ import annotations

import http.client
import math
import ssl
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, cast
from urllib.parse import quote, urlsplit

import numpy as np
import orjson

from millrace.core.errors import DeniedError, InputError, NotFoundError, UnavailableError
from millrace.core.types import Struct
from millrace.formats.signature import Dtype, TensorSpec
from millrace.loadtest.client import Target
from millrace.serve.tensors import DATATYPES, to_bytes

BODIES = ("binary", "json", "rows")
DISTINCT = 256
_DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
_TIMEOUT_S = 10.0


class Address(Struct, frozen=True, kw_only=True):
    """A model on a server."""

    host: str
    port: int
    is_tls: bool
    model: str
    token: str = ""

    @property
    def shown(self) -> str:
        """As a URL."""
        return f"http{'s' if self.is_tls else ''}://{self.host}:{self.port}/v2/models/{self.model}"


def trust(ca_file: str) -> ssl.SSLContext:
    """Whom to believe over TLS.

    Raises:
        InputError: The file holds no certificates.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{ca_file} cannot be read as certificates: {error}", hint="want a PEM file") from None
    if ca_file:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a server's own certificate will do
    return context


def find_address(url: str, token: str, tls: ssl.SSLContext | None) -> Address:
    """The model that a URL means: `http://host:port`, with `/v2/models/NAME…` or `/v1/models/NAME…` behind it.

    Args:
        url: Without a model's name the server must serve one alone.
        token: Of whoever asks; may be empty.
        tls: Whom to believe.

    Raises:
        InputError: It is no such URL, or the server serves several models.
        UnavailableError: The server does not answer.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"want an endpoint's name or a URL such as http://127.0.0.1:8080, got {url!r}")
    is_tls = parts.scheme == "https"
    try:
        port = parts.port or (443 if is_tls else 80)
    except ValueError as error:
        raise InputError(f"{url!r}: {error}") from None
    address = Address(host=parts.hostname, port=port, is_tls=is_tls, model="", token=token)
    steps = parts.path.strip("/").split("/")
    if len(steps) >= 3 and steps[0] in ("v1", "v2") and steps[1] == "models":
        name = steps[2].partition(":")[0]
    elif steps == [""]:
        served = ask(address, "/v1/models", tls).get("models", [])
        if len(served) != 1:
            raise InputError(f"{url} serves {len(served)} models: {', '.join(served[:8])}", hint="add /v2/models/NAME")
        name = served[0]
    else:
        raise InputError(f"{url!r}: want nothing or /v2/models/NAME behind the port")
    return Address(host=parts.hostname, port=port, is_tls=is_tls, model=name, token=token)


def ask(address: Address, path: str, tls: ssl.SSLContext | None) -> dict[str, Any]:
    """A JSON document of the server.

    Raises:
        DeniedError: The token is missing, unknown, or may not.
        NotFoundError: There is nothing at the path.
        UnavailableError: No answer, or another one.
    """
    place = f"{address.host}:{address.port}"
    kind: Any = http.client.HTTPSConnection if address.is_tls else http.client.HTTPConnection
    options = {"context": tls} if address.is_tls else {}
    connection = kind(address.host, address.port, timeout=_TIMEOUT_S, **options)
    try:
        connection.request("GET", path, headers=_authorization(address))
        answer = connection.getresponse()
        data = answer.read(1 << 24)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{place} does not answer: {error}", hint="is it served? `millrace endpoints`") from None
    finally:
        connection.close()
    if answer.status in (401, 403):
        raise DeniedError(f"{place} answers {answer.status} to {path}: {_text(data)}", hint="--token-env NAME")
    if answer.status == 404:
        raise NotFoundError(f"{place}{path}: {_text(data)}", hint="`millrace endpoints` lists what is served")
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        document = None
    if answer.status != 200 or not isinstance(document, dict):
        raise UnavailableError(f"{place} answers {answer.status} to {path}: {_text(data)}")
    return document


def _text(data: bytes) -> str:
    return data[:200].decode("utf-8", "replace")


def _authorization(address: Address) -> dict[str, str]:
    if not (address.token.isascii() and address.token.isprintable()):
        raise InputError("a token has ASCII characters alone: this is none", hint="copy it anew")
    return {"Authorization": f"Bearer {address.token}"} if address.token else {}


def tensors_of(address: Address, tls: ssl.SSLContext | None) -> list[TensorSpec]:
    """What the model takes, by its metadata.

    Raises:
        UnavailableError: The metadata is not what the protocol says.
        InputError: The model reads BF16.
    """
    document = ask(address, f"/v2/models/{quote(address.model, safe='')}", tls)
    try:
        if any(one["datatype"] == "BF16" for one in document["inputs"]):
            raise InputError(f"{address.shown} reads BF16, which numpy lacks: a load test cannot send it")
        return [
            TensorSpec(name=one["name"], dtype=cast(Dtype, _DTYPES[one["datatype"]]), shape=list(one["shape"]))
            for one in document["inputs"]
        ]
    except (KeyError, TypeError) as error:
        raise UnavailableError(f"{address.shown} has metadata that cannot be used: {error!r}") from None


def random_tensors(specs: Sequence[TensorSpec], rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows that the model's input takes, and that mean nothing.

    Example:
        >>> spec = TensorSpec(name="x", dtype="float32", shape=[-1, 3])
        >>> random_tensors([spec], 2)["x"].shape
        (2, 3)
    """
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for spec in specs:
        shape = (rows, *(max(size, 1) for size in spec.shape[1:]))
        if spec.dtype == "string":
            texts = random.choice(np.array(["a", "b", "c"], dtype=object), math.prod(shape))
            found[spec.name] = texts.reshape(shape)
        elif spec.dtype in ("float32", "float64"):
            found[spec.name] = random.random(shape).astype(spec.dtype)
        else:
            found[spec.name] = random.integers(0, 2, shape).astype(spec.dtype)
    return found


def tensor_bodies(tensors: Mapping[str, np.ndarray], each: int, kind: str) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Bodies of V2 requests and their headers, with so many rows each, from the first row on.

    Args:
        tensors: The rows.
        each: Rows of a request.
        kind: `binary` or `json`.
    """
    count = len(next(iter(tensors.values())))
    for start in range(0, max(count - each, 0) + 1, each):
        places = [(start + k) % count for k in range(each)]
        part = {name: values[places] for name, values in tensors.items()}
        yield _binary(part) if kind == "binary" else _json(part)


def _binary(part: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    blobs = {name: to_bytes(values) for name, values in part.items()}
    inputs = [
        {**_described(name, values), "parameters": {"binary_data_size": len(blobs[name])}}
        for name, values in part.items()
    ]
    document = orjson.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}})
    return document + b"".join(blobs.values()), {
        "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(document)),
    }  # fmt: skip


def _json(part: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    inputs = [{**_described(name, values), "data": values.reshape(-1).tolist()} for name, values in part.items()]
    return orjson.dumps({"inputs": inputs}), {"Content-Type": "application/json"}


def _described(name: str, values: np.ndarray) -> dict[str, Any]:
    dtype = "string" if values.dtype == object else str(values.dtype)
    return {"name": name, "shape": list(values.shape), "datatype": DATATYPES[dtype]}


def row_bodies(rows: Sequence[Mapping[str, Any]], each: int) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Bodies of `:predict` requests, with so many rows each."""
    for start in range(0, max(len(rows) - each, 0) + 1, each):
        part = [rows[(start + k) % len(rows)] for k in range(each)]
        yield orjson.dumps({"instances": part}), {"Content-Type": "application/json"}


def make_target(
    address: Address, tls: ssl.SSLContext | None, *, rows: Sequence[Mapping[str, Any]] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None, each: int = 1, body: str | None = None,
    name: str = "",
) -> Target:  # fmt: skip
    """The requests of a load test.

    Args:
        address: The model.
        tls: Whom to believe.
        rows: By column; sent as they are where `tensors` is absent.
        tensors: The rows as tensors; without both they are random.
        each: Rows of a request.
        body: One of `BODIES`; None: the quickest that the rows can be sent as.
        name: What the endpoint is called in the report; its URL where absent.

    Raises:
        InputError: The rows cannot be sent so.
    """
    if each < 1:
        raise InputError(f"--rows: want at least 1 row a request, got {each}")
    if rows is None and tensors is None and body != "rows":
        tensors = random_tensors(tensors_of(address, tls), DISTINCT * each)
    kind = body or ("binary" if tensors is not None else "rows")
    if kind == "rows" and not rows:
        raise InputError("--body rows wants rows by column", hint="--input FILE or --dataset NAME")
    if kind != "rows" and tensors is None:
        raise InputError(
            f"--body {kind} wants tensors, and a URL does not say which column goes where",
            hint="name the endpoint instead of its URL, or leave --body out",
        )
    model = quote(address.model, safe="")
    if kind == "rows":
        path, bodies = f"/v1/models/{model}:predict", row_bodies(rows or [], each)
    else:
        path, bodies = f"/v2/models/{model}/infer", tensor_bodies(tensors or {}, each, kind)
    return Target(
        name=name or address.shown, host=address.host, port=address.port, tls=tls if address.is_tls else None,
        requests=[_request(address, path, *one) for one in islice(bodies, DISTINCT)],
    )  # fmt: skip


def _request(address: Address, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    shown = f"[{address.host}]" if ":" in address.host else address.host
    lines = [f"POST {path} HTTP/1.1", f"Host: {shown}:{address.port}", f"Content-Length: {len(body)}"]
    every = chain(headers.items(), _authorization(address).items())
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in every), "", ""]).encode() + body
