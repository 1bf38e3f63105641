"""The OpenAPI 3.1 document, derived from the operation table and the structs' schemas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

import millrace
from millrace.api.routes import PREFIX, has_body, path_parameters
from millrace.core.operations import Operation
from millrace.core.units import Share

PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "message", "hint"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "message": {"type": "string"},
        "hint": {"type": "string"},
        "details": {"type": "object"},
    },
}
_PROBLEMS = {
    "default": {
        "description": "What failed, the rule, what was received, what to do next (RFC 9457).",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """The whole document.

    Example:
        >>> from millrace.core.operations.table import OPERATIONS
        >>> document(OPERATIONS.values())["openapi"]
        '3.1.0'
    """
    chosen = list(operations)
    types = [one.request for one in chosen] + [one.response for one in chosen]
    schemas, components = msgspec.json.schema_components(
        types, schema_hook=_schema_hook, ref_template="#/components/schemas/{name}"
    )
    requests, responses = schemas[: len(chosen)], schemas[len(chosen) :]
    paths: dict[str, dict[str, Any]] = {}
    for one, request, response in zip(chosen, requests, responses, strict=True):
        described = _operation(one, _resolve(request, components), response)
        paths.setdefault(PREFIX + one.path, {})[one.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Millrace",
            "version": millrace.__version__,
            "description": "Every verb of the platform; derived from the operation table.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": {**components, "Problem": PROBLEM}},
    }


def _operation(operation: Operation, request: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.name.partition(".")[0]],
        "parameters": _parameters(operation, request),
        "responses": {"200": _success(operation, response), **_PROBLEMS},
    }
    if has_body(operation):
        described["requestBody"] = _body(operation, request)
    return described


def _success(operation: Operation, response: dict[str, Any]) -> dict[str, Any]:
    if operation.is_raw and operation.response is bytes:
        return {"description": "The bytes.", "content": {"application/octet-stream": {"schema": {}}}}
    if operation.is_stream:
        text = "Server-sent events; each `data:` is JSON of the schema given as `itemSchema`."
        return {
            "description": text,
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "x-item": response,
        }
    return {"description": "Done.", "content": {"application/json": {"schema": response}}}


def _parameters(operation: Operation, request: dict[str, Any]) -> list[dict[str, Any]]:
    in_path = path_parameters(operation)
    properties = request.get("properties", {})
    found = [_parameter(operation, name, "path", properties[name], required=True) for name in in_path]
    if has_body(operation):
        return found
    required = set(request.get("required", ()))
    rest = [name for name in properties if name not in in_path]
    return found + [_parameter(operation, name, "query", properties[name], name in required) for name in rest]


def _parameter(
    operation: Operation, name: str, place: str, schema: dict[str, Any], required: bool
) -> dict[str, Any]:  # fmt: skip
    described: dict[str, Any] = {"name": name, "in": place, "required": required, "schema": schema}
    if name in operation.example:
        described["example"] = operation.example[name]
    return described


def _body(operation: Operation, request: dict[str, Any]) -> dict[str, Any]:
    if operation.is_raw:
        return {"required": True, "content": {"application/octet-stream": {"schema": {}}}}
    in_path = set(path_parameters(operation))
    schema = dict(request)
    schema["properties"] = {name: one for name, one in request.get("properties", {}).items() if name not in in_path}
    schema["required"] = [name for name in request.get("required", ()) if name not in in_path]
    example = {name: value for name, value in operation.example.items() if name not in in_path}
    return {
        "required": bool(schema["required"]),
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _resolve(schema: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference means."""
    reference = schema.get("$ref", "")
    return components[reference.rpartition("/")[2]] if reference else schema


def _schema_hook(kind: type) -> dict[str, Any]:
    if kind is Share:
        return {"type": "number"}
    return {}
