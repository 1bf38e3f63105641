"""The records: frozen structs, the same in process, on disk and on the wire."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from millrace.core.states import RunState, StepState


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Frozen; unknown fields of stored data are ignored (strict on write, lenient on read)."""


class Artifact(Struct, frozen=True, kw_only=True):
    """One blob, or a tree: a JSON blob that lists (path, digest, size). The bytes never change."""

    digest: str
    size_bytes: int
    media_type: str = "application/octet-stream"


TREE_MEDIA_TYPE = "application/vnd.millrace.tree+json"


class TreeEntry(Struct, frozen=True, kw_only=True):
    """One file of a tree; `path` is relative, with forward slashes, sorted."""

    path: str
    digest: str
    size_bytes: int


class Record(Struct, frozen=True, kw_only=True):
    """A stored record. `version` is the row's version for compare-and-set: 0 before the first put."""

    kind: ClassVar[str] = ""
    id: str
    project: str = "default"
    created_at: float = 0.0
    version: int = 0


class Run(Record, frozen=True, kw_only=True):
    """One execution of a spec."""

    kind: ClassVar[str] = "run"
    name: str = ""
    spec_path: str = ""
    spec_text: str = ""
    overrides: list[str] = []
    state: RunState = "pending"
    started_at: float | None = None
    ended_at: float | None = None
    error: dict[str, Any] | None = None
    facts: dict[str, Any] = {}
    tags: dict[str, str] = {}


class Step(Record, frozen=True, kw_only=True):
    """One step of a run. `cache_key` identifies the work; equal keys have equal outputs."""

    kind: ClassVar[str] = "step"
    run_id: str
    name: str
    stage: str
    state: StepState = "pending"
    attempt: int = 0
    cache_key: str = ""
    key_parts: dict[str, str] = {}
    cached_from: str | None = None
    reason: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    outputs: dict[str, Artifact] = {}
    facts: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    log_path: str = ""


class DatasetVersion(Record, frozen=True, kw_only=True):
    """An immutable dataset."""

    kind: ClassVar[str] = "dataset_version"
    name: str
    number: int
    artifact: Artifact
    run_id: str | None = None
    facts: dict[str, Any] = {}


class ModelVersion(Record, frozen=True, kw_only=True):
    """An immutable model: a signed bundle and what was measured of it."""

    kind: ClassVar[str] = "model_version"
    name: str
    number: int
    bundle: Artifact
    signature: Artifact | None = None
    measurements: Artifact | None = None
    card: Artifact | None = None
    chosen_variant: str = "fp32"
    run_id: str | None = None
    source: str = "run"
    facts: dict[str, Any] = {}


class Alias(Record, frozen=True, kw_only=True):
    """A name for a model version; id is `model/alias`. Moved by compare-and-set, with history."""

    kind: ClassVar[str] = "alias"
    model: str
    name: str
    number: int
    history: list[dict[str, Any]] = []


class Endpoint(Record, frozen=True, kw_only=True):
    """A served model: what is wanted, and what was last seen."""

    kind: ClassVar[str] = "endpoint"
    name: str
    model: str
    alias: str | None = None
    number: int
    variant: str
    state: str = "desired"
    url: str | None = None
    pid: int | None = None
    facts: dict[str, Any] = {}


class Alert(Record, frozen=True, kw_only=True):
    """Something that a person should look at."""

    kind: ClassVar[str] = "alert"
    endpoint: str
    model: str
    number: int
    signal: str
    score: float
    threshold: float
    state: str = "open"
    title: str = ""
    facts: dict[str, Any] = {}


class Lease(Record, frozen=True, kw_only=True):
    """Who may write something; id is the leased name. `token` only grows: it fences old holders."""

    kind: ClassVar[str] = "lease"
    boot_id: str = ""
    pid: int = 0
    process_started: str = ""
    token: int = 0
    expires_at: float = 0.0
    held: bool = False


class Event(Struct, frozen=True, kw_only=True):
    """What happened; `seq` and `chain` are set once sealed."""

    at: float
    actor: str
    verb: str
    subject: str
    detail: dict[str, Any] = {}
    id: int | None = None
    seq: int | None = None
    chain: str | None = None


class MetricPoint(msgspec.Struct, frozen=True, array_like=True):
    """One value of one metric of one run."""

    run_id: str
    name: str
    step: int
    value: float
    at: float


RECORD_TYPES: dict[str, type[Record]] = {
    record.kind: record for record in (Run, Step, DatasetVersion, ModelVersion, Alias, Endpoint, Alert, Lease)
}
