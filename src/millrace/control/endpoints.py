"""Serving in the foreground: `millrace serve`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

from millrace.control.dispatch import handles
from millrace.control.models import resolve_model
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import InputError, SpecError
from millrace.core.operations import live as ops
from millrace.core.settings import SPEC_NAME
from millrace.core.spec import Monitor, Serve
from millrace.core.spec_errors import load_spec


@handles(ops.SERVE_ENDPOINT)
def serve_endpoint(services: Services, body: ops.ServeRequest) -> Iterator[ops.ServeEvent]:
    """Start the data plane as a child, watch its telemetry, write alerts; until Ctrl-C or SIGTERM."""
    check_loopback(body.host)
    version = resolve_model(services, body.model)
    serve, monitor = sections_of(services.home)
    return extras.load("millrace.control.supervise:supervise")(services, version, body, serve, monitor)


def check_loopback(host: str) -> None:
    """Only this machine, as long as nobody is asked who they are.

    Raises:
        InputError: The host is not loopback.

    Example:
        >>> check_loopback("127.0.0.1")
        >>> check_loopback("0.0.0.0")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: want a loopback address such as 127.0.0.1, got '0.0.0.0'
    """
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise InputError(
            f"want a loopback address such as 127.0.0.1, got {host!r}",
            hint="this version has no authentication: put a proxy that has it in front",
        )


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
