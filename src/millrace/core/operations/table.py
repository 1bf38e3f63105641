"""All operations by name."""

from __future__ import annotations

from millrace.core.operations import (
    Operation,
    audit,
    backup,
    blobs,
    compliance,
    following,
    governance,
    imports,
    keys,
    live,
    projects,
    registry,
    runs,
    secrets,
    trusted_keys,
    users,
    works,
)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for module in (
        runs,
        projects,
        registry,
        live,
        following,
        blobs,
        imports,
        works,
        governance,
        users,
        backup,
        audit,
        keys,
        secrets,
        trusted_keys,
        compliance,
    )
    for operation in module.OPERATIONS
}
