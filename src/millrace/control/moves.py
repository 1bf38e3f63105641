"""Aliases move by compare-and-set, and remember where they were."""

from __future__ import annotations

import msgspec

from millrace.control.numbering import project_of_model
from millrace.core.errors import ConflictError
from millrace.core.ports import Transaction
from millrace.core.types import Alias


def move_alias(
    transaction: Transaction, model: str, name: str, number: int, *, at: float, reason: str, expect: int | None = None
) -> Alias:
    """Point an alias at a version and remember where it was.

    Raises:
        ConflictError: Somebody moved it first (`expect` names the version it must be at).
    """
    alias = transaction.get(Alias, f"{model}/{name}")
    before = alias.number if alias else None
    entry = {"from": before, "to": number, "at": at, "reason": reason}
    if alias is None:
        project = project_of_model(transaction, model)
        alias = Alias(
            id=f"{model}/{name}", project=project, created_at=at, model=model, name=name, number=number, history=[entry]
        )
        return transaction.put(alias, expect_version=0)
    if expect is not None and before != expect:
        raise ConflictError(f"{model}@{name} is at version {before}, not {expect}")
    moved = msgspec.structs.replace(alias, number=number, history=[*alias.history, entry])
    return transaction.put(moved, expect_version=alias.version)
