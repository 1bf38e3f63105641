"""One door: validate, authorise, run, audit. Every transport and every command comes through here."""

from __future__ import annotations

import getpass
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from millrace.control.authorisation import acting_principal, authorise, work_scope, working_in
from millrace.control.rates import Rates
from millrace.control.services import Services
from millrace.core.errors import InputError, MillraceError, NotFoundError
from millrace.core.operations import Operation
from millrace.core.operations.table import OPERATIONS
from millrace.core.principals import Principal
from millrace.core.spec_errors import decode_hook
from millrace.core.types import Event

Handler = Callable[[Services, Any], Any]
T = TypeVar("T")
_HANDLERS: dict[str, Handler] = {}


def handles(operation: Operation) -> Callable[[Handler], Handler]:
    """Mark a function `(services, body) -> response` as the handler of an operation."""

    def mark(handler: Handler) -> Handler:
        if operation.name in _HANDLERS:
            raise ValueError(f"{operation.name} has a handler already")
        _HANDLERS[operation.name] = handler
        return handler

    return mark


def handler_names() -> set[str]:
    """The operations that have a handler."""
    return set(_HANDLERS)


def local_principal() -> str:
    """The opaque actor id of the person at this machine."""
    try:
        return f"local:{getpass.getuser()}"
    except (OSError, KeyError):
        return "local:unknown"


class Dispatcher:
    """The in-process transport (`core.ports.Transport`). Thread-safe.

    Args:
        services: What handlers may use.
        principal: Who is asking where no door has found out; the actor of every write.
    """

    def __init__(self, services: Services, principal: str | None = None) -> None:
        self._services = services
        self._principal = Principal(id=principal or local_principal())
        self._rates = Rates()

    def call(self, operation: str, body: Mapping[str, Any], *, strict: bool = True) -> Any:
        """Run one operation. Without `strict`, numbers and booleans may be texts, as in a URL's query.

        Raises:
            InputError: The request does not have the operation's shape.
            MillraceError: Whatever the handler raises.
        """
        chosen, request = self._admit(operation, body, strict)
        return self._run(chosen, request)

    def stream(self, operation: str, body: Mapping[str, Any], *, strict: bool = True) -> Iterator[Any]:
        """Run one streaming operation; its answers as they come. What is wrong with the request raises at once."""
        chosen, request = self._admit(operation, body, strict)
        return self._answers(chosen, self._run(chosen, request))

    def _answers(self, chosen: Operation, answers: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from answers
        except MillraceError as error:
            raise self._told(error) from None
        except Exception as error:
            raise self._internal(chosen, error) from error

    def perform(self, operation: str, subject: str, work: Callable[[Services], T], detail: Any = None) -> T:
        """Let a foreign protocol (MLflow, pages) do `work` as the operation it amounts to.

        The same admission, audit and handling of errors as `call`; only the shapes are the protocol's own.

        Args:
            operation: A name of the operation table, for example `run.log`.
            subject: What is acted on, for example `run:4f…`.
            work: Called with the services.
            detail: Kept with the audit event of a write.

        Raises:
            MillraceError: Whatever the work raises.
        """
        chosen = OPERATIONS.get(operation)
        if chosen is None:
            raise NotFoundError(f"there is no operation {operation!r}")
        try:
            where = self._admitted(chosen, None)
            with working_in(where):
                answer = work(self._services.scoped(where))
        except MillraceError as error:
            self._record(chosen, subject, detail, error.code)
            raise self._told(error) from None
        except Exception as error:
            raise self._internal(chosen, error) from error
        self._record(chosen, subject, detail, "ok")
        return answer

    def _told(self, error: MillraceError) -> MillraceError:
        """The error as whoever asks may see it: somebody elsewhere learns no path of this machine."""
        if acting_principal() is not None:
            place = str(self._services.home)
            error.message = error.message.replace(place, "this home")
            error.hint = error.hint.replace(place, "this home")
            error.details = {key: value for key, value in error.details.items() if place not in str(value)}
        return error

    def _admitted(self, operation: Operation, request: Any) -> frozenset[str]:
        """Authorised, and within the rate of its project."""
        where = authorise(self._services, self._acting, operation, request)
        if acting_principal() is not None:
            self._rates.admit(self._services, where)
        return where

    @property
    def _acting(self) -> Principal:
        return acting_principal() or self._principal

    def check(self, operation: str, subject: str) -> None:
        """Refuse before a body is received what would be refused after it.

        Raises:
            DeniedError: Whoever asks may not do the operation anywhere.
        """
        chosen = OPERATIONS[operation]
        try:
            authorise(self._services, self._acting, chosen, None)
        except MillraceError as error:
            self._record(chosen, subject, None, error.code)
            raise self._told(error) from None

    @property
    def services(self) -> Services:
        """The home that operations work on; inside one, as little of it as it may see."""
        where = work_scope()
        return self._services if where is None else self._services.scoped(where)

    def close(self) -> None:
        """Seal what was appended and let go of the home."""
        self._services.close()

    def _admit(self, name: str, body: Mapping[str, Any], strict: bool) -> tuple[Operation, Any]:
        operation = OPERATIONS.get(name)
        if operation is None:
            raise NotFoundError(f"there is no operation {name!r}")
        try:
            return operation, msgspec.convert(dict(body), operation.request, strict=strict, dec_hook=decode_hook)
        except msgspec.ValidationError as error:
            raise InputError(f"{name}: {error}", hint="see docs/reference/cli.md for its arguments") from None

    def _run(self, operation: Operation, request: Any) -> Any:
        try:
            where = self._admitted(operation, request)
            with working_in(where):
                answer = _HANDLERS[operation.name](self._services.scoped(where), request)
        except MillraceError as error:
            self._audit(operation, request, error.code)
            raise self._told(error) from None
        except Exception as error:
            raise self._internal(operation, error) from error
        self._audit(operation, request, "ok", answer)
        return answer

    def _internal(self, operation: Operation, error: Exception) -> MillraceError:
        """Keep the traceback in a file; people get one line and where it is."""
        path = self._services.home / "logs" / "internal.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{operation.name}\n{''.join(traceback.format_exception(error))}\n")
        text = f"{operation.name} failed in a way that it should not: {type(error).__name__}"
        if acting_principal() is not None:
            return MillraceError(text, hint="its owner finds the reason in the server's log")
        return MillraceError(f"{text}: {error}", details={"log": str(path)})

    def _audit(self, operation: Operation, request: Any, outcome: str, answer: Any = None) -> None:
        detail = msgspec.to_builtins(request)
        for name in operation.hidden_fields:
            if detail.get(name) is not None:
                detail[name] = "…"
        self._record(operation, operation.subject(request, answer), detail, outcome)

    def _record(self, operation: Operation, subject: str, detail: Any, outcome: str) -> None:
        """Writes and denials are events; reads are not."""
        if not (operation.is_write and operation.is_audited) and outcome != "auth.denied":
            return
        if outcome != "ok" and not self._services.is_used:
            return  # a refusal does not make a home where there was none
        event = Event(
            at=self._services.clock.now(), actor=self._acting.id, verb=operation.name, subject=subject,
            detail={"outcome": outcome, "request": msgspec.to_builtins(detail)},
        )  # fmt: skip
        with self._services.records.transaction() as transaction:
            transaction.append(event)
