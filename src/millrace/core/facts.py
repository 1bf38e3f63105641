"""Facts: what each stage reports. The CLI's lines, the report and the model card are made of these.

A stage returns one of these as plain data (`msgspec.to_builtins`). Numbers of time are in seconds,
sizes in bytes, shares between 0 and 1. Lists of samples are short (at most 12).
"""

from __future__ import annotations

from typing import Any, Literal

from millrace.core.types import Struct

Task = Literal["classification", "regression"]


class ColumnFacts(Struct, frozen=True, kw_only=True):
    """One column after cleaning."""

    name: str
    type: str  # number | category | text | date | boolean | image | ignore
    role: str  # feature | label | id | group | time | ignored
    missing: int = 0
    distinct: int = 0
    mean: float | None = None
    sd: float | None = None
    min: float | None = None
    max: float | None = None


class RejectedSample(Struct, frozen=True, kw_only=True):
    """One rejected row: why, and where it stood. `row` counts from 1 after the header."""

    rule: str
    reason: str  # "duplicate", "unlabelled", "range"…
    column: str | None
    value: Any
    file: str
    row: int
    record: dict[str, Any] = {}


class DataFacts(Struct, frozen=True, kw_only=True):
    """`data`: rows in = kept + rejected; kept = train + validation + test."""

    rows_in: int
    rows_kept: int
    rejected: int
    rejected_by_reason: dict[str, int]
    split: dict[str, int]  # train, validation, test
    task: Task
    label: str
    classes: dict[str, int] = {}  # label → kept rows, in the order of the classes
    label_histogram: dict[str, Any] = {}  # regression: {"edges": […], "counts": […]}
    columns: list[ColumnFacts] = []
    image: list[int] | None = None
    samples: list[RejectedSample] = []
    warnings: list[str] = []
    files: list[str] = []
    content_digest: str = ""  # of the rows in order, independent of the Parquet library


class EpochFacts(Struct, frozen=True, kw_only=True):
    """One epoch; validation score is the deciding metric."""

    epoch: int
    loss: float
    validation_loss: float | None = None
    validation_score: float | None = None
    learning_rate: float = 0.0
    duration_s: float = 0.0


class TrainFacts(Struct, frozen=True, kw_only=True):
    """`train`."""

    framework: str
    model: str  # "model.py:build", "boosting", "linear"
    metric: str  # name of the deciding metric
    epochs: list[EpochFacts] = []
    best_epoch: int | None = None
    best_score: float | None = None
    parameters: int = 0
    duration_s: float = 0.0
    device: str = "cpu"
    precision: str = "fp32"
    resumed_from_step: int | None = None
    candidates: list[dict[str, Any]] = []  # auto: name, score, chosen


class ExportFacts(Struct, frozen=True, kw_only=True):
    """`export`: ONNX equals the framework on `rows` real rows."""

    rows: int
    max_difference: float
    tolerance: float
    answers_equal: int
    exporter: str
    opset: int
    size_bytes: int


class MetricValue(Struct, frozen=True, kw_only=True):
    """A metric with its confidence interval."""

    name: str
    value: float
    low: float
    high: float
    higher_is_better: bool = True


class SliceFacts(Struct, frozen=True, kw_only=True):
    """The deciding metric where `column` has `value`."""

    column: str
    value: str
    rows: int
    score: float
    low: float
    high: float


class Mistake(Struct, frozen=True, kw_only=True):
    """One wrong (or worst) answer; `pixels` for images, else `record`."""

    row: int
    expected: Any
    predicted: Any
    confidence: float | None = None
    pixels: list[float] | None = None
    record: dict[str, Any] = {}


class EvaluateFacts(Struct, frozen=True, kw_only=True):
    """`evaluate`: the test rows; the first metric decides."""

    rows: int
    task: Task
    metrics: list[MetricValue]
    confidence: float
    slices: list[SliceFacts] = []
    confusion: list[list[int]] = []  # [expected][predicted]
    classes: list[str] = []
    mistakes: list[Mistake] = []
    image: list[int] | None = None
    baseline: float | None = None  # the same metric of always answering the commonest / the mean
    scatter: list[list[float]] = []  # regression: [expected, predicted], at most 500


class GuaranteeFacts(Struct, frozen=True, kw_only=True):
    """What a variant loses at most. `status`: certified | refused | undecided | not_tested."""

    status: str
    metric: str
    base_score: float
    score: float
    drop: float  # measured
    bound: float | None  # one-sided upper bound of the drop at `confidence`
    limit: float
    confidence: float
    rows: int
    changed: int  # answers that differ (regression: beyond a tolerance)
    changed_bound: float | None
    changed_limit: float
    rows_needed: int | None = None
    explanation: str = ""


class LatencyFacts(Struct, frozen=True, kw_only=True):
    """Measured interleaved with the base in one process; `speedup` is base / variant, with its interval."""

    batch_size: int
    p50_s: float
    speedup: float
    low: float
    high: float


class VariantFacts(Struct, frozen=True, kw_only=True):
    """One variant; the base is the first one, named fp32."""

    name: str
    size_bytes: int
    size_ratio: float
    snr_db: float | None
    guarantee: GuaranteeFacts | None
    latency: list[LatencyFacts] = []
    is_replacement: bool = False
    needs_vnni: bool = False
    note: str = ""  # "slower at batch 32", "did not load: …"


class CompressFacts(Struct, frozen=True, kw_only=True):
    """`compress`: the base first, then candidates in the order they were tested."""

    variants: list[VariantFacts]
    chosen: str
    why: str
    rows: int
    max_drop: float
    max_changed: float
    confidence: float
    threads: int
    cpu_flags: list[str] = []
    skipped: list[dict[str, str]] = []  # name, reason


class GateFacts(Struct, frozen=True, kw_only=True):
    """Challenger against champion on the same frozen rows. `verdict`: see `register.promote_if`."""

    verdict: Literal["first", "promoted", "kept", "undecided", "same", "waiting"]
    champion: str | None = None  # "digits v1"
    rows: int = 0
    wins: int = 0  # rows only the challenger gets right
    losses: int = 0
    ties: int = 0
    difference: float | None = None  # challenger − champion in the deciding metric
    bound: float | None = None  # one-sided bound of what is lost
    margin: float = 0.0
    confidence: float = 0.95
    looks: int = 1  # how often these rows have judged
    rows_needed: int | None = None
    explanation: str = ""


class RegisterFacts(Struct, frozen=True, kw_only=True):
    """`register`. `number`, `alias` and `signed_by` are set when control has recorded the version."""

    model: str
    gate: GateFacts
    variant: str = "fp32"  # what `serve` runs
    bundle_digest: str = ""
    number: int | None = None
    alias: str | None = None
    promoted: bool = False
    signed_by: str | None = None


class ServeFacts(Struct, frozen=True, kw_only=True):
    """`serve` inside a run: real requests to a real server on a free loopback port."""

    requests: int
    answered: int
    wrong: int  # answers that differ from the offline answer
    p50_s: float
    p99_s: float
    requests_per_s: float
    variant: str
    format: str = "json"
    ready_s: float = 0.0


class FeatureSignal(Struct, frozen=True, kw_only=True):
    """One feature's effect size against its threshold."""

    name: str
    score: float
    threshold: float


class DriftWindow(Struct, frozen=True, kw_only=True):
    """One window judged: `score` and `threshold` are of the strongest signal."""

    label: str  # "clean", "inverted", "shifted", or a time
    rows: int
    score: float
    threshold: float
    is_alert: bool
    top: list[FeatureSignal] = []
    scores: dict[str, float] = {}  # every feature, for the heat map


class MonitorFacts(Struct, frozen=True, kw_only=True):
    """`monitor` inside a run: quiet on clean rows, loud on damaged ones."""

    windows: list[DriftWindow]
    false_alarms: float  # asked for
    measured_false_alarms: float  # on held-out windows of the reference
    reference_rows: int
    window_rows: int
    image: list[int] | None = None
