"""Errors as MLflow clients expect them: `{"error_code", "message"}` and a status."""

from __future__ import annotations

from millrace.core.errors import (
    CapacityError,
    ConflictError,
    DeniedError,
    InputError,
    MillraceError,
    NotFoundError,
    QuotaError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)

INVALID = "INVALID_PARAMETER_VALUE"
INTERNAL = "INTERNAL_ERROR"
STATUSES = {
    INVALID: 400,
    INTERNAL: 500,
    "RESOURCE_ALREADY_EXISTS": 400,
    "RESOURCE_DOES_NOT_EXIST": 404,
    "RESOURCE_CONFLICT": 409,
    "ENDPOINT_NOT_FOUND": 404,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_IMPLEMENTED": 501,
    "RESOURCE_EXHAUSTED": 429,
    "TEMPORARILY_UNAVAILABLE": 503,
    "BAD_REQUEST": 400,
}
_CODES: tuple[tuple[type[MillraceError], str], ...] = (
    (NotFoundError, "RESOURCE_DOES_NOT_EXIST"),
    (ConflictError, "RESOURCE_CONFLICT"),
    (InputError, INVALID),
    (UnauthenticatedError, "UNAUTHENTICATED"),
    (DeniedError, "PERMISSION_DENIED"),
    (QuotaError, "RESOURCE_EXHAUSTED"),
    (UnavailableError, "TEMPORARILY_UNAVAILABLE"),
    (CapacityError, "TEMPORARILY_UNAVAILABLE"),
)


def unsupported(message: str) -> InputError:
    """Something that MLflow's protocol knows and this server does not do."""
    return InputError(message, details={"error_code": "NOT_IMPLEMENTED"})


def explained(error: MillraceError) -> tuple[int, str]:
    """Status and error code of an error.

    A name that is taken is a `RESOURCE_ALREADY_EXISTS`; a parameter with another value is invalid.

    Example:
        >>> explained(NotFoundError("gone"))
        (404, 'RESOURCE_DOES_NOT_EXIST')
        >>> explained(ConflictError("taken", details={"taken": "x"}))
        (400, 'RESOURCE_ALREADY_EXISTS')
    """
    code = error.details.get("error_code") or _code(error)
    if isinstance(error, TooLargeError):
        return 413, INVALID
    return STATUSES[code], code


def _code(error: MillraceError) -> str:
    if isinstance(error, ConflictError) and "taken" in error.details:
        return "RESOURCE_ALREADY_EXISTS"
    if isinstance(error, ConflictError) and "key" in error.details:
        return INVALID
    return next((code for kind, code in _CODES if isinstance(error, kind)), INTERNAL)
