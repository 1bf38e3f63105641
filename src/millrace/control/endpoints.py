"""Serving in the foreground: `millrace serve`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from millrace.control.dispatch import handles
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.addresses import loopback_address
from millrace.core.errors import NotFoundError, SpecError
from millrace.core.operations import live as ops
from millrace.core.settings import SPEC_NAME
from millrace.core.spec import Monitor, Serve
from millrace.core.spec_errors import load_spec
from millrace.core.types import Alias, Endpoint


@handles(ops.SERVE_ENDPOINT)
def serve_endpoint(services: Services, body: ops.ServeRequest) -> Iterator[ops.ServeEvent | None]:
    """Start the data plane as a child, watch its telemetry, write alerts; until Ctrl-C or SIGTERM."""
    if not (body.tls_cert and (body.tls_client_ca or body.token_file)):
        loopback_address(body.host)  # refused before anything is started
    serve, monitor = sections_of(services.home)
    return extras.load("millrace.control.supervise:supervise")(services, body, serve, monitor)


@handles(ops.PREDICT)
def address_of(services: Services, body: ops.NameRequest) -> ops.EndpointAddress:
    """Where to call an endpoint."""
    endpoint = services.records.get(Endpoint, body.name)
    if endpoint is None or not endpoint.url:
        raise NotFoundError(f"no endpoint {body.name[:80]!r} is served", hint="`millrace endpoints` lists them")
    url = endpoint.url
    return ops.EndpointAddress(
        endpoint=endpoint.name, state=endpoint.state, predict=f"{url}/v1/models/{endpoint.name}:predict",
        infer=f"{url}/v2/models/{endpoint.name}/infer", wants_token=url.startswith("https:"),
    )  # fmt: skip


def wanted_number(services: Services, endpoint: Endpoint) -> int:
    """The version that an endpoint is to serve: with an alias, whatever that points to."""
    if endpoint.alias is not None:
        alias = services.records.get(Alias, f"{endpoint.model}/{endpoint.alias}")
        if alias is not None:
            return alias.number
    return endpoint.number


def calibrations_of(home: Path) -> Path:
    """Where it is kept how models are best called on this machine."""
    return home / "cache" / "calibrations"


def captures_of(home: Path) -> Path:
    """Where requests are kept with their answers, a folder for each endpoint."""
    return home / "captured"


def sections_of(home: Path) -> tuple[Serve, Monitor]:
    """`serve` and `monitor` of the spec beside the home; the defaults where it is absent or broken."""
    path = home.parent / SPEC_NAME
    if path.is_file():
        try:
            spec, _ = load_spec(path)
        except SpecError:
            return Serve(), Monitor()
        return spec.serve, spec.monitor
    return Serve(), Monitor()
