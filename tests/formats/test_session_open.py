"""Opening graphs: only self-contained ones, errors that name the tensor, equal bits."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from millrace.core.errors import CorruptError, InputError, NotFoundError, StageError
from millrace.formats.session import open_session, refers_outside


def linear_model(weight_name: str = "weight") -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), weight_name)
    node = helper.make_node("MatMul", ["x", weight_name], ["y"], name="dense")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_runs_any_number_of_rows_and_describes_its_tensors() -> None:
    session = open_session(linear_model().SerializeToString())
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [("x", "float32", [-1, 3])]
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.outputs] == [("y", "float32", [-1, 2])]
    for rows in (0, 1, 5):
        x = np.ones((rows, 3), np.float32)
        assert session.run({"x": x})["y"].tolist() == [[6.0, 9.0]] * rows


def test_a_file_and_its_bytes_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(linear_model().SerializeToString())
    x = np.random.default_rng(0).random((4, 3)).astype(np.float32)
    assert np.array_equal(open_session(path).run({"x": x})["y"], open_session(path.read_bytes()).run({"x": x})["y"])


def test_one_thread_without_spinning_unless_told() -> None:
    options = open_session(linear_model().SerializeToString()).raw.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    spinning = open_session(linear_model().SerializeToString(), threads=2, spinning=True).raw.get_session_options()
    assert spinning.intra_op_num_threads == 2
    assert spinning.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def external_model(tmp_path: Path) -> Path:
    path = tmp_path / "external.onnx"
    onnx.save_model(linear_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_outside_the_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="files outside the graph"):
        open_session(external_model(tmp_path))


def test_outside_weights_are_found_in_attributes_and_subgraphs_too() -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    branch = helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    for node in (constant, branch):
        graph = helper.make_graph([node], "outer", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        assert refers_outside(helper.make_model(graph).SerializeToString())


def test_the_word_location_alone_is_harmless() -> None:
    session = open_session(linear_model(weight_name="location").SerializeToString())
    assert session.run({"x": np.ones((1, 3), np.float32)})["y"].shape == (1, 2)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_end_in_one_clear_error(data: bytes) -> None:
    with pytest.raises(CorruptError):
        open_session(data)
    with pytest.raises(CorruptError):
        open_session(data + b"location")


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_flipped_byte_never_escapes_as_another_error(position: int, flip: int) -> None:
    data = bytearray(linear_model().SerializeToString())
    data[position % len(data)] ^= flip
    with contextlib.suppress(CorruptError, StageError, InputError):
        open_session(bytes(data)).run({"x": np.ones((1, 3), np.float32)})


@pytest.mark.parametrize(
    "tensors",
    [
        {"z": np.ones((1, 3), np.float32)},
        {"x": np.ones((1, 3), np.float64)},
        {"x": np.ones((1, 4), np.float32)},
        {"x": np.ones(3, np.float32)},
        {"x": np.ones((1, 3), np.float32), "extra": np.ones(1)},
        {},
    ],
)
def test_wrong_tensors_name_what_is_wanted(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(StageError, match=r"want x float32\[-1, 3\]"):
        open_session(linear_model().SerializeToString()).run(tensors)


def test_missing_file_and_no_threads(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.onnx"):
        open_session(tmp_path / "nothing.onnx")
    with pytest.raises(InputError, match="at least one thread"):
        open_session(linear_model().SerializeToString(), threads=0)


def test_an_output_that_is_no_tensor_is_explained() -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    graph = helper.make_graph(
        [node],
        "sequence",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(InputError, match="tensor 'y' has type seq"):
        open_session(model.SerializeToString())
