"""The prefix in NumPy and as ONNX nodes agree bit for bit."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from millrace.core.errors import DataError
from millrace.formats.dataset import ColumnSchema, Manifest, tensors
from millrace.formats.session import open_session
from millrace.train.graphs import Answer, assemble, canonical, prefix_names
from millrace.train.preprocess import MAX_CATEGORIES, Preprocess, plan_preprocess


def identity(width: list[int]) -> onnx.ModelProto:
    """A core that gives its features back, flat."""
    nodes = [helper.make_node("Flatten", ["features"], ["output"], name="flat")]
    ins = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", *width])]
    outs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["rows", None])]
    return helper.make_model(helper.make_graph(nodes, "core", ins, outs), opset_imports=[helper.make_opsetid("", 17)])


def column(name: str, kind: str, **values: object) -> ColumnSchema:
    return ColumnSchema(name=name, type=kind, role="feature", **values)  # type: ignore[arg-type]


def through_graph(manifest: Manifest, plan: Preprocess, arrays: dict[str, np.ndarray]) -> np.ndarray:
    width = int(np.prod(plan.shape))
    answer = Answer(kind="probabilities", classes=width, present=list(range(width)))
    graph = assemble(identity(plan.shape), tensors(manifest), plan, answer)
    return open_session(graph).run(arrays)["probabilities"]


MIXED = Manifest(
    columns=[
        column("a", "number", mean=1.5, sd=3.25, missing=2),
        column("b", "number", mean=1e6, sd=0.0),
        column("c", "category", categories=["x", "y", "ü z"]),
        column("empty", "number", missing=9),
        column("d", "category", categories=["0", "1"]),
        column("none", "category"),
    ],
    task="classification",
    label="label",
    classes=["no", "yes"],
)


@settings(max_examples=50, deadline=None)
@given(
    numbers=hnp.arrays(np.float32, (5, 3), elements=st.floats(-1e6, 1e6, width=32) | st.just(float("nan"))),
    words=st.lists(st.tuples(*[st.sampled_from(["x", "y", "ü z", "", "0", "new"])] * 3), min_size=5, max_size=5),
)
def test_mixed_features_agree_bit_for_bit(numbers: np.ndarray, words: list[tuple[str, ...]]) -> None:
    arrays = {"numbers": numbers, "categories": np.array(words, dtype=object)}
    plan = plan_preprocess(MIXED, arrays)
    features = plan.transform(arrays)
    assert np.isfinite(features).all()
    assert features.shape == (5, *plan.shape)
    assert np.array_equal(features, through_graph(MIXED, plan, arrays))


def test_missing_and_unknown_values_have_a_meaning() -> None:
    arrays = {
        "numbers": np.array([[np.nan, 1e6, 5.0]], np.float32),
        "categories": np.array([["", "1", "new"]], object),
    }
    features = plan_preprocess(MIXED, arrays).transform(arrays)[0]
    assert features.tolist() == [0.0, 0.0, 5.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", [[2, 3], [2, 3, 1], [2, 3, 4]])
def test_images_agree_bit_for_bit(shape: list[int], flat: bool) -> None:
    width = int(np.prod(shape))
    names = [f"p{index:02d}" for index in range(width)]
    columns = [column(name, "image", mean=float(index), sd=2.0) for index, name in enumerate(names)]
    manifest = Manifest(
        columns=columns, task="classification", label="y", classes=["a", "b"], image=shape, image_columns=names
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, width)).astype(np.float32)
    plan = plan_preprocess(manifest, {"pixels": pixels}, flat=flat)
    features = plan.transform({"pixels": pixels})
    assert np.array_equal(features.reshape(4, -1), through_graph(manifest, plan, {"pixels": pixels}))
    if not flat:
        image = pixels.reshape(4, *shape) if len(shape) == 3 else pixels.reshape(4, *shape, 1)
        scaled = (image.transpose(0, 3, 1, 2) - plan.mean[0]) * plan.scale[0]
        assert np.allclose(features, scaled, atol=1e-5)


def test_an_image_is_standardised_by_all_its_pixels() -> None:
    columns = [column("p0", "image", mean=0.0, sd=1.0), column("p1", "image", mean=4.0, sd=1.0)]
    manifest = Manifest(columns=columns, task="regression", label="y", image=[1, 2], image_columns=["p0", "p1"])
    plan = plan_preprocess(manifest, {})
    assert plan.mean == [2.0]
    assert plan.scale[0] == pytest.approx(1 / np.sqrt(5.0))


def test_of_many_categories_the_commonest_are_kept() -> None:
    words = [f"w{index:03d}" for index in range(200)]
    manifest = Manifest(columns=[column("c", "category", categories=words)], task="regression", label="y")
    values = np.array([[word] for word in words] + [["w199"]] * 3, object)
    plan = plan_preprocess(manifest, {"categories": values})
    assert len(plan.categories[0]) == MAX_CATEGORIES
    assert "w199" in plan.categories[0]
    assert plan.categories[0] == sorted(plan.categories[0])


def test_without_any_feature_it_says_so() -> None:
    with pytest.raises(DataError, match="no column can be a feature"):
        plan_preprocess(Manifest(columns=[column("t", "text")], task="regression", label="y"), {})


def test_the_graph_names_the_nodes_that_quantisers_leave_alone() -> None:
    plan = plan_preprocess(MIXED, {"categories": np.zeros((0, 3), object)})
    width = plan.shape[0]
    data = assemble(identity(plan.shape), tensors(MIXED), plan, Answer(kind="logits", classes=width))
    model = onnx.load_from_string(data)
    listed = json.loads(model.metadata_props[0].value)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert listed == prefix_names(model)
    assert "postprocess/softmax" in listed
    assert set(names) - set(listed) == {"model/flat"}


def test_paths_and_stack_traces_leave_no_bytes() -> None:
    def model(place: str) -> onnx.ModelProto:
        made = identity([2])
        made.producer_version = made.doc_string = made.graph.node[0].doc_string = place
        made.metadata_props.add(key="source", value=place)
        made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value=place)
        return made

    assert canonical(model("/home/a/model.py")) == canonical(model("/elsewhere/b.py"))


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-50, 50, width=32)))
def test_answers_in_numpy_are_probabilities(raw: np.ndarray) -> None:
    assert np.allclose(Answer(kind="logits", classes=4).finish(raw).sum(axis=1), 1.0, atol=1e-5)
    assert Answer(kind="value", mean=3.0, sd=2.0).finish(raw[:, 0]).shape == (3, 1)
