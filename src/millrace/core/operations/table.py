"""All operations by name."""

from __future__ import annotations

from millrace.core.operations import Operation, live, registry, runs

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for module in (runs, registry, live) for operation in module.OPERATIONS
}
