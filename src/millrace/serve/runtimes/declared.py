"""What a model of a user's own code says of itself: inputs, outputs, classes, an example, a deadline."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from millrace.core.errors import InputError
from millrace.core.types import Struct
from millrace.formats.signature import Dtype, Signature, TensorSpec

DTYPES: tuple[str, ...] = get_args(Dtype)
NAMES = ("inputs", "outputs", "classes", "label", "columns", "example", "deadline_s", "max_batch")
DEADLINE_S = 30.0


class Declared(Struct, frozen=True, kw_only=True):
    """A model's declaration, checked.

    `deadline_s`: how long one call may take; `max_batch`: rows of one call at most, None where it does not matter.
    """

    signature: Signature
    example: dict[str, Any] = {}
    deadline_s: float = DEADLINE_S
    max_batch: int | None = None


def declared(given: Mapping[str, Any], place: str) -> Declared:
    """A declaration from a class's attributes, or from a file.

    Args:
        given: `inputs` and what else of `NAMES` is there: name → (dtype, shape), the first dimension -1.
        place: Where it stands, for the messages.

    Returns:
        Without `outputs`: `probabilities` of the `classes`, or `value` where there are none.

    Raises:
        InputError: Something of it is missing or wrong; names it.

    Example:
        >>> found = declared({"inputs": {"x": ("float32", [-1, 4])}, "classes": ["ham", "spam"]}, "Spam")
        >>> found.signature.task, found.signature.outputs[0].name, found.signature.outputs[0].shape
        ('classification', 'probabilities', [-1, 2])
        >>> declared({"inputs": {"x": ("float23", [-1, 4])}}, "Spam")
        Traceback (most recent call last):
        millrace.core.errors.InputError: Spam.inputs['x']: want one of bfloat16, float16, float32, float64, int8, \
int16, int32, int64, uint8, uint16, uint32, uint64, bool, string, got 'float23'
    """
    if not given.get("inputs"):
        raise InputError(f'{place} does not say its inputs: want inputs = {{"x": ("float32", [-1, 4])}}, got nothing')
    classes = [str(name) for name in _sequence(given.get("classes") or [], f"{place}.classes")]
    usual = {"probabilities": ("float32", [-1, len(classes)])} if classes else {"value": ("float32", [-1, 1])}
    columns = _mapping(given.get("columns") or {}, f"{place}.columns")
    inputs = [_spec(name, one, f"{place}.inputs", columns.get(name)) for name, one in _items(given, "inputs", place)]
    outputs = [_spec(name, one, f"{place}.outputs", None) for name, one in _items(given, "outputs", place, usual)]
    if classes and not any(one.name == "probabilities" and one.shape == [-1, len(classes)] for one in outputs):
        got = ", ".join(f"{one.name} {one.shape}" for one in outputs)
        raise InputError(
            f"{place}: {len(classes)} classes want an output probabilities [-1, {len(classes)}], got {got}"
        )
    signature = Signature(
        task="classification" if classes else "regression", inputs=inputs, outputs=outputs,
        label=str(given.get("label") or "label"), classes=classes,
    )  # fmt: skip
    return Declared(
        signature=signature,
        example=dict(_mapping(given.get("example") or {}, f"{place}.example")),
        deadline_s=_positive(given.get("deadline_s", DEADLINE_S), f"{place}.deadline_s"),
        max_batch=None if given.get("max_batch") is None else int(_positive(given["max_batch"], f"{place}.max_batch")),
    )


def unknown_name(given: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Refuse a key that nobody reads.

    Raises:
        InputError: There is one; says which was meant.

    Example:
        >>> unknown_name({"input": {}}, NAMES, "model.json")
        Traceback (most recent call last):
        millrace.core.errors.InputError: model.json: there is no 'input'
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"want some of {', '.join(known)}"
            raise InputError(f"{place}: there is no {name!r}", hint=hint)


def example_of(found: Declared, place: str) -> dict[str, np.ndarray]:
    """The example as tensors; empty where there is none.

    Raises:
        InputError: It is not what the inputs say.
    """
    if not found.example:
        return {}
    tensors: dict[str, np.ndarray] = {}
    for spec in found.signature.inputs:
        if spec.name not in found.example:
            raise InputError(f"{place}.example has no {spec.name!r}: want every input")
        tensors[spec.name] = as_tensor(spec, found.example[spec.name], f"{place}.example[{spec.name!r}]")
    return tensors


def as_tensor(spec: TensorSpec, value: Any, place: str) -> np.ndarray:
    """What code gave for a tensor, with the declared dtype and shape; floats may be rounded, nothing else is changed.

    Raises:
        InputError: It is something else.

    Example:
        >>> as_tensor(TensorSpec(name="y", dtype="float32", shape=[-1, 1]), [[1.0], [2.0]], "predict: 'y'").dtype
        dtype('float32')
        >>> as_tensor(TensorSpec(name="y", dtype="int64", shape=[-1, 1]), [[1.5]], "predict: 'y'")
        Traceback (most recent call last):
        millrace.core.errors.InputError: predict: 'y': want int64, got float64
    """
    wants = spec.array_dtype
    values = np.asarray(value, dtype=object if spec.dtype == "string" else None)
    if spec.dtype != "string" and values.dtype != wants:
        is_exact = isinstance(value, np.ndarray)
        casting = "same_kind" if is_exact or values.dtype.kind != "i" else "unsafe"
        if not np.can_cast(values.dtype, wants, casting=casting) or (
            values.dtype.kind == "f" and np.dtype(wants).kind != "f"
        ):
            raise InputError(f"{place}: want {spec.dtype}, got {values.dtype}")
        values = values.astype(wants)
    wanted = spec.shape
    fits = values.ndim == len(wanted) and all(w in (-1, g) for w, g in zip(wanted, values.shape, strict=True))
    if not fits:
        raise InputError(f"{place}: want shape {wanted}, got {list(values.shape)}")
    return values


def _items(given: Mapping[str, Any], key: str, place: str, usual: Any = None) -> list[tuple[str, Any]]:
    return [(str(name), one) for name, one in _mapping(given.get(key) or usual, f"{place}.{key}").items()]


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{place}: want names with values, got {type(value).__name__}")
    return value


def _sequence(value: Any, place: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{place}: want a list, got {type(value).__name__}")
    return value


def _positive(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{place}: want a number above 0, got {value!r}")
    return value


def _spec(name: str, given: Any, place: str, columns: Any) -> TensorSpec:
    place = f"{place}[{name!r}]"
    pair = list(_sequence(given, place))
    if len(pair) != 2:
        raise InputError(f'{place}: want (dtype, shape), for example ("float32", [-1, 4]), got {len(pair)} values')
    dtype, shape = pair[0], list(_sequence(pair[1], place))
    if dtype not in DTYPES:
        raise InputError(f"{place}: want one of {', '.join(DTYPES)}, got {str(dtype)[:40]!r}")
    if not shape or shape[0] != -1 or not all(type(size) is int and (size > 0 or size == -1) for size in shape):
        raise InputError(f"{place}: want a shape of whole numbers whose first is -1 (any number of rows), got {shape}")
    wanted: Any = {"dtype": dtype}
    return TensorSpec(name=name, shape=shape, columns=[str(one) for one in columns or []], **wanted)
