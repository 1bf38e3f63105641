"""Tensors on the wire: JSON lists and raw bytes, checked against a signature's `TensorSpec`."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from millrace.core.errors import InputError
from millrace.formats.signature import TensorSpec

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "bfloat16": "BF16",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "string": "BYTES",
}
_ITEM_BYTES = {"bfloat16": 2}
_MAX_ELEMENTS = 1 << 40
_PACK_UP_TO = 4096  # elements; a packer per size is kept
_NUMPY = orjson.OPT_SERIALIZE_NUMPY
MAX_DEPTH = 100  # of lists in lists


def itemsize(spec: TensorSpec) -> int:
    """Bytes of one element; 0 for texts.

    Example:
        >>> itemsize(TensorSpec(name="x", dtype="int64", shape=[-1, 2]))
        8
    """
    return _ITEM_BYTES.get(spec.dtype) or np.dtype(spec.dtype).itemsize if spec.dtype != "string" else 0


def check_shape(spec: TensorSpec, shape: Any, datatype: Any) -> None:
    """Compare what a request says of a tensor with the signature.

    Raises:
        InputError: The datatype or the shape is another one.
    """
    wanted = DATATYPES[spec.dtype]
    if datatype != wanted:
        raise InputError(f"input {spec.name!r}: want datatype {wanted}, got {shown(datatype)}")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise InputError(f"input {spec.name!r}: want shape {spec.shape} in whole numbers, got {shown(shape)}")
    if len(shape) != len(spec.shape) or not all(
        size == given or (size == -1 and given >= 0) for size, given in zip(spec.shape[1:], shape[1:], strict=True)
    ):
        raise InputError(f"input {spec.name!r}: want shape {spec.shape} (-1: any), got {shown(shape)}")
    if shape[0] < 0:
        raise InputError(f"input {spec.name!r}: want no row or some, got shape {shown(shape)}")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise InputError(f"input {spec.name!r}: shape {shown(shape)} has more elements than a body can hold")


@functools.lru_cache(maxsize=256)
def _float_packer(size: int) -> struct.Struct:
    return struct.Struct(f"={size}f")


def pack_floats(values: list[float]) -> bytes | None:
    """Numbers as the bytes of float32; None when one of them is too large for that.

    Example:
        >>> pack_floats([1.0, 1e39]) is None
        True
    """
    if len(values) > _PACK_UP_TO:
        with np.errstate(over="ignore"):
            packed = np.array(values, dtype=np.float32)
        return None if np.isinf(packed).any() else packed.tobytes()
    try:
        return _float_packer(len(values)).pack(*values)
    except OverflowError:
        return None


def read_binary(
    spec: TensorSpec, shape: list[int], parameters: Mapping[str, Any], rest: bytes, offset: int
) -> tuple[np.ndarray, int]:
    """A tensor from the binary part of a body.

    Args:
        spec: What the signature says; `check_shape` has passed.
        shape: Of this request.
        parameters: Of this tensor: `binary_data_size`.
        rest: The body after its JSON.
        offset: Where the tensor begins in it.

    Returns:
        The tensor, and where the next one begins.

    Raises:
        InputError: The bytes are too few, or not as many as the shape wants.
    """
    size = parameters.get("binary_data_size")
    if type(size) is not int or size < 0:
        raise InputError(f"input {spec.name!r}: has neither data nor a binary_data_size in bytes, got {shown(size)}")
    end = offset + size
    if end > len(rest):
        raise InputError(f"input {spec.name!r}: want {size} bytes of binary data, got {max(0, len(rest) - offset)}")
    if spec.dtype == "string":
        return _texts_from_bytes(spec, shape, rest[offset:end]), end
    count = math.prod(shape)
    wanted = count * itemsize(spec)
    if size != wanted:
        raise InputError(f"input {spec.name!r}: want {wanted} bytes for shape {shape}, got {size}")
    if spec.dtype == "bool":
        return (np.frombuffer(rest, dtype=np.uint8, count=count, offset=offset) != 0).reshape(shape), end
    if spec.dtype == "bfloat16":
        return from_bfloat16(rest[offset:end]).reshape(shape), end
    dtype = np.dtype(spec.dtype)
    if dtype.itemsize > 1 and offset % dtype.itemsize:
        return np.frombuffer(rest[offset:end], dtype=dtype).reshape(shape), end  # a copy: aligned
    return np.frombuffer(rest, dtype=dtype, count=count, offset=offset).reshape(shape), end


def _texts_from_bytes(spec: TensorSpec, shape: list[int], data: bytes) -> np.ndarray:
    texts: list[str] = []
    position = 0
    while position < len(data):
        start = position + 4
        end = start + int.from_bytes(data[position:start], "little")
        if start > len(data) or end > len(data):
            raise InputError(f"input {spec.name!r}: text {len(texts)} ends after the {len(data)} bytes of the tensor")
        try:
            texts.append(data[start:end].decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"input {spec.name!r}: text {len(texts)} is not UTF-8") from None
        position = end
    if len(texts) != math.prod(shape):
        raise InputError(f"input {spec.name!r}: want {math.prod(shape)} texts for shape {shape}, got {len(texts)}")
    return np.array(texts, dtype=object).reshape(shape)


_JSON_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "string": ((str,), "texts"),
    "bfloat16": ((int, float), "numbers"),
    "float16": ((int, float), "numbers"),
    "float32": ((int, float), "numbers"),
    "float64": ((int, float), "numbers"),
}


def from_json(spec: TensorSpec, shape: list[int], data: Any) -> np.ndarray:
    """A tensor from JSON: flat or nested lists; null is a missing number except in an image.

    Long lists of numbers may come as what `large_json` makes of them.

    Raises:
        InputError: A value has another type, or there are more or fewer of them than the shape wants.

    Example:
        >>> from_json(TensorSpec(name="x", dtype="float32", shape=[-1, 2]), [2, 2], [[1, 2], [3, None]]).tolist()
        [[1.0, 2.0], [3.0, nan]]
    """
    if isinstance(data, np.ndarray):
        return _from_array(spec, shape, data)
    if not isinstance(data, list):
        raise InputError(f"input {spec.name!r}: want data, a list, got {shown(data)}")
    values: list[Any] = []
    kinds = _flatten(spec, data, values, 0)
    types, noun = _JSON_TYPES.get(spec.dtype, ((int,), "whole numbers"))
    if spec.dtype in ("float32", "float64") and spec.semantic != "image":
        types = (*types, type(None))
    if not kinds.issubset(types):
        index, value = next((index, value) for index, value in enumerate(values) if type(value) not in types)
        raise InputError(f"input {spec.name!r}: want {noun}, got {shown(value)} at element {index}")
    if len(values) != math.prod(shape):
        raise InputError(f"input {spec.name!r}: want {math.prod(shape)} {noun} for shape {shape}, got {len(values)}")
    if spec.dtype == "string":
        return np.array(values, dtype=object).reshape(shape)
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=spec.array_dtype).reshape(shape)  # None becomes NaN: missing
            if spec.dtype == "bfloat16":
                array = from_bfloat16(to_bfloat16(array)).reshape(shape)
    except OverflowError:
        array = None
    if array is None or (array.dtype.kind == "f" and np.isinf(array).any()):
        raise InputError(f"input {spec.name!r}: has a number that {DATATYPES[spec.dtype]} cannot hold")
    return array


def _from_array(spec: TensorSpec, shape: list[int], values: np.ndarray) -> np.ndarray:
    noun = _JSON_TYPES.get(spec.dtype, ((int,), "whole numbers"))[1]
    if values.size != math.prod(shape):
        raise InputError(f"input {spec.name!r}: want {math.prod(shape)} {noun} for shape {shape}, got {values.size}")
    with np.errstate(over="ignore"):
        array = values.astype(spec.array_dtype).reshape(shape)
    is_held = np.isfinite(array).all() if array.dtype.kind == "f" else np.array_equal(array.reshape(-1), values)
    if not is_held:
        raise InputError(f"input {spec.name!r}: has a number that {DATATYPES[spec.dtype]} cannot hold")
    return array


def _flatten(spec: TensorSpec, data: list[Any], found: list[Any], depth: int) -> set[type]:
    """Values in their order, and which types they have: seen without a step of Python for each of many."""
    if depth > MAX_DEPTH:
        raise InputError(f"input {spec.name!r}: data is nested more than {MAX_DEPTH} deep")
    kinds: set[type] = set(map(type, data))
    if list not in kinds:
        found.extend(data)
        return kinds
    kinds.remove(list)
    for value in data:
        if isinstance(value, list):
            kinds |= _flatten(spec, value, found, depth + 1)
        else:
            found.append(value)
    return kinds


def from_bfloat16(data: bytes) -> np.ndarray:
    """Numbers of two bytes each, exactly.

    Example:
        >>> from_bfloat16(bytes([0x80, 0x3F, 0x20, 0xC0])).tolist()
        [1.0, -2.5]
    """
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> bytes:
    """Numbers in two bytes each, rounded to the nearest, a tie to the even one.

    Example:
        >>> from_bfloat16(to_bfloat16(np.array([1.0, 1.00390625, 1.01171875, np.nan]))).tolist()
        [1.0, 1.0, 1.015625, nan]
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(bits.view(np.float32)), bits >> 16 | 0x40, rounded).astype("<u2").tobytes()


def to_bytes(values: np.ndarray, dtype: str = "") -> bytes:
    """A tensor's bytes; texts with their length before each.

    Args:
        values: The tensor.
        dtype: What its specification says, where that is not what numpy holds: bfloat16.
    """
    if dtype == "bfloat16":
        return to_bfloat16(values)
    if values.dtype != object:
        return values.tobytes()
    encoded = [str(value).encode() for value in values.reshape(-1)]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)


def to_json(values: np.ndarray) -> bytes:
    """A tensor's flat JSON list; what is not finite becomes null."""
    flat = values.reshape(-1)
    return orjson.dumps(flat.tolist() if values.dtype == object else np.ascontiguousarray(flat), option=_NUMPY)


def rows_to_json(values: np.ndarray) -> list[bytes]:
    """The flat JSON of each row without its brackets, all in one go; none where there are deeper rows.

    Example:
        >>> rows_to_json(np.array([[1, 2], [3, 4]]))
        [b'1,2', b'3,4']
    """
    if values.ndim != 2 or not values.size:
        return []
    return orjson.dumps(np.ascontiguousarray(values), option=_NUMPY)[2:-2].split(b"],[")


def as_object(value: Any, place: str) -> dict[str, Any]:
    """An optional JSON object.

    Raises:
        InputError: It is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{place}: want an object, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in an error, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
