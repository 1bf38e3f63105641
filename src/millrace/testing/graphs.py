"""The smallest model that shows which one it is: y = x * factor. Needs `onnx`."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def scaler(factor: float = 2.0) -> onnx.ModelProto:
    """y = x * factor, on float32 rows of 2: the answer tells which model gave it.

    Example:
        >>> [node.op_type for node in scaler(3.0).graph.node]
        ['Mul']
    """
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scaler",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def fragile_scaler(factor: float = 2.0, limit: float = 1000.0) -> onnx.ModelProto:
    """The same, but a row with a value of the limit or more makes it fail.

    Example:
        >>> [node.op_type for node in fragile_scaler().graph.node]
        ['Mul', 'Div', 'Cast', 'Gather', 'Add']
    """
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "factor"], ["scaled"]),
            helper.make_node("Div", ["x", "limit"], ["share"]),
            helper.make_node("Cast", ["share"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["zero", "place"], ["nothing"]),
            helper.make_node("Add", ["scaled", "nothing"], ["y"]),
        ],
        "scaler",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor]),
         helper.make_tensor("limit", TensorProto.FLOAT, [1], [limit]),
         helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_scaler(path: Path, factor: float = 2.0) -> Path:
    """The same as a file, which is returned."""
    path.write_bytes(scaler(factor).SerializeToString())
    return path
