"""What can be asked of one model: V2, predictions as rows, documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from millrace.serve import documents
from millrace.serve.cache import CachedPlane
from millrace.serve.dataplane import DataPlane
from millrace.serve.exchange import Exchange
from millrace.serve.inference import Inference
from millrace.serve.page import HEADERS, HTML_TYPE, model_page, wants_page

Route = Callable[[Exchange], None]


class Routes:
    """The verbs of a data plane.

    Args:
        plane: What answers.
        max_body_bytes: Also of a body that comes compressed.
    """

    def __init__(self, plane: DataPlane, max_body_bytes: int) -> None:
        self.plane = plane
        self._requests = plane.metrics.requests
        self.inference = inference = Inference(plane, max_body_bytes)
        self.v2: dict[bytes, tuple[bytes, Route]] = {
            b"infer": (b"POST", inference.infer),
            b"ready": (b"GET", self._ready),
            b"": (b"GET", self._metadata),
            b"config": (b"GET", self._config),
        }
        self.v1: dict[bytes, tuple[bytes, Route]] = {
            b"predict": (b"POST", inference.predict),
            b"": (b"GET", self._status),
        }
        self.versions = [plane.info.version]  # of the endpoint, for the metadata

    def _json(self, exchange: Exchange, value: Any, status: int = 200) -> None:
        self._requests["other", status] += 1
        exchange.reply_json(status, value)

    def _ready(self, exchange: Exchange) -> None:
        ready = self.plane.is_ready
        self._json(exchange, {"name": self.plane.info.name, "ready": ready}, 200 if ready else 503)

    def _metadata(self, exchange: Exchange) -> None:
        info = self.plane.info
        plane = self.plane
        self._json(exchange, documents.model_metadata(info.name, self.versions, plane.signature, plane.platform))

    def _config(self, exchange: Exchange) -> None:
        plane, max_batch = self.plane, self.plane.batcher.max_batch
        self._json(exchange, documents.model_config(plane.info.name, plane.signature, max_batch, plane.platform))

    def statistics(self) -> list[dict[str, Any]]:
        """The model's V2 statistics."""
        plane = self.plane
        name, version = plane.info.name, plane.info.version
        return documents.statistics(name, version, plane.metrics, plane.calibration, plane.breaker)["model_stats"]

    def _status(self, exchange: Exchange) -> None:
        info = self.plane.info
        if wants_page(exchange.head.headers):
            self._requests["other", 200] += 1
            exchange.reply(200, model_page(self.plane).encode(), HTML_TYPE, HEADERS)
            return
        status = {"name": info.name, "version": info.version, "variant": info.variant, "ready": self.plane.is_ready}
        self._json(exchange, status)

    def _kept(self) -> dict[str, float]:
        """Of what is kept: answers, and requests."""
        plane, kept = self.plane, dict[str, float]()
        if isinstance(plane, CachedPlane):
            kept |= {"millrace_cache_entries": len(plane.answers), "millrace_cache_bytes": plane.answers.size_bytes}
        if plane.recorder is not None:
            kept |= {"millrace_captured_rows_total": plane.recorder.rows,
                     "millrace_capture_dropped_total": plane.recorder.dropped}  # fmt: skip
        return kept

    def exposition(self, is_denied: int) -> str:
        """The model's metrics in Prometheus' text format.

        Args:
            is_denied: How many of its requests were.
        """
        info, admission = self.plane.info, self.plane.admission
        gauges = {
            "millrace_queue_requests": admission.waiting,
            "millrace_queue_limit": admission.limit,
            "millrace_queue_predicted_seconds": admission.wait_s,
            "millrace_breaker_open": int(self.plane.breaker.is_open),
            "millrace_ready": int(self.plane.is_ready),
            "millrace_denied_total": is_denied,
            **self._kept(),
        }
        return self.plane.metrics.render(info.name, info.version, gauges)
