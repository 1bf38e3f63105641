"""A model that Millrace did not train: model.onnx, and rows.parquet with labels `y`.

python make_model.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import polars
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier


def build(network: MLPClassifier, scale: float) -> onnx.ModelProto:
    """The network as a graph: raw pixels [rows, 64] in, probabilities [rows, 10] out."""
    nodes = [helper.make_node("Mul", ["pixels", "scale"], ["scaled"], name="preprocess/scale")]
    tensors = [numpy_helper.from_array(np.asarray(scale, dtype=np.float32), "scale")]
    last, layers = "scaled", list(zip(network.coefs_, network.intercepts_, strict=True))
    for index, (weights, bias) in enumerate(layers):
        is_last = index == len(layers) - 1
        tensors.append(numpy_helper.from_array(weights.astype(np.float32), f"weights{index}"))
        tensors.append(numpy_helper.from_array(bias.astype(np.float32), f"bias{index}"))
        nodes.append(helper.make_node("MatMul", [last, f"weights{index}"], [f"product{index}"], name=f"matmul{index}"))
        nodes.append(helper.make_node("Add", [f"product{index}", f"bias{index}"], [f"sum{index}"], name=f"add{index}"))
        operator, last = ("Softmax", "probabilities") if is_last else ("Relu", f"hidden{index}")
        nodes.append(helper.make_node(operator, [f"sum{index}"], [last], name=f"activation{index}"))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", len(network.classes_)])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def main(folder: Path) -> None:
    """Train, write both files, say how good it is."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(pixels, labels, test_size=0.4, random_state=0, stratify=labels)
    network = MLPClassifier((256, 128), max_iter=200, tol=1e-3, random_state=0).fit(train_x / 16.0, train_y)
    onnx.save(build(network, 1 / 16.0), folder / "model.onnx")
    columns = {f"p{index}": test_x[:, index].astype(np.float32) for index in range(64)}
    polars.DataFrame({**columns, "y": test_y}).write_parquet(folder / "rows.parquet")
    print(f"model.onnx: accuracy {network.score(test_x / 16.0, test_y):.1%} on the {len(test_y)} rows of rows.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
