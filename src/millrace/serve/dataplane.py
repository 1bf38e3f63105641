"""The transport-free data plane: admit, queue, run, count. HTTP (and gRPC later) only translate."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from millrace.core.errors import DeadlineError, InputError
from millrace.core.ports import Runtime
from millrace.core.types import Struct
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.admission import Admission, Refusal
from millrace.serve.batching import RUN_ERRORS, Batcher, Call, Job, Outputs
from millrace.serve.breaker import Breaker
from millrace.serve.capture import Recorder
from millrace.serve.clients import Client
from millrace.serve.metrics import Metrics
from millrace.serve.racing import Calibration
from millrace.serve.telemetry import Collector

_log = logging.getLogger(__name__)


class ModelInfo(Struct, frozen=True, kw_only=True):
    """How the served model is called."""

    name: str
    version: str
    variant: str = "fp32"


class Tunes(Protocol):
    """Measures a model while nobody asks it, and lets its plane go over to what is better."""

    @property
    def is_running(self) -> bool:
        """Whether it uses the processors now."""
        ...

    def tick(self, now_s: float, is_alone: bool) -> None:
        """Look whether it is quiet; `is_alone`: no other model is busy."""
        ...

    def stop(self, wait_s: float = 1.0) -> None:
        """No more measurements."""
        ...


@runtime_checkable
class SupportsPlatform(Protocol):
    """A runtime that says what it runs models with."""

    @property
    def platform(self) -> str:
        """As in the model's V2 metadata; what stands before its first underscore is the backend."""
        ...


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
        self.platform = runtime.platform if isinstance(runtime, SupportsPlatform) else "custom"
        self.metrics = Metrics()
        self.breaker = Breaker()
        self.sample: Mapping[str, np.ndarray] | None = None  # a right row, to try the model with
        self.recorder: Recorder | None = None  # keeps some requests with their answers
        self.examples: Mapping[str, np.ndarray] = {}  # rows that the model was tested with
        self.reference: Mapping[str, Any] = {}  # the profile of the rows that it learned from
        self._trial: asyncio.TimerHandle | None = None
        self.mirror: Callable[[Call], None] | None = None  # gets a copy of every call once it is answered
        self.closing: Callable[[], None] | None = None  # stops what else uses the runtime
        self.calibration: Calibration | None = None  # how the model is called
        self.tuner: Tunes | None = None  # looks for a better way while nobody asks
        batcher.finish = self._finish

    @property
    def is_ready(self) -> bool:
        """Whether requests should come here."""
        return self.runtime.is_ready and not self.admission.is_draining

    def refusal(self, size_bytes: int, held_by_connection: int = 0, client: Client | None = None) -> Refusal | None:
        """Why a request would be refused, before its body is looked at; nothing is counted.

        Args:
            size_bytes: Of its body.
            held_by_connection: How many requests of its connection wait already.
            client: Whose quota it is; None: nobody's.
        """
        return (
            self._unwell() if self.breaker.is_open else self.admission.refusal(size_bytes, held_by_connection, client)
        )

    def submit(self, job: Job, held_by_connection: int = 0) -> Refusal | None:
        """Queue a request.

        Args:
            job: Every input with the signature's dtype and shape (`oip` and `rows` see to that).
            held_by_connection: How many requests of its connection wait already.

        Returns:
            None when `job.done` will be called, once, on the loop; otherwise why it was refused.
        """
        if self.breaker.is_open:
            return self._unwell()
        if job.deadline_ns and (refusal := self._too_late(job)) is not None:
            return refusal
        refusal = self.admission.admit(job.size_bytes, held_by_connection, job.rows, job.client)
        if refusal is None:
            if job.rows:
                self.batcher.submit(job)
            else:
                asyncio.get_running_loop().call_soon(self._answer_nothing, job)
        return refusal

    def _answer_nothing(self, job: Job) -> None:
        """No rows for no rows: the model is not asked."""
        if job.is_cancelled:
            return
        self.admission.release(job.size_bytes, 1, 0)
        self.admission.release_client(job.client, 0)
        job.shared, job.start, job.is_done = Outputs(no_rows(self.signature)), 0, True
        job.done()

    def _too_late(self, job: Job) -> Refusal | None:
        """Why a job would miss its deadline behind what waits."""
        left_s = (job.deadline_ns - time.perf_counter_ns()) / 1e9
        wanted_s = self.admission.wait_s + self.batcher.cost.predict_s(job.rows)
        if wanted_s <= left_s:
            return None
        self.metrics.late += 1
        message = f"the answer is predicted in {wanted_s:.2g} s, after the deadline in {max(0.0, left_s):.2g} s"
        return Refusal(status=504, message=message)

    def _unwell(self) -> Refusal:
        now_s = time.monotonic()
        message = f"the model {self.info.name!r} only failed: it is not asked until it works again"
        return Refusal(status=503, message=message, retry_after_s=self.breaker.retry_after_s(now_s))

    def cancel(self, job: Job) -> None:
        """The client is gone: the job is skipped if no call has taken it yet; `done` is not called."""
        if not job.is_cancelled and not job.is_done:
            job.is_cancelled = True
            self.admission.release(job.size_bytes, 1, job.rows)
            self.admission.release_client(job.client, job.rows)

    def _finish(self, batch: list[Job], calls: list[Call]) -> None:
        """The answers first, then the statistics."""
        now_ns = time.perf_counter_ns()
        metrics, admission = self.metrics, self.admission
        jobs = [job for job in batch if not job.is_cancelled]
        rows = sum([job.rows for job in jobs])
        admission.release(sum([job.size_bytes for job in jobs]), len(jobs), rows)
        if admission.held:
            for job in jobs:
                admission.release_client(job.client, job.rows)
        for job in jobs:
            job.is_done = True
            job.done()
        serialize_ns = time.perf_counter_ns() - now_ns
        metrics.latency.extend([(now_ns - job.enqueued_ns) * 1e-9 for job in jobs])
        if len(calls) != 1 or len(calls[0].jobs) != len(batch):  # what failed has no call
            self._count_failures(batch, jobs)
        elif self.breaker.failures:
            self.breaker.succeeded()
        if calls and (admission.waiting or admission.busy_since_ns or admission.is_slow):
            admission.learn(rows, batch[0].enqueued_ns, now_ns)
        for call in calls:
            start_ns = call.start_ns
            waits_ns = [start_ns - job.enqueued_ns for job in call.jobs]
            rows = sum([job.rows for job in call.jobs])
            metrics.observe_call(rows, waits_ns, start_ns, call.joined_ns, call.end_ns, serialize_ns)
            serialize_ns = -1
            if self.collector is not None or self.mirror is not None or self.recorder is not None:
                self._pass_on(call)

    def _pass_on(self, call: Call) -> None:
        """To those that look at rows and answers."""
        if self.collector is not None and not self._told(self.collector.add, call.tensors, call.outputs):
            self.collector = None
        if self.mirror is not None and not self._told(self.mirror, call):
            self.mirror = None
        if self.recorder is not None and not self._told(self.recorder.take, call):
            self.recorder = None

    def _told(self, take: Callable[..., object], *what: Any) -> bool:
        """Whether it could take that; who cannot is asked no more, and requests are answered on."""
        try:
            take(*what)
        except RUN_ERRORS:
            _log.exception(
                "%s of %r failed and is off from now on", getattr(take, "__qualname__", take), self.info.name
            )
            return False
        return True

    # ------------------------------------------------------------------ a model that only fails

    def _count_failures(self, batch: list[Job], jobs: list[Job]) -> None:
        late = sum([isinstance(job.error, DeadlineError) for job in jobs])
        self.metrics.late += late
        self.metrics.failures += sum([job.error is not None for job in jobs]) - late
        for job in batch:
            if job.error is None:
                self.breaker.succeeded()
            elif not isinstance(job.error, InputError | DeadlineError) and self.breaker.failed():
                _log.error("the model %r failed %d times in a row: it is not asked until it works again; the last: %s",
                           self.info.name, self.breaker.failures, job.error)  # fmt: skip
                self._try()

    def _try(self) -> None:
        """Ask the model for a row that is right, of no client."""
        trial = _Trial(sample_of(self.signature, self.sample), self._tried)
        self.admission.count(trial.size_bytes, trial.rows)
        self.batcher.submit(trial)

    def _tried(self, error: Exception | None) -> None:
        wait_s = self.breaker.tried(error is None, time.monotonic())
        if error is None:
            _log.warning("the model %r works: requests are let in again", self.info.name)
        else:
            self._trial = asyncio.get_running_loop().call_later(wait_s, self._try)

    def close(self, wait_s: float) -> None:
        """Stop its threads; a call that takes longer is left behind. Then the runtime may be unloaded."""
        if self._trial is not None:
            self._trial.cancel()
        if self.closing is not None:
            self.closing()
        if self.tuner is not None:
            self.tuner.stop(wait_s)
        self.batcher.close(wait_s)
        if self.recorder is not None:
            self.recorder.close()


class _Trial(Job):
    """A row of no client, which shows whether the model works."""

    __slots__ = ("_tell",)

    def __init__(self, tensors: dict[str, np.ndarray], tell: Callable[[Exception | None], None]) -> None:
        super().__init__(tensors)
        self._tell = tell

    def done(self) -> None:
        """Tell."""
        self._tell(self.error)


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
        self._specs = [spec for spec in signature.inputs if spec.dtype in ("bfloat16", "float16", "float32", "float64")]

    def __call__(self, tensors: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            InputError: A value is not finite; names the tensor and the row.
        """
        for spec in self._specs:
            values = tensors[spec.name]
            flat = values.reshape(-1)
            # one product tells that all is finite; where squares overflow, the passes over the values decide
            try:
                product = flat.dot(flat)
            except RuntimeWarning:  # that it overflows, where warnings are errors
                product = math.inf
            if not math.isfinite(product) and not np.isfinite(values).all():
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


def no_rows(signature: Signature) -> dict[str, np.ndarray]:
    """What a model answers when it is asked nothing; a dimension that depends on the rows is 0.

    Example:
        >>> value = TensorSpec(name="value", dtype="float32", shape=[-1, 1])
        >>> no_rows(Signature(task="regression", inputs=[], outputs=[value], label="y"))["value"].shape
        (0, 1)
    """
    return {
        spec.name: np.empty([0, *[max(size, 0) for size in spec.shape[1:]]], dtype=spec.array_dtype)
        for spec in signature.outputs
    }


def _zeros(spec: TensorSpec) -> np.ndarray:
    shape = [1, *[size if size > 0 else 1 for size in spec.shape[1:]]]
    if spec.dtype == "string":
        return np.full(shape, "", dtype=object)
    return np.zeros(shape, dtype=spec.array_dtype)
