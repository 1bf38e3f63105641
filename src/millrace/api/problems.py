"""Errors as HTTP: RFC 9457 problem documents, one status per code."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from millrace.core.errors import MillraceError, all_errors

STATUSES: dict[str, int] = {
    "internal": 500,
    "spec.invalid": 422,
    "input.invalid": 400,
    "input.too_large": 413,
    "data.invalid": 422,
    "ref.not_found": 404,
    "record.conflict": 409,
    "auth.required": 401,
    "auth.denied": 403,
    "approval.needed": 403,
    "stage.failed": 422,
    "stage.timeout": 422,
    "stage.out_of_memory": 422,
    "run.cancelled": 409,
    "extra.missing": 501,
    "artifact.corrupt": 500,
    "artifact.untrusted": 403,
    "capacity.none": 503,
    "capacity.disk_full": 507,
    "quota.exceeded": 429,
    "unavailable": 503,
    "deadline.exceeded": 504,
    "store.schema": 503,
}
RETRY_AFTER_S = 1
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="millrace"'}


def status_of(error: MillraceError) -> int:
    """The HTTP status of an error.

    Example:
        >>> from millrace.core.errors import NotFoundError
        >>> status_of(NotFoundError("gone"))
        404
    """
    return STATUSES.get(error.code, 500)


def problem(error: MillraceError) -> Response:
    """The problem document of an error (RFC 9457), with our code, hint and details as extensions."""
    status = status_of(error)
    body = {
        "type": f"urn:millrace:error:{error.code}",
        "title": error.code,
        "status": status,
        "detail": error.message,
        **error.to_dict(),
    }
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 401:
        headers |= CHALLENGE
    content = msgspec.json.encode(body, enc_hook=str)
    return Response(content, status_code=status, media_type="application/problem+json", headers=headers)


def unmapped_codes() -> set[str]:
    """Codes without a status of their own; the test wants none.

    Example:
        >>> unmapped_codes()
        set()
    """
    return {error.code for error in all_errors()} - set(STATUSES)
