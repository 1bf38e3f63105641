"""ONNX files that want more than a model may, and weights with false headers: refused before anything runs them.

Where each comes from: external data of ONNX (CVE-2022-25882, CVE-2024-27318, CVE-2024-5187); addresses of memory as
places of data, in onnxruntime; CWE-674 and CWE-409 for what is nested or multiplies; CWE-190 for sizes.
"""

from __future__ import annotations

import os
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from millrace.control.foreign import check_onnx
from millrace.core.errors import CorruptError, InputError, MillraceError, NotFoundError, StageError
from millrace.formats.onnx_file import MAX_DEPTH, check_model
from millrace.formats.session import open_session
from millrace.testing.graphs import scaler, write_scaler
from millrace.train.torch_rebuild import _load_weights
from millrace.wiring import open_dispatcher


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def outside_tensor(**more: Any) -> TensorProto:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "../../etc/passwd"} | more).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def nested_graph(depth: int) -> onnx.GraphProto:
    """`If` in `If` in `If`."""
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["factor"], ["y"])], "leaf", [], [y])
    for _ in range(depth):
        branch = helper.make_node("If", ["flag"], ["y"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([branch], "g", [], [y])
        graph.node[0].attribute[1].g.ClearField("node")  # one side is enough: the file stays small
        graph.node[0].attribute[1].g.node.add(op_type="Identity", input=["factor"], output=["y"])
    return graph


def function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [helper.make_node(call, ["x"], [f"x{at}"], domain="own") for at, call in enumerate(calls)]
    nodes.append(helper.make_node("Identity", ["x"], ["y"]))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, imports)


def with_functions(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    model = scaler()
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.extend(functions)
    model.graph.node.append(helper.make_node(functions[0].name, ["x"], ["z"], domain="own"))
    return model


def hostile_models() -> dict[str, tuple[onnx.ModelProto | bytes, str]]:
    """Models by what is wrong with them, with a part of what is said."""
    found: dict[str, tuple[onnx.ModelProto | bytes, str]] = {}

    def case(what: str, says: str, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
        made = model or scaler()
        found[what] = (made, says)
        return made

    case("external initializer", "outside the graph").graph.initializer.append(outside_tensor())
    memory = outside_tensor(location="*/_ORT_MEM_ADDR_/*", offset="4096", length="4")
    case("external memory", "outside the graph").graph.initializer.append(memory)
    nowhere = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    case("external without a place", "outside the graph").graph.initializer.append(nowhere)
    hidden = outside_tensor()
    hidden.data_location = TensorProto.DEFAULT
    case("external that says it is not", "outside the graph").graph.initializer.append(hidden)
    constant = helper.make_node("Constant", [], ["c"], value=outside_tensor())
    case("external attribute", "outside the graph").graph.node.append(constant)
    inner = helper.make_graph([constant], "i", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    branch = helper.make_node("If", ["flag"], ["c2"], then_branch=inner, else_branch=inner)
    case("external subgraph", "outside the graph").graph.node.append(branch)
    own = function("f")
    own.node.append(constant)
    case("external function", "outside the graph", with_functions(own))
    unused = scaler()
    unused.functions.append(own)
    case("external function that nobody calls", "outside the graph", unused)
    sparse = onnx.SparseTensorProto(values=outside_tensor(), dims=[4])
    case("external sparse values", "outside the graph").graph.sparse_initializer.append(sparse)
    case("custom operator", "unknown domain 'evil'").graph.node.append(
        helper.make_node("Run", ["x"], ["z"], domain="evil")
    )
    for name in ("EPContext", "PythonOp"):
        node = helper.make_node(name, ["x"], ["z"], domain="com.microsoft", ep_cache_context="/tmp/evil.so")
        case(name, "from outside the file").graph.node.append(node)
    case("training", "training").training_info.add()
    case("a newer ONNX", "the ONNX version 9999").ir_version = 9999
    case("an unknown opset", "version 9999 of the operators").opset_import[0].version = 9999
    case("two versions of operators", "two versions").opset_import.append(helper.make_opsetid("ai.onnx", 9))
    case("deep graphs", "deeper than").graph.node.extend(nested_graph(MAX_DEPTH + 2).node)
    case("a function that calls itself", "calls itself", with_functions(function("f", "f")))
    case("functions in a circle", "calls itself", with_functions(function("f", "g"), function("g", "f")))
    levels = [function(f"f{at}", *[f"f{at + 1}"] * 8) for at in range(12)]
    case("functions that multiply", "more than", with_functions(*levels, function("f12")))
    chain = [function(f"f{at}", f"f{at + 1}") for at in range(400)]
    case("a long chain of functions", "deeper than", with_functions(*chain, function("f400")))
    case("two functions of one name", "two functions", with_functions(function("f"), function("f")))
    overflow = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1 << 40, 1 << 40])
    case("a size that overflows", "has the size").graph.initializer.append(overflow)
    negative = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[-1, -4], raw_data=bytes(16))
    case("a negative size", "has the size").graph.initializer.append(negative)
    short = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1 << 20], raw_data=bytes(4))
    case("less data than its size", "not a valid ONNX").graph.initializer.append(short)
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    thin = onnx.SparseTensorProto(values=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]), indices=indices)
    thin.dims.append(1 << 45)
    case("a sparse tensor of terabytes", "has the size").graph.sparse_initializer.append(thin)
    bomb = case("a constant of terabytes", "has the size").graph
    bomb.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 21], np.int64), "big"))
    bomb.node.append(helper.make_node("ConstantOfShape", ["big"], ["z"]))
    declared = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1 << 62, 1 << 62])
    case("a declared size", "has the size").graph.value_info.append(declared)
    case("an unknown operator", "not a valid ONNX").graph.node.append(helper.make_node("NoSuch", ["x"], ["z"]))
    case("no type", "not a valid ONNX").graph.input[0].type.Clear()
    case("an edge from nowhere", "not a valid ONNX").graph.node[0].input[0] = "nowhere"
    case("no graph", "no ONNX model").ClearField("graph")
    whole = scaler().SerializeToString()
    found["cut off"] = (whole[:-7], "no ONNX model")
    found["with other parts"] = (whole + bytes([0xA2, 0x3F, 4]) + b"more", "no ONNX model")
    found["a message in a message"] = (messages_in_messages(4000), "no ONNX model")
    return found


def messages_in_messages(depth: int) -> bytes:
    """Graphs in attributes of nodes, deeper than any parser goes."""
    data = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            size, rest = b"", len(data)
            while rest > 0x7F:
                size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
            data = tag + size + bytes([rest]) + data
    size, rest = b"", len(data)
    while rest > 0x7F:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    return b"\x08\x08\x3a" + size + bytes([rest]) + data + b"location"


@pytest.mark.parametrize("what", hostile_models())
def test_a_hostile_model_is_refused_before_anything_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model, says = hostile_models()[what]
    path = tmp_path / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("onnxruntime was asked to open it")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    with pytest.raises(InputError, match=says) as refused:
        check_onnx(path)
    assert refused.value.hint
    assert "\n" not in refused.value.message


def test_usual_models_are_taken(tmp_path: Path) -> None:
    usual = {
        "plain": scaler(),
        "with a function": with_functions(function("f", "g"), function("g")),
        "nested": scaler(),
    }
    fused = scaler()
    fused.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    fused.graph.node.append(helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft"))
    usual["fused"] = fused
    usual["nested"].graph.node.append(helper.make_node("Constant", [], ["flag"], value_ints=[1]))
    for what, model in usual.items():
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        session, data = check_onnx(path)
        assert session.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[2.0, 2.0]], what
        assert data == path.read_bytes()


def test_the_mark_of_outside_data_is_found_in_every_spelling() -> None:
    """Parsers cut the number of an enumeration to 32 bits: 2**32 + 1 means 1 to them."""
    model = scaler()
    model.graph.initializer.append(outside_tensor())
    data = model.SerializeToString()
    at = data.rindex(b"\x70\x01")
    long = b"\x70" + bytes([0x81, 0x80, 0x80, 0x80, 0x10])
    assert onnx.TensorProto.FromString(long).data_location == TensorProto.EXTERNAL, "so it is for the parser"
    tensor, lengthened = outside_tensor().SerializeToString(), outside_tensor().SerializeToString().replace(
        b"\x70\x01", long
    )  # fmt: skip
    graph = model.graph.SerializeToString().replace(
        bytes([len(tensor)]) + tensor, bytes([len(lengthened)]) + lengthened
    )
    assert at > 0
    spelled = b"\x08\x08" + b"\x3a" + bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph + b"\x42\x02\x10\x11"
    assert onnx.ModelProto.FromString(spelled).graph.initializer[1].data_location == TensorProto.EXTERNAL
    with pytest.raises(CorruptError, match="outside the graph"):
        open_session(spelled)
    with pytest.raises(InputError, match="outside the graph"):
        check_model(spelled, "m")


def test_messages_in_messages_are_no_recursion() -> None:
    with pytest.raises(CorruptError):
        open_session(messages_in_messages(4000))


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_a_damaged_model_ends_in_one_coded_error_or_is_one(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: int
) -> None:
    data = bytearray(scaler().SerializeToString())
    data[place % len(data)] = value
    if cut < len(data) // 2:
        del data[len(data) - cut :]
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(bytes(data))
    code = "none"
    try:
        check_onnx(path)
    except MillraceError as error:
        code = error.code
    assert code in ("none", "input.invalid", "artifact.corrupt")


def test_a_loop_without_an_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid, known operators, and 2**62 turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Mul", ["v", "one"], ["w"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []), helper.make_tensor_value_info("w", TensorProto.FLOAT, ["rows", 2])],
    )  # fmt: skip
    model = scaler()
    model.graph.initializer.extend([
        helper.make_tensor("turns", TensorProto.INT64, [], [1 << 62]), helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    ])  # fmt: skip
    model.graph.node[0].output[0] = "scaled"
    model.graph.node.append(helper.make_node("Loop", ["turns", "yes", "scaled"], ["y"], body=body))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr("millrace.control.foreign.TRIAL_S", 0.2)
    with closing(open_dispatcher(str(tmp_path / "home"))) as home:
        with pytest.raises(StageError, match=r"m\.onnx failed"):
            home.call("model.register", {"path": str(tmp_path / "m.onnx")})
        assert home.call("model.list", {}) == []


def test_a_loop_that_one_row_makes_endless_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows are answered at once; a later one says how often the loop turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Identity", ["v"], ["w"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []), helper.make_tensor_value_info("w", TensorProto.FLOAT, ["rows", 2])],
    )  # fmt: skip
    model = scaler()
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node[0].output[0] = "scaled"
    model.graph.node.extend([
        helper.make_node("ReduceMax", [model.graph.input[0].name], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "yes", "scaled"], ["y"], body=body),
    ])  # fmt: skip
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    rows = ["1,1,0"] * 20
    monkeypatch.setattr("millrace.control.foreign.WHOLE_S", 0.2)
    with closing(open_dispatcher(str(tmp_path / "home"))) as home:
        request = {"path": str(tmp_path / "m.onnx"), "data": str(tmp_path / "d.csv"), "label": "z"}
        (tmp_path / "d.csv").write_text("\n".join(["a,b,z", *rows, "1e18,1,0"]))
        with pytest.raises(StageError, match=r"m\.onnx failed"):
            home.call("model.register", request)
        monkeypatch.setattr("millrace.control.foreign.WHOLE_S", 60.0)
        (tmp_path / "d.csv").write_text("\n".join(["a,b,z", *rows, "2,1,0"]))
        home.call("model.register", request)


def test_size_limits_and_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.formats.onnx_file.MAX_MODEL_BYTES", 10)
    with pytest.raises(InputError, match="want at most 10"):
        check_onnx(write_scaler(tmp_path / "m.onnx"))
    os.mkfifo(tmp_path / "pipe.onnx")  # whoever opens it to read would wait for ever
    for path, kind in ((tmp_path / "pipe.onnx", InputError), (Path("/dev/zero"), InputError), (tmp_path, NotFoundError),
                       (tmp_path / "gone.onnx", NotFoundError), (tmp_path / "m.onnx/x", NotFoundError)):  # fmt: skip
        with pytest.raises(kind):
            check_onnx(path)


@pytest.mark.parametrize("data", [
    safetensors(b"{}", length=1 << 62), safetensors(b"{" * 100), safetensors(b'{"a":1}'), b"\x01", b"",
    safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(4)),
    safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}', bytes(6)),
    safetensors(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}'),
    safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)),
    safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4) + b"PK\x03\x04 and more"),
])  # fmt: skip
def test_weights_with_a_false_header_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match="cannot be read"):
        _load_weights(torch.nn.Linear(1, 1), tmp_path / "weights.safetensors", "model.py")
