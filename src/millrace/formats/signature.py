"""A model's signature: named tensors with dtypes, shapes and what they mean."""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal[
    "bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool", "string",
]  # fmt: skip

_HELD_AS = {"bfloat16": "float32", "string": "object"}


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor. `shape[0]` is -1: any number of rows.

    `columns` names the dataset columns that stand side by side in the second dimension, in order;
    an image's raw pixels are one tensor [-1, height*width*channels] with `image` = its shape.
    """

    name: str
    dtype: Dtype
    shape: list[int]
    semantic: Literal["number", "category", "image", "text", "probabilities", "value", "unknown"] = "unknown"
    columns: list[str] = []
    image: list[int] | None = None

    @property
    def array_dtype(self) -> str:
        """What numpy holds it in: texts as objects, bfloat16, which it lacks, as float32.

        Example:
            >>> TensorSpec(name="x", dtype="bfloat16", shape=[-1, 2]).array_dtype
            'float32'
        """
        return _HELD_AS.get(self.dtype, self.dtype)


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs and outputs of a model and what its answers mean.

    Classification: output `probabilities` float32 [-1, classes], in the order of `classes`.
    Regression: output `value` float32 [-1, 1].
    """

    task: Literal["classification", "regression"]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    label: str
    classes: list[str] = []
    label_type: Literal["string", "integer", "number", "boolean"] = "string"

    @property
    def columns(self) -> list[str]:
        """Every dataset column the model reads, in order."""
        return [column for tensor in self.inputs for column in tensor.columns]
