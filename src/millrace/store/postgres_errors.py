"""Postgres' errors as ours."""

from __future__ import annotations

import psycopg

from millrace.core.errors import ConflictError, DiskFullError, InputError, MillraceError, UnavailableError

_RETRY = {
    "40001": "another change came in between",
    "40P01": "two changes waited for each other",
    "55P03": "another process held the writer lock for half a minute",
    "57014": "the statement ran past its time",
    "25P03": "the change paused for a minute inside its transaction and lost the writer lock",
    "53300": "the server has no connection left",
    "53200": "the server has no memory left",
}
_NOT_ALLOWED = frozenset({"42501", "25006"})  # insufficient privilege, a read-only server


def as_millrace_error(error: psycopg.Error, name: str) -> MillraceError | None:
    """The error of the tree that says what happened, or None when the statement itself was wrong.

    Args:
        error: What psycopg raised.
        name: How to call the database; without a password.

    Example:
        >>> as_millrace_error(psycopg.errors.DiskFull("no space"), "postgresql://db/records").code
        'capacity.disk_full'
    """
    code, text = error.sqlstate or "", str(error).strip().replace("\n", "; ")
    if code == "53100" or "No space left on device" in text:
        return DiskFullError(f"{name}: the server's disk is full, nothing of this change was written")
    if code in _RETRY:
        return UnavailableError(f"{name}: {_RETRY[code]}, nothing of this change was written ({text})")
    if code in _NOT_ALLOWED:
        return UnavailableError(
            f"{name}: the server refuses to write: {text}",
            hint="connect to the primary, as a user who owns the schema",
        )
    if code == "23505":
        return ConflictError(f"{name}: {text}")
    if isinstance(error, psycopg.DataError):
        return InputError(f"{name} cannot store this: {text}")
    if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return UnavailableError(
            f"{name} cannot be reached, nothing of this change was written: {text}",
            hint="see whether the server runs, and whether `records_url` names its host, user and database",
        )
    return None
