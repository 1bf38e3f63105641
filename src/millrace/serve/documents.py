"""The Open Inference Protocol's documents: metadata, configuration, statistics."""

from __future__ import annotations

from typing import Any

import msgspec

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.breaker import Breaker
from millrace.serve.metrics import BucketCounts, Metrics
from millrace.serve.racing import Calibration
from millrace.serve.tensors import DATATYPES


class _IndexRequest(msgspec.Struct):
    ready: bool = False


def server_metadata(version: str) -> dict[str, Any]:
    """`GET /v2`."""
    extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
    return {"name": "millrace", "version": version, "extensions": extensions}


def wants_ready(body: bytes) -> bool | None:
    """Whether a request for the index is for ready models alone; None: it is no such request.

    Example:
        >>> wants_ready(b'{"ready": true}'), wants_ready(b""), wants_ready(b"[")
        (True, False, None)
    """
    if not body.strip():
        return False
    try:
        return msgspec.json.decode(body, type=_IndexRequest).ready
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def model_metadata(name: str, versions: list[str], signature: Signature, platform: str) -> dict[str, Any]:
    """`GET /v2/models/{name}`. `platform`: what runs it, as its runtime says.

    Example:
        >>> value = TensorSpec(name="value", dtype="float32", shape=[-1, 1])
        >>> model = Signature(task="regression", inputs=[], outputs=[value], label="y")
        >>> model_metadata("m", ["1"], model, "python")["outputs"]
        [{'name': 'value', 'datatype': 'FP32', 'shape': [-1, 1]}]
    """

    def described(specs: list[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": spec.shape} for spec in specs]

    return {
        "name": name,
        "versions": versions,
        "platform": platform,
        "inputs": described(signature.inputs),
        "outputs": described(signature.outputs),
    }


def model_config(name: str, signature: Signature, max_batch: int, platform: str) -> dict[str, Any]:
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
        "platform": platform,
        "backend": platform.partition("_")[0],
        "max_batch_size": max_batch,
        "input": described(signature.inputs),
        "output": described(signature.outputs),
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }


def statistics(
    name: str, version: str, metrics: Metrics, calibration: Calibration | None = None, breaker: Breaker | None = None
) -> dict[str, Any]:
    """`GET /v2/models/{name}/stats`, in Triton's form, times in nanoseconds; what is ours alone under `millrace`.

    Example:
        >>> statistics("m", "1", Metrics())["model_stats"][0]["inference_count"]
        0
    """
    answered = metrics.latency.total - metrics.failures

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    def spent(counts: BucketCounts) -> dict[str, int]:
        return duration(counts.total, int(counts.sum * 1e9))

    split = metrics.split
    batches = [
        {
            "batch_size": rows,
            "compute_input": duration(0, 0),  # they are measured over all sizes
            "compute_infer": duration(calls, took_ns),
            "compute_output": duration(0, 0),
        }
        for rows, (calls, took_ns) in sorted(metrics.batches.items())
    ]
    model: dict[str, Any] = {
        "name": name,
        "version": version,
        "last_inference": metrics.last_inference_ms,
        "inference_count": metrics.rows,
        "execution_count": metrics.calls,
        "inference_stats": {
            "success": duration(answered, int(metrics.latency.sum * 1e9)),
            "fail": duration(metrics.failures, 0),
            "queue": spent(split["queue"]),
            "compute_input": spent(split["batch"]),
            "compute_infer": spent(split["compute"]),
            "compute_output": spent(split["serialize"]),
            "cache_hit": duration(metrics.hits, metrics.hit_ns),
            "cache_miss": duration(metrics.misses, metrics.miss_ns),
        },
        "batch_stats": batches,
    }
    ours: dict[str, Any] = {}
    if breaker is not None:
        ours["breaker"] = {"is_open": breaker.is_open, "failures": breaker.failures, "opened": breaker.opened}
    if calibration is not None:
        ours["calibration"] = msgspec.to_builtins(calibration)
    if ours:
        model["millrace"] = ours
    return {"model_stats": [model]}
