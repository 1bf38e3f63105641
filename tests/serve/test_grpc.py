"""gRPC with NVIDIA's client, unmodified, against a live server; and what only gRPC has."""

from __future__ import annotations

import asyncio
import json
import queue
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from millrace.formats.session import open_session
from millrace.serve.grpc.messages import message_type
from millrace.serve.listen import bind
from millrace.serve.process import ServerProcess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tritonclient.grpc as triton
    import tritonclient.grpc.aio as triton_aio
    from tritonclient.utils import InferenceServerException

SERVICE = "/inference.GRPCInferenceService/"
Request = message_type("ModelInferRequest")
Response = message_type("ModelInferResponse")


@pytest.fixture(scope="module")
def live(kit: Any, digits_bundle: Path) -> Iterator[Any]:
    live = kit.Live(kit.child_config(digits_bundle, grpc_port=0))
    yield live
    assert live.process.exit_code is None
    assert live.process.stop() == 0


@pytest.fixture(scope="module")
def address(live: Any) -> str:
    return f"127.0.0.1:{live.process.grpc_port}"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = triton.InferenceServerClient(address)
    yield client
    client.close()


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture(scope="module")
def offline(digits_bundle: Path) -> Any:
    session = open_session(digits_bundle / "model.onnx")
    return lambda pixels: session.run({"pixels": pixels})["probabilities"]


def tensor_of(pixels: np.ndarray) -> Any:
    tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    return tensor


def test_documents(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "3")
    metadata = client.get_server_metadata()
    assert (metadata.name, "statistics" in metadata.extensions) == ("millrace", True)
    model = client.get_model_metadata("digits")
    assert [(one.name, one.datatype, list(one.shape)) for one in model.inputs] == [("pixels", "FP32", [-1, 64])]
    config = client.get_model_config("digits").config
    assert (model.platform, config.platform) == ("onnxruntime_onnx", "onnxruntime_onnx")
    assert (config.backend, list(config.output[0].dims)) == ("onnxruntime", [10])
    (entry,) = client.get_model_repository_index().models
    assert (entry.name, entry.version, entry.state) == ("digits", "3", "READY")


def test_infer_and_statistics(client: Any, kit: Any, offline: Any) -> None:
    pixels = kit.make_pixels(7, seed=1)
    before = client.get_inference_statistics("digits").model_stats[0].inference_count
    result = client.infer("digits", [tensor_of(pixels)], request_id="a7")
    np.testing.assert_allclose(result.as_numpy("probabilities"), offline(pixels), atol=1e-6)
    assert result.get_response().id == "a7"
    assert client.get_inference_statistics("digits").model_stats[0].inference_count == before + 7


def test_no_rows(client: Any) -> None:
    before = client.get_inference_statistics("digits").model_stats[0].execution_count
    answer = client.infer("digits", [tensor_of(np.zeros((0, 64), np.float32))]).as_numpy("probabilities")
    assert (answer.shape, answer.dtype) == ((0, 10), np.float32)
    assert client.get_inference_statistics("digits").model_stats[0].execution_count == before


def test_typed_contents_are_answered_typed(channel: grpc.Channel, kit: Any, offline: Any) -> None:
    pixels = kit.make_pixels(2, seed=2)
    request = Request(model_name="digits")
    value = request.inputs.add(name="pixels", datatype="FP32", shape=[2, 64])
    value.contents.fp32_contents.extend(pixels.reshape(-1).tolist())
    response = Response.FromString(channel.unary_unary(SERVICE + "ModelInfer")(request.SerializeToString()))
    assert not response.raw_output_contents
    values = np.array(response.outputs[0].contents.fp32_contents, np.float32).reshape(2, 10)
    np.testing.assert_allclose(values, offline(pixels), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        ("ModelInfer", b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ("ModelInfer", Request(model_name="digits").SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT),
        ("ModelInfer", Request(model_name="nobody").SerializeToString(), grpc.StatusCode.NOT_FOUND),
        ("ModelInfer", Request(model_name="digits", model_version="9").SerializeToString(), grpc.StatusCode.NOT_FOUND),
        ("ModelConfig", b"", grpc.StatusCode.NOT_FOUND),
        ("Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
    ],
)
def test_errors(channel: grpc.Channel, method: str, data: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(SERVICE + method)(data)
    assert raised.value.code() == code


def test_a_wrong_tensor_is_named(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"input 'pixels': want shape \[-1, 64\]") as raised:
        client.infer("digits", [tensor_of(np.zeros((1, 63), np.float32))])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_fixed_model_is_loaded_but_not_unloaded(client: Any) -> None:
    client.load_model("digits")
    with pytest.raises(InferenceServerException, match="is not unloaded on request") as raised:
        client.unload_model("digits")
    assert raised.value.status() == "StatusCode.FAILED_PRECONDITION"
    assert client.is_model_ready("digits")


def test_a_stream_answers_in_order_and_survives_an_error(client: Any, kit: Any, offline: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for seed in range(20):
        client.async_stream_infer("digits", [tensor_of(kit.make_pixels(1, seed))], request_id=str(seed))
    client.async_stream_infer("digits", [tensor_of(np.zeros((1, 63), np.float32))])
    client.async_stream_infer("digits", [tensor_of(kit.make_pixels(1, 5))], request_id="last")
    got = [answers.get(timeout=10) for _ in range(22)]
    client.stop_stream()
    for seed, (result, error) in enumerate(got[:20]):
        assert error is None
        assert result.get_response().id == str(seed)
        np.testing.assert_allclose(result.as_numpy("probabilities"), offline(kit.make_pixels(1, seed)), atol=1e-6)
    assert "want shape" in str(got[20][1])
    assert got[21][0].get_response().id == "last"


def test_asyncio_client(address: str, kit: Any, offline: Any) -> None:
    async def ask() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(
                *[client.infer("digits", [tensor_of(kit.make_pixels(1, seed))]) for seed in range(32)]
            )
        return [result.as_numpy("probabilities") for result in results]

    for seed, values in enumerate(asyncio.run(ask())):
        np.testing.assert_allclose(values, offline(kit.make_pixels(1, seed)), atol=1e-6)


def test_a_deadline_reaches_the_queue(channel: grpc.Channel, live: Any, kit: Any) -> None:
    pixels = kit.make_pixels(1)
    request = Request(model_name="digits", raw_input_contents=[pixels.tobytes()])
    request.inputs.add(name="pixels", datatype="FP32", shape=[1, 64])
    request.parameters["timeout"].int64_param = 1  # a microsecond
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(SERVICE + "ModelInfer")(request.SerializeToString())
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    status, text = live.call("GET", "/metrics")
    assert status == 200
    assert 'code="504"' in text or 'status="504"' in text


def test_texts_raw_and_typed(kit: Any, table_bundle: Path) -> None:
    live = kit.Live(kit.child_config(table_bundle, name="prices", grpc_port=0))
    try:
        client = triton.InferenceServerClient(f"127.0.0.1:{live.process.grpc_port}")
        numbers = triton.InferInput("numbers", [2, 2], "FP32")
        numbers.set_data_from_numpy(np.array([[1, 2], [3, 4]], np.float32))
        texts = triton.InferInput("categories", [2, 1], "BYTES")
        texts.set_data_from_numpy(np.array([["a"], ["é"]], dtype=object))
        assert client.infer("prices", [numbers, texts]).as_numpy("value").tolist() == [[13.0], [7.0]]
        client.close()
        request = Request(model_name="prices")
        value = request.inputs.add(name="numbers", datatype="FP32", shape=[1, 2])
        value.contents.fp32_contents.extend([1, 2])
        value = request.inputs.add(name="categories", datatype="BYTES", shape=[1, 1])
        value.contents.bytes_contents.append(b"a")
        with grpc.insecure_channel(f"127.0.0.1:{live.process.grpc_port}") as channel:
            response = Response.FromString(channel.unary_unary(SERVICE + "ModelInfer")(request.SerializeToString()))
        assert list(response.outputs[0].contents.fp32_contents) == [13.0]
    finally:
        assert live.process.stop() == 0


def test_the_guard_is_asked(kit: Any, digits_bundle: Path, tmp_path: Path) -> None:
    token = "mr_" + "a" * 40
    tokens = tmp_path / "tokens"
    admin = "mr_" + "b" * 40
    tokens.write_text(f"{token}\n{admin} admin\n", encoding="utf-8")
    tokens.chmod(0o600)
    live = kit.Live(kit.child_config(digits_bundle, grpc_port=0, token_file=str(tokens)))
    try:
        pixels = kit.make_pixels(1)
        request = Request(model_name="digits", raw_input_contents=[pixels.tobytes()])
        request.inputs.add(name="pixels", datatype="FP32", shape=[1, 64])
        with grpc.insecure_channel(f"127.0.0.1:{live.process.grpc_port}") as channel:
            for method in ("ModelInfer", "ModelMetadata", "ServerMetadata", "RepositoryIndex", "RepositoryModelUnload"):
                for metadata in ([], [("authorization", "Bearer mr_wrong")]):
                    with pytest.raises(grpc.RpcError) as raised:
                        channel.unary_unary(SERVICE + method)(request.SerializeToString(), metadata=metadata)
                    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
            channel.unary_unary(SERVICE + "ServerLive")(b"")
            stream = channel.stream_stream(SERVICE + "ModelStreamInfer")
            (answer,) = stream(iter([request.SerializeToString()]))
            answer = message_type("ModelStreamInferResponse").FromString(answer)
            assert "no token was sent" in answer.error_message
            metadata = [("authorization", f"Bearer {token}")]
            data = channel.unary_unary(SERVICE + "ModelInfer")(request.SerializeToString(), metadata=metadata)
            assert Response.FromString(data).model_name == "digits"
            named = message_type("RepositoryModelLoadRequest")(model_name="digits").SerializeToString()
            for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                with pytest.raises(grpc.RpcError) as raised:
                    channel.unary_unary(SERVICE + method)(named, metadata=metadata)
                assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
            metadata = [("authorization", f"Bearer {admin}")]
            assert channel.unary_unary(SERVICE + "RepositoryModelLoad")(named, metadata=metadata) == b""
    finally:
        assert live.process.stop() == 0


def test_sixty_four_callers_each_get_their_own_answer(address: str, kit: Any, offline: Any) -> None:
    """Over four connections, with rows of different numbers; answers of more than a window among them."""
    pixels = [kit.make_pixels(1 + seed % 7 * (1 if seed % 16 else 400), seed) for seed in range(64)]
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(address, options=options) for _ in range(4)]
    for _ in range(3):
        calls = []
        for seed, rows in enumerate(pixels):
            request = Request(
                model_name="digits", id=str(seed) if seed % 2 else "", raw_input_contents=[rows.tobytes()]
            )
            request.inputs.add(name="pixels", datatype="FP32", shape=rows.shape)
            calls.append(channels[seed % 4].unary_unary(SERVICE + "ModelInfer").future(request.SerializeToString()))
        for seed, (call, rows) in enumerate(zip(calls, pixels, strict=True)):
            response = Response.FromString(call.result(timeout=20))
            assert response.id == (str(seed) if seed % 2 else "")
            values = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(-1, 10)
            np.testing.assert_allclose(values, offline(rows), atol=1e-6)
    for channel in channels:
        channel.close()


def test_certificates_of_server_and_client(kit: Any, digits_bundle: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    who = authority.issue_cert("lee@example.com", common_name="lee")
    live = kit.Live(kit.child_config(
        digits_bundle, grpc_port=0, tls_cert=str(tmp_path / "server.pem"), tls_client_ca=str(tmp_path / "ca.pem"),
        access_log=str(tmp_path / "access.jsonl"),
    ))  # fmt: skip
    try:
        pixels = kit.make_pixels(3000)
        request = Request(model_name="digits", raw_input_contents=[pixels.tobytes()])
        request.inputs.add(name="pixels", datatype="FP32", shape=pixels.shape)
        root, key = authority.cert_pem.bytes(), who.private_key_pem.bytes()
        chain = b"".join(part.bytes() for part in who.cert_chain_pems)
        place = f"localhost:{live.process.grpc_port}"
        with grpc.secure_channel(place, grpc.ssl_channel_credentials(root, key, chain)) as channel:
            data = channel.unary_unary(SERVICE + "ModelInfer")(request.SerializeToString(), timeout=20)
        assert len(Response.FromString(data).raw_output_contents[0]) == 3000 * 10 * 4
        with (
            grpc.secure_channel(place, grpc.ssl_channel_credentials(root)) as channel,
            pytest.raises(grpc.RpcError) as raised,
        ):
            channel.unary_unary(SERVICE + "ServerLive")(b"", timeout=20)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        assert live.process.stop() == 0
    (line,) = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text(encoding="utf-8").splitlines()]
    assert line["client"].startswith("CN=lee,")
    assert (line["path"], line["grpc_status"]) == (SERVICE + "ModelInfer", 0)


def test_processes_share_a_port(kit: Any, digits_bundle: Path) -> None:
    """Two processes answer at one port; one of them drains, and the calls of all who come after are answered."""
    with bind("127.0.0.1", 0) as listener, bind("127.0.0.1", 0) as spare:
        port = spare.getsockname()[1]
        spare.close()
        config = kit.child_config(digits_bundle, grpc_port=port)
        processes = [ServerProcess(config, listener=listener) for _ in range(2)]
        try:
            for process in processes:
                process.wait_ready()
            first = [_statistics(port) for _ in range(20)]
            assert processes[0].stop() == 0
            second = [_statistics(port) for _ in range(10)]
        finally:
            assert [process.stop() for process in processes] == [0, 0]
    assert first + second == ["digits"] * 30


def _statistics(port: int) -> str:
    """Over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        data = channel.unary_unary(SERVICE + "ModelStatistics")(b"", timeout=20)
    return message_type("ModelStatisticsResponse").FromString(data).model_stats[0].name
