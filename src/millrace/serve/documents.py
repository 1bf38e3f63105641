"""The Open Inference Protocol's documents: metadata, configuration, statistics."""

from __future__ import annotations

from typing import Any

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.metrics import Metrics
from millrace.serve.tensors import DATATYPES


def server_metadata(version: str) -> dict[str, Any]:
    """`GET /v2`."""
    extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
    return {"name": "millrace", "version": version, "extensions": extensions}


def model_metadata(name: str, versions: list[str], signature: Signature) -> dict[str, Any]:
    """`GET /v2/models/{name}`.

    Example:
        >>> value = TensorSpec(name="value", dtype="float32", shape=[-1, 1])
        >>> model = Signature(task="regression", inputs=[], outputs=[value], label="y")
        >>> model_metadata("m", ["1"], model)["outputs"]
        [{'name': 'value', 'datatype': 'FP32', 'shape': [-1, 1]}]
    """

    def described(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": spec.shape} for spec in specs]

    return {
        "name": name,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": described(signature.inputs),
        "outputs": described(signature.outputs),
    }


def model_config(name: str, signature: Signature, max_batch: int) -> dict[str, Any]:
    """`GET /v2/models/{name}/config`, Triton's model configuration; dims are without the rows."""

    def described(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_" + {"string": "STRING"}.get(spec.dtype, DATATYPES[spec.dtype]),
                "dims": spec.shape[1:] or [1],
            }
            for spec in specs
        ]

    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_batch,
        "input": described(signature.inputs),
        "output": described(signature.outputs),
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }


def statistics(name: str, version: str, metrics: Metrics) -> dict[str, Any]:
    """`GET /v2/models/{name}/stats`, in Triton's form; times in nanoseconds.

    Example:
        >>> statistics("m", "1", Metrics())["model_stats"][0]["inference_count"]
        0
    """
    answered = metrics.latency.total - metrics.failures

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    nothing = duration(0, 0)
    batches = [
        {
            "batch_size": rows,
            "compute_input": nothing,
            "compute_infer": duration(calls, metrics.batch_ns[rows]),
            "compute_output": nothing,
        }
        for rows, calls in sorted(metrics.batches.items())
    ]
    model = {
        "name": name,
        "version": version,
        "last_inference": metrics.last_inference_ms,
        "inference_count": metrics.rows,
        "execution_count": metrics.calls,
        "inference_stats": {
            "success": duration(answered, int(metrics.latency.sum * 1e9)),
            "fail": duration(metrics.failures, 0),
            "queue": duration(answered, metrics.queue_ns),
            "compute_input": nothing,
            "compute_infer": duration(metrics.calls, metrics.model_ns),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": batches,
    }
    return {"model_stats": [model]}
