"""The transport-free data plane: admit, queue, run, count. HTTP (and gRPC later) only translate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np

from millrace.core.errors import InputError
from millrace.core.ports import Runtime
from millrace.core.types import Struct
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.admission import Admission, Refusal
from millrace.serve.batching import Batcher, Call, Job
from millrace.serve.metrics import Metrics
from millrace.serve.telemetry import Collector


class ModelInfo(Struct, frozen=True, kw_only=True):
    """How the served model is called."""

    name: str
    version: str
    variant: str = "fp32"


class DataPlane:
    """One served model. Everything here belongs to the event loop's thread.

    Args:
        info: The model's name.
        runtime: Loaded and ready; called from runner threads where a call is slow.
        signature: What the model reads and answers.
        admission: The bounded queue.
        batcher: Runs a `CheckedInfer` of the runtime.
        collector: Histograms of inputs and outputs; None counts nothing.
    """

    def __init__(
        self,
        info: ModelInfo,
        runtime: Runtime,
        signature: Signature,
        admission: Admission,
        batcher: Batcher,
        collector: Collector | None = None,
    ) -> None:
        self.info = info
        self.runtime = runtime
        self.signature = signature
        self.admission = admission
        self.batcher = batcher
        self.collector = collector
        self.metrics = Metrics()
        batcher.finish = self._finish

    @property
    def is_ready(self) -> bool:
        """Whether requests should come here."""
        return self.runtime.is_ready and not self.admission.is_draining

    def submit(self, job: Job, held_by_connection: int = 0) -> Refusal | None:
        """Queue a request.

        Args:
            job: Every input with the signature's dtype and shape (`oip` and `rows` see to that).
            held_by_connection: How many requests of its connection wait already.

        Returns:
            None when `job.done` will be called, once, on the loop; otherwise why it was refused.
        """
        refusal = self.admission.admit(job.size_bytes, held_by_connection)
        if refusal is None:
            self.batcher.submit(job)
        return refusal

    def cancel(self, job: Job) -> None:
        """The client is gone: the job is skipped if no call has taken it yet; `done` is not called."""
        if not job.is_cancelled and not job.is_done:
            job.is_cancelled = True
            self.admission.release(job.size_bytes)

    def _finish(self, batch: list[Job], calls: list[Call]) -> None:
        """The answers first, then the statistics."""
        now_ns = time.perf_counter_ns()
        metrics = self.metrics
        jobs = [job for job in batch if not job.is_cancelled]
        self.admission.release(sum([job.size_bytes for job in jobs]), len(jobs))
        for job in jobs:
            job.is_done = True
            job.done()
        metrics.latency.extend([(now_ns - job.enqueued_ns) * 1e-9 for job in jobs])
        if len(calls) != 1 or len(calls[0].jobs) != len(batch):  # what failed has no call
            metrics.failures += sum([job.error is not None for job in jobs])
        for call in calls:
            queue_ns = sum([call.start_ns - job.enqueued_ns for job in call.jobs])
            rows = sum([job.rows for job in call.jobs])
            metrics.observe_call(rows, call.end_ns - call.start_ns, queue_ns)
            if self.collector is not None:
                self.collector.add(call.tensors, call.outputs)


class CheckedInfer:
    """The runtime behind a check of the values: what is wrong fails its batch, which then runs singly.

    An image has no missing values: NaN or infinity in it is refused. In a table NaN means missing,
    infinity is refused. Checked for a whole batch at once, since a check per request costs as much as
    a small model.

    Args:
        runtime: The model.
        signature: Its inputs.
    """

    def __init__(self, runtime: Runtime, signature: Signature) -> None:
        self._infer = runtime.infer
        self._specs = [spec for spec in signature.inputs if spec.dtype in ("float32", "float64")]

    def __call__(self, tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            InputError: A value is not finite; names the tensor and the row.
        """
        for spec in self._specs:
            values = tensors[spec.name]
            flat = values.reshape(-1)
            # one product tells that all is finite; where squares overflow, the passes over the values decide
            if not math.isfinite(flat.dot(flat)) and not np.isfinite(values).all():
                check_finite(spec, values)
        return self._infer(tensors)


def check_finite(spec: TensorSpec, values: np.ndarray) -> None:
    """Refuse what the model cannot mean.

    Raises:
        InputError: Infinity, or NaN where there are no missing values.

    Example:
        >>> image = TensorSpec(name="pixels", dtype="float32", shape=[-1, 2], semantic="image")
        >>> check_finite(image, np.array([[0.0, 1.0], [np.nan, 1.0]], dtype=np.float32))
        Traceback (most recent call last):
        millrace.core.errors.InputError: input 'pixels': row 1 has nan: want finite numbers
    """
    bad = ~np.isfinite(values) if spec.semantic == "image" else np.isinf(values)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        shown = float(values[bad].reshape(-1)[0])
        raise InputError(f"input {spec.name!r}: row {row} has {shown}: want finite numbers")


def sample_of(signature: Signature, golden: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """A row to calibrate with: a golden one, else zeros and empty texts."""
    if golden:
        return {spec.name: np.asarray(golden[spec.name])[:1] for spec in signature.inputs}
    return {spec.name: _zeros(spec) for spec in signature.inputs}


def _zeros(spec: TensorSpec) -> np.ndarray:
    shape = [1, *[size if size > 0 else 1 for size in spec.shape[1:]]]
    if spec.dtype == "string":
        return np.full(shape, "", dtype=object)
    return np.zeros(shape, dtype=spec.dtype)
