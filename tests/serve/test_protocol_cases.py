"""The same cases over REST with JSON, REST with binary tensors, and gRPC: the same tensors, or the same refusal."""

from __future__ import annotations

import http.client
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grpc
import ml_dtypes
import msgspec
import numpy as np
import pytest

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig, run_server
from millrace.serve.service import HttpLimits
from millrace.serve.tensors import DATATYPES, to_bytes

MODEL = "echo"
# one endpoint has one signature, which wants all of its inputs: a model for each dtype would be many servers
SPECS = [TensorSpec(name=f"x_{dtype}", dtype=dtype, shape=[-1, -1]) for dtype in DATATYPES]  # type: ignore[arg-type]
HELD = {"bfloat16": "float32"}  # numpy has no such dtype
SIGNATURE = Signature(
    task="regression", inputs=SPECS, label="y",
    outputs=[TensorSpec(name=spec.name.replace("x_", "y_"), dtype=spec.dtype, shape=spec.shape) for spec in SPECS],
)  # fmt: skip


class Echo:
    """Answers what it is asked."""

    is_ready = True

    def load(self) -> None:
        """Nothing."""

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name.replace("x_", "y_"): values for name, values in tensors.items()}

    def unload(self) -> None:
        self.is_ready = False


class Reply(NamedTuple):
    """Outputs by name, or why there are none."""

    outputs: dict[str, np.ndarray]
    status: int = 200
    error: str = ""
    id: str = ""


class Tensor(NamedTuple):
    """As a client sends it."""

    name: str
    values: np.ndarray
    shape: list[int] | None = None
    datatype: str | None = None

    @property
    def described(self) -> dict[str, Any]:
        kind = "string" if self.values.dtype == object else self.values.dtype.name
        return {
            "name": self.name,
            "datatype": self.datatype or DATATYPES[kind],
            "shape": list(self.values.shape) if self.shape is None else self.shape,
        }


def decoded(output: Mapping[str, Any], data: bytes | None) -> np.ndarray:
    dtype = next(dtype for dtype, datatype in DATATYPES.items() if datatype == output["datatype"])
    if dtype == "string":
        texts = output.get("data") or []
        position = 0
        while data and position < len(data):
            size = int.from_bytes(data[position : position + 4], "little")
            texts.append(data[position + 4 : position + 4 + size].decode())
            position += 4 + size
        return np.array(texts, dtype=object).reshape(output["shape"])
    if data is None:
        return np.array(output["data"], dtype=HELD.get(dtype, dtype)).reshape(output["shape"])
    if dtype == "bfloat16":
        return np.frombuffer(data, dtype=ml_dtypes.bfloat16).astype(np.float32).reshape(output["shape"])
    return np.frombuffer(data, dtype=dtype).reshape(output["shape"])


def blob_of(tensor: Tensor) -> bytes:
    if tensor.datatype == "BF16":
        return tensor.values.astype(ml_dtypes.bfloat16).tobytes()
    return to_bytes(tensor.values)


def post(port: int, body: bytes, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", f"/v2/models/{MODEL}/infer", body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response, data


def over_json(server: ServerProcess, tensors: list[Tensor], **extra: Any) -> Reply:
    inputs = [{**one.described, "data": one.values.reshape(-1).tolist()} for one in tensors]
    response, data = post(server.port, json.dumps({"inputs": inputs, **extra}).encode(), {})
    answer = json.loads(data)
    if response.status != 200:
        assert set(answer) == {"error"}
        return Reply({}, response.status, answer["error"])
    return Reply({one["name"]: decoded(one, None) for one in answer["outputs"]}, id=answer.get("id", ""))


def over_binary(server: ServerProcess, tensors: list[Tensor], **extra: Any) -> Reply:
    blobs = [blob_of(one) for one in tensors]
    inputs = [{**one.described, "parameters": {"binary_data_size": len(blob)}}
              for one, blob in zip(tensors, blobs, strict=True)]  # fmt: skip
    extra["parameters"] = {"binary_data_output": True, **extra.get("parameters", {})}
    head = json.dumps({"inputs": inputs, **extra}).encode()
    response, data = post(
        server.port, head + b"".join(blobs), {"Inference-Header-Content-Length": str(len(head))}
    )  # fmt: skip
    if response.status != 200:
        answer = json.loads(data)
        assert set(answer) == {"error"}
        return Reply({}, response.status, answer["error"])
    length = int(response.headers["Inference-Header-Content-Length"])
    answer = json.loads(data[:length])
    outputs: dict[str, np.ndarray] = {}
    for one in answer["outputs"]:
        size = one["parameters"]["binary_data_size"]
        outputs[one["name"]] = decoded(one, data[length : length + size])
        length += size
    assert length == len(data)
    return Reply(outputs, id=answer.get("id", ""))


STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}  # fmt: skip


def over_grpc(server: ServerProcess, tensors: list[Tensor], **extra: Any) -> Reply:
    from millrace.serve.grpc.messages import message_type

    request = message_type("ModelInferRequest")(model_name=MODEL, id=extra.get("id", ""))
    for one in tensors:
        request.inputs.add(**one.described)
        request.raw_input_contents.append(blob_of(one))
    for one in extra.get("outputs", []):
        request.outputs.add(name=one["name"])
    for key, value in extra.get("parameters", {}).items():
        field = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], field, value)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            answer = message_type("ModelInferResponse").FromString(call(request.SerializeToString()))
        except grpc.RpcError as error:
            return Reply({}, STATUSES[error.code()], error.details())  # type: ignore[attr-defined]
    outputs = {
        one.name: decoded({"datatype": one.datatype, "shape": list(one.shape)}, raw)
        for one, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
    return Reply(outputs, id=answer.id)


TRANSPORTS: dict[str, Callable[..., Reply]] = {"json": over_json, "binary": over_binary, "grpc": over_grpc}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    limits = HttpLimits(max_body_bytes=1 << 20)
    config = ChildConfig(server=ServerConfig(name=MODEL, version="1", port=0, grpc_port=0, limits=limits))
    server = ServerProcess(config, command=[sys.executable, __file__])
    server.wait_ready()
    yield server
    assert server.exit_code is None
    assert server.stop() == 0


@pytest.fixture(params=list(TRANSPORTS))
def ask(request: pytest.FixtureRequest, server: ServerProcess) -> Callable[..., Reply]:
    return lambda tensors, **extra: TRANSPORTS[request.param](server, tensors, **extra)


def extremes(dtype: str, columns: int) -> np.ndarray:
    if dtype == "string":
        return np.array(["", "é", "x" * 300, '"\\\n', "0"][:columns] * 2, dtype=object).reshape(2, columns)
    if dtype == "bool":
        return np.array([True, False, True, True, False][:columns] * 2, dtype=bool).reshape(2, columns)
    if dtype == "bfloat16":  # with 1/3, rounded to what it holds
        return np.array([-3.3895314e38, 3.3895314e38, 0, 1, 0.33398438][:columns] * 2, np.float32).reshape(2, columns)
    info: Any = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    return np.array([info.min, info.max, 0, 1, 7][:columns] * 2, dtype=dtype).reshape(2, columns)


def whole(columns: int = 5, rows: int = 2) -> list[Tensor]:
    return [Tensor(spec.name, extremes(spec.dtype, columns)[:rows], datatype=DATATYPES[spec.dtype]) for spec in SPECS]


def check(reply: Reply, tensors: list[Tensor]) -> None:
    assert (reply.status, reply.error) == (200, "")
    for one in tensors:
        given = reply.outputs[one.name.replace("x_", "y_")]
        assert given.shape == one.values.shape
        assert given.dtype == one.values.dtype
        assert given.tolist() == one.values.tolist()


@pytest.mark.parametrize("columns", [0, 1, 3, 5])
def test_every_dtype_and_dynamic_dimensions(ask: Any, columns: int) -> None:
    tensors = whole(columns)
    check(ask(tensors), tensors)


def test_rows_that_differ_are_told_apart(ask: Any) -> None:
    tensors = whole(rows=1)
    check(ask(tensors), tensors)


def test_no_rows_are_answered_with_none(ask: Any) -> None:
    reply = ask(whole(rows=0), id="r-0")
    assert (reply.status, reply.error, reply.id) == (200, "", "r-0")
    for spec in SIGNATURE.outputs:
        assert reply.outputs[spec.name].shape == (0, 0)  # its width would depend on the rows
        assert reply.outputs[spec.name].dtype == HELD.get(spec.dtype, "O" if spec.dtype == "string" else spec.dtype)


def test_bfloat16_is_rounded_where_it_comes_as_numbers(server: ServerProcess) -> None:
    tensors = replaced("x_bfloat16", Tensor("x_bfloat16", np.full((2, 1), 1 / 3, np.float32), datatype="BF16"))
    assert over_json(server, tensors).outputs["y_bfloat16"].tolist() == [[0.333984375]] * 2
    huge = replaced("x_bfloat16", Tensor("x_bfloat16", np.full((2, 1), 3.4e38, np.float32), datatype="BF16"))
    assert "BF16 cannot hold" in over_json(server, huge).error


@pytest.mark.parametrize(("dtype", "datatype"), [("float16", "FP16"), ("bfloat16", "BF16")])
def test_what_has_no_typed_contents_says_how_to_send_it(server: ServerProcess, dtype: str, datatype: str) -> None:
    from millrace.serve.grpc.messages import message_type

    request = message_type("ModelInferRequest")(model_name=MODEL)
    request.inputs.add(name=f"x_{dtype}", datatype=datatype, shape=[1, 1]).contents.fp32_contents.append(1.0)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(request.SerializeToString())
    assert f"'x_{dtype}': {datatype} has no typed contents: want raw_input_contents" in caught.value.details()


def test_id_outputs_and_parameters_that_nobody_knows(ask: Any) -> None:
    reply = ask(whole(), id="r-1", outputs=[{"name": "y_int64"}], parameters={"unknown": "x", "priority": 3})
    assert (reply.id, list(reply.outputs)) == ("r-1", ["y_int64"])


def replaced(name: str, tensor: Tensor | None) -> list[Tensor]:
    return [one for one in ((tensor if one.name == name else one) for one in whole()) if one is not None]


NUMBER = extremes("float32", 5)
CASES: dict[str, tuple[list[Tensor], dict[str, Any], int, str]] = {
    "unknown input": ([*whole(), Tensor("z", NUMBER)], {}, 400, "input 'z': unknown"),
    "missing input": (replaced("x_float32", None), {}, 400, "input 'x_float32': missing"),
    "given twice": ([*whole(), Tensor("x_float32", NUMBER)], {}, 400, "input 'x_float32': given twice"),
    "another datatype": (replaced("x_float32", Tensor("x_float32", NUMBER, datatype="FP64")), {}, 400, "want datatype FP32"),
    "unknown datatype": (replaced("x_float32", Tensor("x_float32", NUMBER, datatype="BF16")), {}, 400, "want datatype FP32"),
    "negative dimension": (replaced("x_float32", Tensor("x_float32", NUMBER, [-2, 5])), {}, 400, "'x_float32'"),
    "huge dimension": (replaced("x_float32", Tensor("x_float32", NUMBER, [2, 1 << 62])), {}, 400, "more elements"),
    "fewer values": (replaced("x_float32", Tensor("x_float32", NUMBER, [2, 6])), {}, 400, "'x_float32': want"),
    "rows fewer than none": (replaced("x_float32", Tensor("x_float32", NUMBER, [-1, 5])), {}, 400, "'x_float32'"),
    "no rows beside some": (replaced("x_float32", Tensor("x_float32", NUMBER[:0])), {}, 400, "same number of rows"),
    "bytes of another width": (
        replaced("x_bfloat16", Tensor("x_bfloat16", NUMBER, [2, 6], datatype="BF16")), {}, 400, "'x_bfloat16': want"),
    "another number of rows": (replaced("x_float32", Tensor("x_float32", NUMBER[:1])), {}, 400, "same number of rows"),
    "too few dimensions": (replaced("x_float32", Tensor("x_float32", NUMBER, [10])), {}, 400, "want shape [-1, -1]"),
    "unknown output": (whole(), {"outputs": [{"name": "z"}]}, 400, "'z' is unknown"),
    "bad time-out": (whole(), {"parameters": {"timeout": "x"}}, 400, "parameters.timeout"),
    "no time left": (whole(), {"parameters": {"timeout": 1}}, 504, "deadline"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_refusals_are_the_same(ask: Any, case: str) -> None:
    tensors, extra, status, part = CASES[case]
    reply = ask(tensors, **extra)
    assert reply.status == status
    assert part in reply.error


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("columns", [5, 9000])  # 9000: compressed beside the event loop
def test_compressed_answers(server: ServerProcess, encoding: str, is_binary: bool, columns: int) -> None:
    values = np.zeros((2, columns), np.int64)
    inputs = [
        {"name": spec.name, "datatype": DATATYPES[spec.dtype],
         "shape": [2, columns] if spec.dtype == "int64" else [2, 0], "data": values.reshape(-1).tolist() if spec.dtype == "int64" else []}
        for spec in SPECS
    ]  # fmt: skip
    body = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": is_binary}}).encode()
    response, data = post(
        server.port, zlib.compress(body), {"Content-Encoding": "deflate", "Accept-Encoding": encoding}
    )
    assert response.status == 200
    is_compressed = response.headers["Content-Encoding"] == encoding
    assert is_compressed or columns == 5
    data = zlib.decompress(data, 47) if is_compressed else data
    length = int(response.headers.get("Inference-Header-Content-Length", len(data)))
    answer = json.loads(data[:length])
    assert next(one["shape"] for one in answer["outputs"] if one["name"] == "y_int64") == [2, columns]
    assert len(data) - length == (values.nbytes if is_binary else 0)


def test_health_and_index(server: ServerProcess) -> None:
    def call(method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request(method, path, body)
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    assert call("GET", "/v2/health/live") == (200, {"live": True})
    assert call("GET", "/v2/health/ready") == (200, {"ready": True})
    entry = {"name": MODEL, "version": "1", "state": "READY", "reason": ""}
    for body in (None, b"{}", b'{"ready": true}'):
        assert call("POST", "/v2/repository/index", body) == (200, [entry])
    status, value = call("POST", "/v2/repository/index", b'{"ready": 1}')
    assert (status, set(value)) == (400, {"error"})
    assert call("POST", f"/v2/repository/models/{MODEL}/load")[0] == 200
    assert call("POST", f"/v2/repository/models/{MODEL}/unload")[0] == 409


if __name__ == "__main__":
    child = msgspec.json.decode(sys.stdin.buffer.read(), type=ChildConfig)
    sys.exit(run_server(child.server, Echo(), SIGNATURE, child.telemetry_fd))
