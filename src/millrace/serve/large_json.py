"""Requests of megabytes of JSON: their numbers become arrays without a Python object for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import simdjson

LARGE_BYTES = 32 << 10  # below, a list of Python numbers is as quick
_FORMS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("FP16", "FP32", "FP64"), ("d", np.float64)),
    **dict.fromkeys(("INT8", "INT16", "INT32", "INT64"), ("i", np.int64)),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32", "UINT64"), ("u", np.uint64)),
}


def read_large(data: bytes) -> dict[str, Any] | None:
    """A V2 request as `orjson.loads` gives it, but for the `data` of its inputs.

    Where all of that is numbers of the datatype's kind, in whatever nesting, it is a flat array: float64, int64 or
    uint64.

    Returns:
        None for what is no such request: another parser tells what is wrong with it.

    Example:
        >>> read_large(b'{"inputs": [{"name": "x", "datatype": "FP32", "data": [[1, 2.5]]}]}')
        {'inputs': [{'name': 'x', 'datatype': 'FP32', 'data': array([1. , 2.5])}]}
        >>> read_large(b"[1, 2") is None
        True
    """
    try:
        document = simdjson.Parser().parse(data)
        if not isinstance(document, simdjson.Object):
            return None
        fields = _fields(document)
        return {name: _inputs(value) if name == "inputs" else _plain(value) for name, value in fields.items()}
    except (ValueError, RuntimeError, UnicodeDecodeError):
        return None


def _fields(value: simdjson.Object) -> dict[str, Any]:
    """What it holds, by name; lists and objects stay where they are.

    Raises:
        ValueError: A name stands there twice.
    """
    names = list(value.keys())
    if len({*names}) < len(names):
        raise ValueError("a name stands there twice")
    return {name: value[name] for name in names}


def _inputs(value: Any) -> Any:
    if not isinstance(value, simdjson.Array):
        return _plain(value)
    return [_input(one) if isinstance(one, simdjson.Object) else _plain(one) for one in value]


def _input(value: simdjson.Object) -> dict[str, Any]:
    fields = _fields(value)
    form = _FORMS.get(datatype) if isinstance(datatype := fields.get("datatype"), str) else None
    return {
        name: _numbers(one, form) if name == "data" and form is not None else _plain(one)
        for name, one in fields.items()
    }


def _numbers(value: Any, form: tuple[Any, Any]) -> Any:
    if isinstance(value, simdjson.Array):
        try:
            return np.frombuffer(value.as_buffer(of_type=form[0]), form[1])
        except (TypeError, ValueError):  # something else is among them: to be named by who looks at each
            return value.as_list()
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, simdjson.Array) else value
