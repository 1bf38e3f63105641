"""Rows as people send them, turned into a model's tensors; its outputs, turned into answers."""

from __future__ import annotations

import difflib
import functools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from millrace.core.errors import InputError, StageError
from millrace.formats.signature import Signature, TensorSpec

MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"})  # as a table says it
_TRUE, _FALSE = frozenset({"true", "yes"}), frozenset({"false", "no"})
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def encode_rows(signature: Signature, instances: Sequence[Any]) -> dict[str, np.ndarray]:
    """A model's input tensors from rows.

    Args:
        signature: What the model wants.
        instances: One row each: an object by column (`{"age": 31, "plan": null}`; null is a missing
            value, other columns are ignored), an object by tensor (`{"pixels": [0, 16, …]}`), or, where
            the model has one tensor, the list of its values.

    Returns:
        Tensor name → array [rows, …] with the tensor's dtype.

    Raises:
        InputError: A row is not such an object; the message names the field.

    Example:
        >>> pixels = TensorSpec(name="pixels", dtype="float32", shape=[-1, 3], columns=["a", "b", "c"])
        >>> model = Signature(task="regression", inputs=[pixels], outputs=[], label="y")
        >>> encode_rows(model, [{"pixels": [1, 2, 3]}, {"a": 4, "b": None, "c": 6}, [7, 8, 9]])["pixels"].tolist()
        [[1.0, 2.0, 3.0], [4.0, nan, 6.0], [7.0, 8.0, 9.0]]
        >>> encode_rows(model, [{"pixels": [1, 2]}])
        Traceback (most recent call last):
        millrace.core.errors.InputError: instances[0].pixels: want 3 numbers, got 2
    """
    if isinstance(instances, str | bytes | Mapping) or not isinstance(instances, Sequence):
        raise InputError(f"instances: want a list of rows, got {_shown(instances)}")
    if not instances:
        raise InputError("instances: want at least one row, got none")
    return {spec.name: _tensor(signature, spec, instances) for spec in signature.inputs}


def _tensor(signature: Signature, spec: TensorSpec, instances: Sequence[Any]) -> np.ndarray:
    rows = [_row(signature, spec, instance, index) for index, instance in enumerate(instances)]
    if spec.dtype == "float32" and len(spec.shape) == 2 and spec.shape[1] > 0:
        packed = _pack(spec, rows)
        if packed is not None:
            values = np.frombuffer(packed, dtype=np.float32).reshape(len(rows), spec.shape[1])
            if _is_finite(values) or (spec.semantic != "image" and not np.isinf(values).any()):
                return values
    return _slow_tensor(spec, rows, instances)


def _is_finite(values: np.ndarray) -> bool:
    # one product instead of two passes; only huge values overflow it, and then the passes decide
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        return math.isfinite(flat.dot(flat)) or bool(np.isfinite(values).all())


def _pack(spec: TensorSpec, rows: list[Any]) -> bytes | None:
    """Plain numbers (and nulls in a table) as float32; None where something is to be named."""
    packer = _packer(spec.shape[1])
    try:
        return b"".join([packer.pack(*row) for row in rows])
    except (struct.error, OverflowError, TypeError):
        if spec.semantic == "image":
            return None
    try:
        return b"".join([packer.pack(*[math.nan if value is None else value for value in row]) for row in rows])
    except (struct.error, OverflowError, TypeError):
        return None


@functools.lru_cache(maxsize=64)
def _packer(width: int) -> struct.Struct:
    return struct.Struct(f"={width}f")


def _row(signature: Signature, spec: TensorSpec, instance: Any, index: int) -> Any:
    """The values of one tensor in one instance, not yet checked."""
    if isinstance(instance, Mapping):
        if spec.name in instance and not (spec.name in spec.columns and not _is_list(instance[spec.name])):
            return instance[spec.name]
        if spec.columns:
            try:
                return [instance[column] for column in spec.columns]
            except KeyError as missing:
                raise _missing(spec, instance, index, missing.args[0]) from None
        raise _missing(spec, instance, index, spec.name)
    if len(signature.inputs) == 1 and _is_list(instance):
        return instance
    wanted = " and ".join(repr(one.name) for one in signature.inputs)
    raise InputError(f"instances[{index}]: want an object with {wanted}, or with the columns, got {_shown(instance)}")


def _missing(spec: TensorSpec, instance: Mapping[str, Any], index: int, name: str) -> InputError:
    if len(spec.columns) > 1 and not any(column in instance for column in spec.columns):
        name = spec.name  # none of its columns: whoever wrote this meant the tensor
    close = difflib.get_close_matches(str(name), [str(key) for key in instance], n=1)
    hint = f"did you mean {name!r} by {close[0]!r}?" if close else "send null where the value is not known"
    return InputError(f"instances[{index}].{name}: missing", hint=hint)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _slow_tensor(spec: TensorSpec, rows: list[Any], instances: Sequence[Any]) -> np.ndarray:
    """Value by value: the first one that is wrong is named."""
    tail = spec.shape[1:]
    result: list[Any] = []
    for index, row in enumerate(rows):
        instance = instances[index]
        by_tensor = not isinstance(instance, Mapping) or instance.get(spec.name) is row
        place = f"instances[{index}]" + (f".{spec.name}" if by_tensor and isinstance(instance, Mapping) else "")
        values = _flat(row, place, 0) if by_tensor else row
        wanted = math.prod(tail) if -1 not in tail else len(values)
        if len(values) != wanted:
            raise InputError(f"{place}: want {wanted} {_noun(spec)}, got {len(values)}")
        names = [f"{place}[{k}]" if by_tensor else f"{place}.{spec.columns[k]}" for k in range(len(values))]
        result.append([_value(spec, value, name) for value, name in zip(values, names, strict=True)])
    return _shaped(spec, rows, result)


def _shaped(spec: TensorSpec, rows: list[Any], values: list[list[Any]]) -> np.ndarray:
    dtype = np.dtype(spec.array_dtype)
    tail = spec.shape[1:]
    if -1 in tail:
        shapes = {np.shape(row) for row in rows}
        if len(shapes) != 1 or len(next(iter(shapes))) != len(tail):
            raise InputError(f"instances: want rows of one shape {tail} for {spec.name!r}, got {sorted(shapes)[:3]}")
        tail = list(next(iter(shapes)))
    try:
        return np.array(values, dtype=dtype).reshape([len(rows), *tail])
    except (OverflowError, ValueError) as error:
        raise InputError(f"instances: {spec.name!r} wants {spec.dtype}: {error}") from error


def _flat(value: Any, place: str, depth: int) -> list[Any]:
    """Nested lists as one list; a single value stands for a list of one."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not _is_list(value):
        return [value]
    found: list[Any] = []
    for item in value:
        if _is_list(item):
            if depth > 8:
                raise InputError(f"{place}: nested too deeply")
            found.extend(_flat(item, place, depth + 1))
        else:
            found.append(item)
    return found


def _noun(spec: TensorSpec) -> str:
    return "texts" if spec.dtype == "string" else "numbers"


def _value(spec: TensorSpec, value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if spec.dtype == "string":
        return _text(value, name)
    if value is None:
        if spec.dtype in ("float32", "float64") and spec.semantic != "image":
            return math.nan
        raise InputError(f"{name}: want a number, got null")
    if not isinstance(value, int | float):
        raise InputError(f"{name}: want a number, got {_shown(value)}")
    if "float" not in spec.dtype:
        return _whole(spec, value, name)
    if isinstance(value, float) and math.isnan(value) and spec.semantic != "image":
        return math.nan
    if not abs(value) <= (_FLOAT32_MAX if spec.dtype == "float32" else float(np.finfo(spec.array_dtype).max)):
        raise InputError(f"{name}: want a finite number that {spec.dtype} can hold, got {_shown(value)}")
    return float(value)


def _whole(spec: TensorSpec, value: int | float, name: str) -> int | bool:
    if spec.dtype == "bool":
        if value in (0, 1):
            return bool(value)
        raise InputError(f"{name}: want true or false, got {_shown(value)}")
    limits = np.iinfo(spec.dtype)
    if value != value or value in (math.inf, -math.inf) or value != int(value):
        raise InputError(f"{name}: want a whole number, got {_shown(value)}")
    if not limits.min <= value <= limits.max:
        raise InputError(f"{name}: want a whole number from {limits.min} to {limits.max}, got {_shown(value)}")
    return int(value)


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""  # a missing category
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise InputError(f"{name}: want a text, got {_shown(value)}")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def decode_answers(signature: Signature, outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A model's outputs as answers, in the order of the rows.

    Args:
        signature: What the outputs mean.
        outputs: `probabilities` [rows, classes], or `value` [rows, 1].

    Returns:
        `{"label": …, "probabilities": {class: share}}` or `{"value": …}` per row; a label has the type
        of the label column. Shares are the shortest decimals that name the float32. Where a model gives
        neither, a row's outputs by name.

    Raises:
        StageError: The model gave something else.

    Example:
        >>> model = Signature(task="classification", inputs=[], outputs=[], label="y", classes=["no", "yes"])
        >>> decode_answers(model, {"probabilities": np.array([[0.25, 0.75]], dtype=np.float32)})
        [{'label': 'yes', 'probabilities': {'no': 0.25, 'yes': 0.75}}]
        >>> parts = TensorSpec(name="parts", dtype="int64", shape=[-1, 2])
        >>> own = Signature(task="regression", inputs=[], outputs=[parts], label="y")
        >>> decode_answers(own, {"parts": np.array([[1, 2], [3, 4]])})
        [{'parts': [1, 2]}, {'parts': [3, 4]}]
    """
    if signature.task == "regression" and signature.outputs and not any(map(_is_value, signature.outputs)):
        return _by_output(signature, outputs)
    best, values = answer_arrays(signature, outputs)
    if best is None:
        return [{"value": value} for value in _decimals(values)]
    labels = answer_labels(signature)
    rows = _decimals(values)
    return [
        {"label": labels[winner], "probabilities": dict(zip(signature.classes, row, strict=True))}
        for winner, row in zip(best.tolist(), rows, strict=True)
    ]


def answer_arrays(signature: Signature, outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray]:
    """A model's outputs as arrays, in the order of the rows.

    Args:
        signature: What the outputs mean.
        outputs: `probabilities` [rows, classes], or `value` [rows, 1].

    Returns:
        The index of the likeliest class of each row and the probabilities; of a regression None and the values [rows].

    Raises:
        StageError: The model gave something else.
    """
    if signature.task == "regression":
        return None, _output(outputs, "value").astype(np.float32, copy=False).reshape(-1)
    shares = _output(outputs, "probabilities").astype(np.float32, copy=False)
    if shares.ndim != 2 or shares.shape[1] != len(signature.classes):
        raise StageError(f"the model gave probabilities {list(shares.shape)}: want [rows, {len(signature.classes)}]")
    return shares.argmax(axis=1), shares


def answer_labels(signature: Signature) -> list[Any]:
    """The classes as values of the label column's type, in their order.

    Example:
        >>> answer_labels(Signature(task="classification", inputs=[], outputs=[], label="y", classes=["0", "1"],
        ...                         label_type="integer"))
        [0, 1]
    """
    return _labels(tuple(signature.classes), signature.label_type)


def _is_value(spec: TensorSpec) -> bool:
    return spec.name == "value" and spec.dtype != "string" and len(spec.shape) <= 2


def _by_output(signature: Signature, outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each row's outputs by name; numbers as the shortest decimals, not finite as None."""
    names = [spec.name for spec in signature.outputs]
    columns = [
        values.tolist() if values.dtype == object else _decimals(values)
        for values in (_output(outputs, name) for name in names)
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _output(outputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in outputs:
        raise StageError(f"the model gave {', '.join(outputs) or 'nothing'}: want an output {name!r}")
    return np.asarray(outputs[name])


def _decimals(values: np.ndarray) -> list[Any]:
    """float32 as the shortest decimals: 0.9 instead of 0.8999999761581421; not finite becomes None."""
    return orjson.loads(orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY))


@functools.lru_cache(maxsize=64)
def _labels(classes: tuple[str, ...], label_type: str) -> list[Any]:
    return [_label(name, label_type) for name in classes]


def _label(name: str, label_type: str) -> Any:
    try:
        if label_type == "integer":
            return int(float(name)) if "." in name else int(name)
        if label_type == "number":
            return float(name)
    except ValueError:
        return name
    if label_type == "boolean":
        return name.strip().lower() in ("true", "1", "yes")
    return name


def read_cell(text: str, spec: TensorSpec) -> Any:
    """A table's cell as JSON would have it; what is no number stays a text and is named later.

    Example:
        >>> number = TensorSpec(name="numbers", dtype="float32", shape=[-1, 1])
        >>> [read_cell(text, number) for text in ("1.5", " 2 ", "NA", "true", "x")]
        [1.5, 2.0, None, 1.0, 'x']
    """
    if spec.dtype == "string":
        return None if text in MISSING else text
    text = text.strip()
    if text in MISSING:
        return None
    try:
        number = float(text)
    except ValueError:
        lower = text.lower()
        return 1.0 if lower in _TRUE else 0.0 if lower in _FALSE else text
    return number if math.isfinite(number) else text
