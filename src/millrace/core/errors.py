"""The one error tree. Every class has a stable code, a hint and a page in `docs/reference/errors.md`.

`core` knows no HTTP and no exit codes: `cli` and `serve` map codes to theirs.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MillraceError(Exception):
    """What failed, the rule, what was received, what to do next.

    Args:
        message: What failed and the rule, with what was received, in one or two sentences.
        hint: What to do next; shown on its own line. The class's default is used when absent.
        details: Structured facts for `--json` (file, line, column, feature, …).

    Example:
        >>> error = NotFoundError("model 'digit' does not exist", hint="did you mean 'digits'?")
        >>> error.code, error.hint
        ('ref.not_found', "did you mean 'digits'?")
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = "run `millrace doctor`; if it is green, please report this as a bug"

    def __init__(self, message: str, *, hint: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        self.details = details or {}

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data, the same in `--json`, records and frames."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


class SpecError(MillraceError):
    """A spec is not valid; `details["problems"]` lists every problem with file, line and column."""

    code = "spec.invalid"
    default_hint = "see docs/reference/spec.md for every key, its type and its default"


class InputError(MillraceError):
    """An argument, a request or a user's file is not what the rule wants."""

    code = "input.invalid"
    default_hint = "correct the named value and try again"


class TooLargeError(InputError):
    """A request is larger than its route takes."""

    code = "input.too_large"
    default_hint = "send less at once"


class DataError(MillraceError):
    """Data cannot be read or breaks an expectation; names the file and, where there is one, the row."""

    code = "data.invalid"
    default_hint = "correct the named rows, or add a cleaning rule for them under data.clean"


class NotFoundError(MillraceError):
    """A named thing does not exist in this home."""

    code = "ref.not_found"
    default_hint = "list what exists with `millrace runs`, `millrace models` or `millrace datasets`"


class ConflictError(MillraceError):
    """Somebody else changed the record first, or the name is taken."""

    code = "record.conflict"
    retryable = True
    default_hint = "read the record again and repeat the change"


class UnauthenticatedError(MillraceError):
    """The server wants to know who is asking, and was not told, or not by a valid token."""

    code = "auth.required"
    default_hint = (
        "`millrace login URL`, or set MILLRACE_TOKEN to a token of that server (`millrace tokens create NAME` there)"
    )


class DeniedError(MillraceError):
    """The principal may not do this."""

    code = "auth.denied"
    default_hint = "ask an owner of the project for the role that allows it"


class ApprovalNeededError(DeniedError):
    """A rule of the project wants a second person to agree; `details["approval"]` waits for one."""

    code = "approval.needed"
    default_hint = "ask a second person: `millrace approvals` lists what waits"


class StageError(MillraceError):
    """A step failed; the user's own line comes first when it was the user's code."""

    code = "stage.failed"
    default_hint = "read the step's log, correct the cause and run again: finished steps are kept"


class StepTimeoutError(StageError):
    """A step ran past its wall-time limit or stopped beating."""

    code = "stage.timeout"


class StepMemoryError(StageError):
    """A step needed more memory than its limit."""

    code = "stage.out_of_memory"
    default_hint = "raise limits.memory, or make the model or the batch smaller"


class DeadlineError(MillraceError):
    """A request's answer would have come after the time by which its sender wanted it."""

    code = "deadline.exceeded"
    retryable = True
    default_hint = "give it more time, or try again when less is waiting"


class CancelledError(MillraceError):
    """The run was cancelled by a person."""

    code = "run.cancelled"
    default_hint = "run again to continue: finished steps are kept"


class ExtraMissingError(MillraceError):
    """An optional package that this spec needs is not installed."""

    code = "extra.missing"
    default_hint = "install the named extra"


class CorruptError(MillraceError):
    """Stored bytes do not have the digest they must have, or a signature does not verify."""

    code = "artifact.corrupt"
    default_hint = "restore the named blob from a backup, or run the step again"


class UntrustedError(MillraceError):
    """A bundle is unsigned or signed by a key that is not trusted here."""

    code = "artifact.untrusted"
    default_hint = "only if you know whose key it is: copy the signer's keys/signing.pub to keys/trusted/NAME.pub here"


class CapacityError(MillraceError):
    """There is not enough memory, disk or processor for the work."""

    code = "capacity.none"
    retryable = True
    default_hint = "free some, or lower what the spec asks for"


class DiskFullError(CapacityError):
    """The disk is full; nothing half-written remains."""

    code = "capacity.disk_full"
    default_hint = "free space (`millrace system du`, `millrace system gc`) and run again: it continues"


class QuotaError(MillraceError):
    """A quota is used up."""

    code = "quota.exceeded"
    retryable = True
    default_hint = "wait, or ask for a larger quota"


class UnavailableError(MillraceError):
    """A service, port or file is busy or not reachable now."""

    code = "unavailable"
    retryable = True
    default_hint = "wait a moment and try again"


class SchemaVersionError(MillraceError):
    """The home was written by a newer Millrace, or by one whose migration is missing here."""

    code = "store.schema"
    default_hint = "install the Millrace version that wrote this home, or a newer one"


def all_errors() -> list[type[MillraceError]]:
    """Every error class, for the documentation test and the reference.

    Example:
        >>> "spec.invalid" in {error.code for error in all_errors()}
        True
    """
    found: list[type[MillraceError]] = [MillraceError]
    for parent in found:
        found.extend(child for child in parent.__subclasses__() if child not in found)
    return found


def from_dict(value: dict[str, Any]) -> MillraceError:
    """The inverse of `to_dict`: an unknown code becomes the base class and keeps its text.

    Example:
        >>> type(from_dict({"code": "data.invalid", "message": "x", "hint": "y", "details": {}})).__name__
        'DataError'
    """
    by_code = {error.code: error for error in all_errors()}
    error_type = by_code.get(value.get("code", ""), MillraceError)
    return error_type(value.get("message", ""), hint=value.get("hint"), details=value.get("details"))
