"""The spec: what a `millrace.yaml` may say. Only `data.source` and `data.label` are required.

These structs are the language; `spec_errors` reports what breaks it, the rooms do what it says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from millrace.core.units import Share

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(gt=0, lt=1)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="lower-case name")]
SecretName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$", description="name of a secret")]
Columns = str | list[str]  # a name, a glob such as "p*", or a list of them
ColumnType = Literal["number", "category", "text", "date", "boolean", "image", "ignore"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the spec: unknown keys are errors."""


class Image(Section, frozen=True, kw_only=True):
    """Columns that together are one image, row by row, or files when the source is a folder."""

    columns: Columns = "*"
    shape: Annotated[list[PositiveInt], Meta(min_length=2, max_length=3)]


class DropDuplicates(Section, frozen=True, kw_only=True):
    """Keep the first of rows that are equal in `columns` (default: all of them)."""

    columns: Columns = "*"


class DropMissing(Section, frozen=True, kw_only=True):
    """Reject rows with a missing value in `columns`."""

    columns: Columns


class FillMissing(Section, frozen=True, kw_only=True):
    """Replace missing values; statistics come from the training rows only."""

    columns: Columns
    value: float | str | None = None
    strategy: Literal["mean", "median", "mode", "value"] = "median"


class Range(Section, frozen=True, kw_only=True):
    """Reject (or clip) rows whose number lies outside `min`…`max`."""

    columns: Columns
    min: float | None = None
    max: float | None = None
    action: Literal["reject", "clip"] = "reject"


class Allowed(Section, frozen=True, kw_only=True):
    """Reject rows whose value is not one of `values`."""

    columns: Columns
    values: list[Any]


class Cast(Section, frozen=True, kw_only=True):
    """Convert to a type; rows that cannot be converted are rejected."""

    columns: Columns
    type: Literal["number", "integer", "boolean", "text", "date"]


class Unit(Section, frozen=True, kw_only=True):
    """Multiply by `factor` and add `offset` (unit conversion); text like "12 kg" loses its unit first."""

    columns: Columns
    factor: float = 1.0
    offset: float = 0.0


class DateFormat(Section, frozen=True, kw_only=True):
    """Read dates written in any of `formats` (strptime); others are rejected."""

    columns: Columns
    formats: list[str]


class Outliers(Section, frozen=True, kw_only=True):
    """Reject numbers further than `k` interquartile ranges (or standard deviations) away."""

    columns: Columns
    method: Literal["iqr", "zscore"] = "iqr"
    k: PositiveFloat = 3.0


class NormalizeText(Section, frozen=True, kw_only=True):
    """Unicode NFC, trimmed and collapsed white space, optionally lower case."""

    columns: Columns
    lower: bool = False


class Pattern(Section, frozen=True, kw_only=True):
    """Reject rows whose text does not match the regular expression."""

    columns: Columns
    regex: str


class CleanRule(Section, frozen=True, kw_only=True):
    """Exactly one cleaning rule. A bare string is a rule with its defaults; a bare value is its columns."""

    drop_duplicates: DropDuplicates | UnsetType = UNSET
    drop_missing: DropMissing | UnsetType = UNSET
    fill_missing: FillMissing | UnsetType = UNSET
    range: Range | UnsetType = UNSET
    allowed: Allowed | UnsetType = UNSET
    cast: Cast | UnsetType = UNSET
    unit: Unit | UnsetType = UNSET
    date: DateFormat | UnsetType = UNSET
    outliers: Outliers | UnsetType = UNSET
    normalize_text: NormalizeText | UnsetType = UNSET
    pattern: Pattern | UnsetType = UNSET

    def chosen(self) -> tuple[str, Section]:
        """The rule's name and arguments.

        Example:
            >>> CleanRule(drop_duplicates=DropDuplicates()).chosen()[0]
            'drop_duplicates'
        """
        for name in self.__struct_fields__:
            arguments = getattr(self, name)
            if arguments is not UNSET:
                return name, arguments
        raise ValueError("a CleanRule without a rule")  # spec_errors refuses it before


class Expect(Section, frozen=True, kw_only=True):
    """What must hold after cleaning; comparisons such as ">=1000" or an exact number."""

    rows: int | str | None = None
    classes: int | str | None = None
    max_rejected: Share | None = None
    not_null: Columns | None = None
    unique: Columns | None = None
    columns: list[str] | None = None
    action: Literal["stop", "warn"] = "stop"


class Split(Section, frozen=True, kw_only=True):
    """Disjoint test, validation and training rows; counts (int) or shares (float, "20%").

    Default test: max(20 %, 600 rows), at most a third. Stable when rows are appended: a row's
    place depends on the hash of its key (`key`, else its content) and the seed.
    """

    test: int | float | str | None = None
    validation: int | float | str | None = None
    stratify: bool | None = None
    group: str | None = None
    time: str | None = None
    key: Columns | None = None
    seed: int = 0


class Data(Section, frozen=True, kw_only=True):
    """Where rows come from and what they must look like."""

    source: str | list[str]
    label: str
    format: Literal["auto", "csv", "parquet", "jsonl", "npz", "idx", "images"] = "auto"
    task: Literal["auto", "classification", "regression"] = "auto"
    image: Image | None = None
    types: dict[str, ColumnType] = {}
    ignore: list[str] = []
    encoding: str = "utf-8"
    null_values: tuple[str, ...] = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?")
    secrets: list[SecretName] = []
    clean: list[CleanRule] = []
    expect: Expect = Expect()
    split: Split = Split()


class Optimizer(Section, frozen=True, kw_only=True):
    """The optimiser and its parameters."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.01
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9


class EarlyStopping(Section, frozen=True, kw_only=True):
    """Stop after `patience` epochs without an improvement of more than `min_delta`."""

    patience: PositiveInt = 5
    min_delta: Annotated[float, Meta(ge=0)] = 0.0


class Train(Section, frozen=True, kw_only=True):
    """The model and how it is trained. `model`: auto, linear, boosting, or file.py:function."""

    model: str = "auto"
    framework: Literal["auto", "torch", "sklearn", "lightgbm"] = "auto"
    params: dict[str, Any] = {}
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 64
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "cosine", "one_cycle", "linear", "step"] = "constant"
    early_stopping: EarlyStopping | None = None
    clip_norm: PositiveFloat | None = None
    accumulate: PositiveInt = 1
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: PositiveInt = 1
    checkpoint_every_s: PositiveFloat = 5.0
    checkpoint_every_steps: PositiveInt | None = None
    tensorboard: bool = False
    seed: NonNegativeInt = 0


class Evaluate(Section, frozen=True, kw_only=True):
    """Metrics on the test rows; the first one decides."""

    metrics: list[str] = []
    confidence: Fraction = 0.95
    slices: list[str] = []


class Compress(Section, frozen=True, kw_only=True):
    """Smaller or faster variants, each under a guarantee."""

    variants: Literal["auto", "none"] | list[str] = "auto"
    max_drop: Share | None = None
    max_changed: Share = msgspec.field(default_factory=lambda: Share(0.05))
    confidence: Fraction = 0.95
    batch_sizes: Annotated[tuple[PositiveInt, ...], Meta(min_length=1, max_length=8)] = (1, 32)
    allow_replacement: bool = False


class Register(Section, frozen=True, kw_only=True):
    """Under which name, behind which alias, and when a new version may take it."""

    model: Name | None = None
    alias: Name = "champion"
    promote_if: Literal["not_worse", "better", "always", "never"] = "not_worse"
    margin: Share = msgspec.field(default_factory=lambda: Share(0.01))


class Cache(Section, frozen=True, kw_only=True):
    """Answers that are kept and given again for equal inputs; `entries: 0` keeps none."""

    entries: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    ttl_s: PositiveFloat = 300.0
    max_bytes: PositiveInt = 64 << 20


class Capture(Section, frozen=True, kw_only=True):
    """Requests that are kept with their answers, to label, check or train on: this share of them.

    Values of the columns in `mask` are never written; texts lose e-mail addresses and long numbers unless
    `find_personal` is false. On disk never more than `max_bytes` for each endpoint: the oldest parts go.
    """

    share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    mask: list[str] = []
    find_personal: bool = True
    max_bytes: Annotated[int, Meta(ge=1 << 16)] = 256 << 20


class Serve(Section, frozen=True, kw_only=True):
    """The endpoint that runs and `millrace serve` start.

    `threads` of one call, 0: found out by measuring; `slo_p99_ms`: batches take at most half of it. Nobody is let
    in behind `queue` requests or `queue_s` predicted seconds of work; `client_rate`: requests of one client per
    second, 0: any number.
    """

    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    max_batch: PositiveInt = 64
    queue: PositiveInt = 1024
    queue_s: PositiveFloat = 1.0
    client_rate: Annotated[float, Meta(ge=0)] = 0.0
    slo_p99_ms: PositiveFloat | None = None
    variant: str = "chosen"
    cache: Cache = Cache()
    capture: Capture = Capture()


class Monitor(Section, frozen=True, kw_only=True):
    """Drift: thresholds are calibrated to this share of false alarms per window."""

    false_alarms: Share = msgspec.field(default_factory=lambda: Share(0.02))
    window_rows: PositiveInt = 200
    enabled: bool = True


class Limits(Section, frozen=True, kw_only=True):
    """What one step may use."""

    memory: str | int | None = None
    wall_time: str | float | None = None


class StepSpec(Section, frozen=True, kw_only=True):
    """A user's own step: a Python function (`steps.py:clean`) or a script."""

    uses: str
    name: Name
    needs: list[Name] = []
    matrix: dict[str, list[Any]] = {}
    params: dict[str, Any] = {}
    secrets: list[SecretName] = []
    limits: Limits = Limits()


class Spec(Section, frozen=True, kw_only=True):
    """A whole `millrace.yaml`."""

    project: Name = "default"
    data: Data | None = None
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compress: Compress = msgspec.field(default_factory=Compress)
    register: Register = msgspec.field(default_factory=Register)
    serve: Serve = Serve()
    monitor: Monitor = msgspec.field(default_factory=Monitor)
    limits: Limits = Limits()
    steps: list[StepSpec] = []
