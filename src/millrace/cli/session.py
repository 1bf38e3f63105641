"""What a command has: the transport, made on first use, and how to print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import click
import msgspec

from millrace.core.errors import MillraceError
from millrace.core.units import Share

EXIT_CODES: dict[str, int] = {
    "internal": 1,
    "spec.invalid": 2,
    "input.invalid": 2,
    "input.too_large": 2,
    "data.invalid": 2,
    "ref.not_found": 3,
    "record.conflict": 4,
    "stage.failed": 5,
    "stage.timeout": 5,
    "stage.out_of_memory": 5,
    "auth.required": 6,
    "auth.denied": 6,
    "approval.needed": 6,
    "extra.missing": 7,
    "artifact.corrupt": 8,
    "artifact.untrusted": 8,
    "capacity.none": 9,
    "capacity.disk_full": 9,
    "quota.exceeded": 9,
    "unavailable": 10,
    "deadline.exceeded": 10,
    "store.schema": 11,
    "run.cancelled": 130,
}


def plain(value: Any) -> Any:
    """A struct as JSON-able data."""
    return msgspec.to_builtins(value, enc_hook=lambda item: float(item) if isinstance(item, Share) else str(item))


class Session:
    """Shared by the commands of one invocation."""

    def __init__(self, open_transport: Callable[..., Any]) -> None:
        self._open_transport = open_transport
        self._transport: Any = None
        self._streams: list[Iterator[Any]] = []
        self.home: str | None = None
        self.embedded = False
        self.as_json = False

    @property
    def transport(self) -> Any:
        """The transport."""
        if self._transport is None:
            self._transport = self._open_transport(self.home, embedded=self.embedded)
        return self._transport

    def call(self, operation: str, /, **body: Any) -> Any:
        """Run an operation; absent arguments (None) take the operation's defaults."""
        return self.transport.call(operation, {key: value for key, value in body.items() if value is not None})

    def stream(self, operation: str, /, **body: Any) -> Iterator[Any]:
        """Run a streaming operation."""
        found = self.transport.stream(operation, {key: value for key, value in body.items() if value is not None})
        self._streams.append(found)
        return found

    def close(self) -> None:
        """End what still streams (its reader has gone), and let go of the home."""
        for stream in self._streams:
            if isinstance(stream, Generator):
                stream.close()
        self._streams = []
        if self._transport is not None:
            transport, self._transport = self._transport, None
            try:
                transport.close()
            except MillraceError as error:
                # What was promised is durable already; events that could not be sealed are sealed next time.
                click.echo(f"warning: {error.message}", err=True)

    def print_json(self, value: Any) -> None:
        """One JSON document on stdout."""
        click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))

    def fail(self, error: MillraceError) -> int:
        """Print an error for a person, or as JSON; its exit code."""
        if self.as_json:
            click.echo(json.dumps({"error": error.to_dict()}, indent=2, ensure_ascii=False, default=str))
        else:
            click.echo(f"error: {error.message}", err=True)
            log = error.details.get("log")
            if log:
                click.echo(f"  log:  {log}", err=True)
            if error.hint:
                click.echo(f"  hint: {error.hint}", err=True)
        return EXIT_CODES.get(error.code, 1)


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()
