"""Recipes on real small models: size, accuracy kept, prefix untouched, equal bytes, never the tools' defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from skl2onnx import to_onnx
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from millrace.compress.graph import PREFIX_KEY, parse_model, prefix_nodes, profile_graph
from millrace.compress.recipes import RECIPES, Material, quantize_statically, store_weights
from millrace.compress.trees import TrainingRows
from millrace.core.errors import CorruptError, InputError
from millrace.formats.session import open_session

BUILT = ["fp32-optimized", "int8-weights", "int8-dynamic", "int8-static"]


def material_of(data: bytes, digits: Any) -> Material:
    training = TrainingRows(digits.train, digits.train_labels, 10)
    return Material(data, digits.part(0, 256), training)


def answers(data: bytes, digits: Any) -> np.ndarray:
    return open_session(data).run(digits.test)["probabilities"].argmax(axis=1)


def constants(data: bytes) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in parse_model(data).graph.initializer}


@pytest.mark.parametrize("name", BUILT)
def test_the_mlp_keeps_its_answers(mlp: bytes, digits: Any, name: str) -> None:
    expected = digits.test_labels
    base, other = answers(mlp, digits), answers(RECIPES[name].build(material_of(mlp, digits)), digits)
    assert np.mean(base == expected) > 0.93
    assert np.mean(other == expected) >= np.mean(base == expected) - 0.02
    assert np.mean(base != other) <= 0.03


@pytest.mark.parametrize("name", ["int8-weights", "int8-dynamic", "int8-static"])
def test_int8_is_much_smaller_even_with_a_float_prefix(mlp: bytes, digits: Any, name: str) -> None:
    made = RECIPES[name].build(material_of(mlp, digits))
    prefix_bytes = 64 * 64 * 4
    assert (len(mlp) - prefix_bytes) / (len(made) - prefix_bytes) >= 3.5


def test_static_int8_of_a_cnn_is_per_channel_and_small(cnn: bytes, digits: Any) -> None:
    made = RECIPES["int8-static"].build(material_of(cnn, digits))
    assert len(cnn) / len(made) > 2.5
    scales = [value for name, value in constants(made).items() if name.endswith("_scale") and value.dims == [32]]
    assert scales, "the second convolution has 32 channels, so 32 scales"
    assert np.mean(answers(cnn, digits) != answers(made, digits)) <= 0.03


def test_static_int8_of_an_mlp_is_per_tensor(mlp: bytes, digits: Any) -> None:
    made = constants(RECIPES["int8-static"].build(material_of(mlp, digits)))
    scales = [value for name, value in made.items() if name.endswith("_scale")]
    assert len(scales) >= 3
    assert all(int(np.prod(value.dims)) == 1 for value in scales)


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
def test_weights_stay_in_seven_bits(mlp: bytes, cnn: bytes, digits: Any, name: str) -> None:
    for model in (mlp, cnn) if name == "int8-static" else (mlp,):
        made = constants(RECIPES[name].build(material_of(model, digits)))
        weights = [numpy_helper.to_array(value) for value in made.values() if value.data_type == onnx.TensorProto.INT8]
        large = [weight for weight in weights if weight.size >= 256]
        assert large
        assert max(int(np.abs(weight.astype(np.int32)).max()) for weight in large) <= 64


def test_activations_are_unsigned_not_the_tools_default(mlp: bytes, digits: Any) -> None:
    model = parse_model(RECIPES["int8-static"].build(material_of(mlp, digits)))
    tensors = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zero_points = [tensors[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points
    assert set(zero_points) == {onnx.TensorProto.UINT8}


def test_the_last_layer_is_not_squeezed_into_eight_bits(mlp: bytes, digits: Any) -> None:
    model = parse_model(RECIPES["int8-static"].build(material_of(mlp, digits)))
    producer = {name: node.op_type for node in model.graph.node for name in node.output}
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert producer[softmax.input[0]] == "Gemm"


def test_a_regressors_value_is_not_squeezed_either(regressor: bytes, digits: Any) -> None:
    made = RECIPES["int8-static"].build(material_of(regressor, digits))
    values = open_session(made).run(digits.test)["value"][:, 0]
    assert len(np.unique(values)) > 500  # 8 bits would give at most 256
    assert values.shape == (600,)


@pytest.mark.parametrize("name", ["int8-weights", "int8-dynamic", "int8-static"])
def test_the_prefix_is_left_alone(mlp: bytes, digits: Any, name: str) -> None:
    base = parse_model(mlp)
    assert any("preprocess" in node for node in prefix_nodes(base))
    before = numpy_helper.to_array(constants(mlp)["preprocess.weight"])
    floats = [
        numpy_helper.to_array(value)
        for value in constants(RECIPES[name].build(material_of(mlp, digits))).values()
        if value.data_type == onnx.TensorProto.FLOAT and list(value.dims) == [64, 64]
    ]
    assert any(np.array_equal(value, before) or np.array_equal(value, before.T) for value in floats)


def test_a_listed_prefix_is_left_alone_too(mlp: bytes, digits: Any) -> None:
    model = parse_model(mlp)
    hidden = next(node for node in model.graph.node if "hidden" in node.name and node.op_type == "Gemm")
    model.metadata_props.add(key=PREFIX_KEY, value=json.dumps([hidden.name]))
    made = store_weights(material_of(model.SerializeToString(), digits))
    assert constants(made)["hidden.weight"].data_type == onnx.TensorProto.FLOAT
    assert "middle.weight" not in constants(made)
    listed = {entry.key: entry.value for entry in parse_model(made).metadata_props}[PREFIX_KEY]
    assert json.loads(listed) == [hidden.name]


def test_stored_weights_err_by_at_most_half_a_step(mlp: bytes, digits: Any) -> None:
    made = constants(store_weights(material_of(mlp, digits)))
    before = numpy_helper.to_array(constants(mlp)["middle.weight"])
    scale = numpy_helper.to_array(made["middle.weight/scale"])
    after = numpy_helper.to_array(made["middle.weight/int8"]) * scale
    assert scale.shape == (256, 1)  # one per output channel: Gemm with transB
    assert np.all(np.abs(before - after) <= scale * 0.5001)


def test_stored_weights_are_folded_at_load(mlp: bytes, digits: Any, tmp_path: Path) -> None:
    path = tmp_path / "folded.onnx"
    open_session(store_weights(material_of(mlp, digits)), optimized_path=path)
    assert {node.op_type for node in onnx.load(path).graph.node}.isdisjoint({"Cast", "DequantizeLinear"})


@pytest.mark.parametrize("name", BUILT)
def test_names_and_dtypes_of_the_interface_stay(mlp: bytes, digits: Any, name: str) -> None:
    base, made = open_session(mlp), open_session(RECIPES[name].build(material_of(mlp, digits)))
    for before, after in zip(base.inputs + base.outputs, made.inputs + made.outputs, strict=True):
        assert (before.name, before.dtype, before.shape) == (after.name, after.dtype, after.shape)


def test_equal_bytes_whatever_the_hash_seed(mlp: bytes, digits: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(mlp)
    np.save(tmp_path / "rows.npy", digits.pixels[:128])
    script = (
        "import hashlib, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from millrace.compress.recipes import RECIPES, Material\n"
        "folder = Path(sys.argv[1])\n"
        "m = Material((folder / 'm.onnx').read_bytes(), {'pixels': np.load(folder / 'rows.npy')})\n"
        f"print([hashlib.sha256(RECIPES[n].build(m)).hexdigest() for n in {BUILT}])\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_no_paths_of_this_machine_in_the_bytes(mlp: bytes, digits: Any) -> None:
    material = material_of(mlp, digits)
    for name in BUILT:
        made = RECIPES[name].build(material)
        assert b"/tmp" not in made
        assert b".py" not in made


def test_dynamic_int8_is_refused_for_a_cnn(cnn: bytes) -> None:
    reason = RECIPES["int8-dynamic"].refuses(profile_graph(parse_model(cnn)))
    assert reason is not None
    assert "slower" in reason


def test_trees_are_not_quantised(forest: bytes) -> None:
    profile = profile_graph(parse_model(forest))
    assert profile.has_trees
    offered = [recipe.name for recipe in RECIPES.values() if recipe.refuses(profile) is None]
    assert offered == ["trees-60", "trees-25"]
    assert all(RECIPES[name].is_replacement for name in offered)


def test_a_forest_is_refitted_smaller(forest: bytes, digits: Any) -> None:
    made = RECIPES["trees-25"].build(material_of(forest, digits))
    assert len(made) < len(forest) / 2
    scores = open_session(made).run(digits.test)["probabilities"]
    assert scores.shape == (600, 10)
    assert np.allclose(scores.sum(axis=1), 1.0, atol=1e-4)
    assert np.mean(scores.argmax(axis=1) == digits.test_labels) > 0.9
    assert RECIPES["trees-25"].build(material_of(forest, digits)) == made


def ensemble(estimator: Any, pixels: np.ndarray, labels: np.ndarray, output: str) -> bytes:
    """A scikit-learn ensemble with one float output, behind a scaling prefix that must stay."""
    estimator.fit(pixels / 16.0, labels)
    options = {"zipmap": False} if output == "probabilities" else None
    model = to_onnx(estimator, pixels[:1], options=options, target_opset={"": 15, "ai.onnx.ml": 3})
    kept = model.graph.output[-1].name
    del model.graph.output[:-1]
    model.graph.output[0].name = output
    source = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["scaled" if name == source else name for name in node.input]
        node.output[:] = [output if name == kept else name for name in node.output]
    model.graph.input[0].name = "pixels"
    model.graph.initializer.append(numpy_helper.from_array(np.array([16.0], np.float32), "sixteen"))
    scale = onnx.helper.make_node("Div", ["pixels", "sixteen"], ["scaled"], name="preprocess/scale")
    nodes = [scale, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def test_a_regression_forest_is_refitted_behind_its_prefix(digits: Any) -> None:
    labels = digits.train_labels.astype(np.float32)
    forest = ensemble(RandomForestRegressor(40, random_state=0), digits.train["pixels"], labels, "value")
    made = RECIPES["trees-60"].build(Material(forest, digits.part(0, 64), TrainingRows(digits.train, labels, 0)))
    assert "preprocess/scale" in {node.name for node in parse_model(made).graph.node}
    assert len(made) < len(forest)
    truth = digits.test_labels
    errors = [np.abs(open_session(data).run(digits.test)["value"][:, 0] - truth).mean() for data in (forest, made)]
    assert errors[1] < errors[0] * 1.3


def test_a_binary_forest_is_refitted(digits: Any) -> None:
    labels = (digits.train_labels >= 5).astype(np.int64)
    model = RandomForestClassifier(40, random_state=0)
    forest = ensemble(model, digits.train["pixels"], labels, "probabilities")
    made = RECIPES["trees-25"].build(Material(forest, digits.part(0, 64), TrainingRows(digits.train, labels, 2)))
    scores = open_session(made).run(digits.test)["probabilities"]
    assert scores.shape == (600, 2)
    assert np.allclose(scores.sum(axis=1), 1.0, atol=1e-4)
    assert np.mean(scores.argmax(axis=1) == (digits.test_labels >= 5)) > 0.9


def test_a_refit_needs_training_rows_of_every_class(forest: bytes, digits: Any) -> None:
    recipe = RECIPES["trees-25"]
    with pytest.raises(InputError, match="no training rows"):
        recipe.build(Material(forest, digits.part(0, 10)))
    rows = digits.labels[:897] != 3
    training = TrainingRows({"pixels": digits.pixels[:897][rows]}, digits.labels[:897][rows], 10)
    with pytest.raises(InputError, match="no training row"):
        recipe.build(Material(forest, digits.part(0, 10), training))


def test_calibration_rows_shape_the_static_file(mlp: bytes, digits: Any) -> None:
    few = Material(mlp, {"pixels": digits.pixels[:256] * 0.5})
    assert quantize_statically(few) != quantize_statically(material_of(mlp, digits))


def test_bytes_that_are_no_model_are_named() -> None:
    with pytest.raises(CorruptError, match="not an ONNX file"):
        Material(b"GIF89a....", {})
