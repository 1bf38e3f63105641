"""The dossier of a model version: what records and facts say of it, by the headings of the EU AI Act's Annex IV.

Its JSON form is these structs. Nothing is made up: what is not recorded is absent, and stands under `missing` of
the heading that wants it.
"""

from __future__ import annotations

from millrace.core.environment import Environment
from millrace.core.facts import ColumnFacts, DriftWindow, GateFacts, MetricValue, SliceFacts, VariantFacts
from millrace.core.types import Struct

REGULATION = "Regulation (EU) 2024/1689, Annex IV"
NOT_RECORDED = "not recorded here: to be written by the provider"
TEXT_TAG = "annex-iv."  # a tag `annex-iv.5` of a version or its model is the provider's text under point 5


class DossierModel(Struct, frozen=True, kw_only=True):
    """What the version is. `description` is a note of people; `inputs` and `outputs` are tensors as text."""

    name: str
    version: int
    project: str
    created_at: float
    created_by: str
    source: str  # run, file, mlflow…
    format: str  # bundle: ONNX, loaded and verified here; opaque: kept, never loaded
    digest: str
    size_bytes: int
    variant: str  # what is served
    aliases: list[str]
    previous: int | None
    description: str
    task: str = ""
    label: str = ""
    classes: list[str] = []
    inputs: list[str] = []
    outputs: list[str] = []


class DossierData(Struct, frozen=True, kw_only=True):
    """The dataset that the version was trained and tested on. `files` are source files with the digests of their bytes.

    Samples of rows are left out: a dossier is handed to others.
    """

    name: str
    number: int | None
    digest: str
    content_digest: str
    files: dict[str, str]
    rules: dict[str, str]  # of the spec: cleaning, split, expectations
    rows_in: int
    rows_kept: int
    rejected_by_reason: dict[str, int]
    split: dict[str, int]
    task: str
    label: str
    classes: dict[str, int]
    columns: list[ColumnFacts]
    warnings: list[str]


class DossierTraining(Struct, frozen=True, kw_only=True):
    """How it was made. `code` are digests of the provider's code by file, `settings` what the spec says of training."""

    run: str
    started_at: float | None
    ended_at: float | None
    created_by: str
    framework: str
    model: str
    metric: str
    best_score: float | None
    parameters: int
    duration_s: float
    device: str
    precision: str
    code: dict[str, str]
    settings: dict[str, str]
    spec_text: str
    overrides: list[str]
    environment: Environment | None = None


class DossierPerformance(Struct, frozen=True, kw_only=True):
    """Figures on held-out rows with their intervals; the first metric decides, slices have it too."""

    rows: int
    confidence: float | None
    baseline: float | None
    metrics: list[MetricValue]
    slices: list[SliceFacts] = []
    classes: list[str] = []
    confusion: list[list[int]] = []


class DossierGuarantee(Struct, frozen=True, kw_only=True):
    """What each variant loses at most against the model as it was trained."""

    chosen: str
    why: str
    rows: int
    max_drop: float
    max_changed: float
    confidence: float
    variants: list[VariantFacts]


class DossierApproval(Struct, frozen=True, kw_only=True):
    """Who asked for a promotion, and who agreed."""

    alias: str
    state: str
    asked_at: float
    asked_by: str
    approved_by: tuple[str, ...]
    reason: str


class DossierMove(Struct, frozen=True, kw_only=True):
    """An alias came to this version, or left it."""

    alias: str
    at: float
    from_version: int | None
    to_version: int
    reason: str


class DossierPromotion(Struct, frozen=True, kw_only=True):
    """The gate's verdict, approvals and the history of aliases."""

    gate: GateFacts | None = None
    approvals: list[DossierApproval] = []
    moves: list[DossierMove] = []


class DossierChange(Struct, frozen=True, kw_only=True):
    """One thing that differs from the version before. `kind`: data, code, setting, package, metric."""

    kind: str
    name: str
    before: str | None
    after: str | None


class DossierChanges(Struct, frozen=True, kw_only=True):
    """What differs from version `since`; `note` says why nothing can be said."""

    since: int | None = None
    changes: list[DossierChange] = []
    note: str = ""


class DossierAlert(Struct, frozen=True, kw_only=True):
    """An alert about this version."""

    endpoint: str
    at: float
    signal: str
    score: float
    threshold: float
    state: str


class DossierMonitoring(Struct, frozen=True, kw_only=True):
    """How drift is watched: thresholds are calibrated on held-out rows; `windows` are its trial in the run."""

    reference_rows: int = 0
    window_rows: int = 0
    false_alarms: float | None = None  # asked for
    measured_false_alarms: float | None = None
    windows: list[DriftWindow] = []
    endpoints: list[str] = []
    alerts: list[DossierAlert] = []


class DossierSignature(Struct, frozen=True, kw_only=True):
    """Who signed the bundle's digest, and whether this home trusts the key now."""

    digest: str
    algorithm: str
    key: str
    is_trusted: bool
    note: str = ""


class DossierHeading(Struct, frozen=True, kw_only=True):
    """A point of Annex IV: which parts of the dossier belong to it, what people wrote, what they still have to."""

    point: int
    title: str
    parts: tuple[str, ...] = ()
    text: str = ""
    missing: tuple[str, ...] = ()


class Dossier(Struct, frozen=True, kw_only=True):
    """Everything that is recorded of a version. `schema` names this form; `written_at` is when it was put together."""

    schema: str = "millrace.dossier/1"
    regulation: str = REGULATION
    written_at: float
    model: DossierModel
    data: DossierData | None = None
    training: DossierTraining | None = None
    performance: DossierPerformance | None = None
    guarantee: DossierGuarantee | None = None
    promotion: DossierPromotion = DossierPromotion()
    changes: DossierChanges = DossierChanges()
    monitoring: DossierMonitoring = DossierMonitoring()
    signature: DossierSignature | None = None
    headings: tuple[DossierHeading, ...] = ()
