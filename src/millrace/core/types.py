"""The records: frozen structs, the same in process, on disk and on the wire."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

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


class Project(Record, frozen=True, kw_only=True):
    """What runs belong to. `project` (its key) never changes and is what runs carry; `name` may.

    `id` is a decimal number as text: MLflow clients know it as the experiment id; "0" is `default`.
    """

    kind: ClassVar[str] = "project"
    name: str
    tags: dict[str, str] = {}
    updated_at: float = 0.0
    deleted_at: float | None = None


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
    tags: dict[str, str] = {}  # set by Millrace itself; those of people are searchable values (`core.search`)
    created_by: str = ""
    deleted_at: float | None = None  # deleted, and still restorable until `system gc`


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
    environment: Artifact | None = None  # what it ran with: a `core.environment.Environment`


class DatasetVersion(Record, frozen=True, kw_only=True):
    """An immutable dataset."""

    kind: ClassVar[str] = "dataset_version"
    name: str
    number: int
    artifact: Artifact
    run_id: str | None = None
    facts: dict[str, Any] = {}


class Model(Record, frozen=True, kw_only=True):
    """A name in the registry; id is the name. `last_number` only grows: numbers are never used twice."""

    kind: ClassVar[str] = "model"
    name: str
    description: str = ""
    tags: dict[str, str] = {}
    last_number: int = 0
    updated_at: float = 0.0


class ModelVersion(Record, frozen=True, kw_only=True):
    """An immutable model: a signed bundle and what was measured of it.

    Description, tags, stage and state are notes of people and may change; nothing else does. A version
    with `format="opaque"` is a tree of files that Millrace keeps and never loads.
    """

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
    format: Literal["bundle", "opaque"] = "bundle"
    description: str = ""
    tags: dict[str, str] = {}
    stage: str = "None"
    state: str = "ready"
    state_text: str = ""
    source_uri: str = ""
    created_by: str = ""
    updated_at: float = 0.0


class LoggedModel(Record, frozen=True, kw_only=True):
    """A model that a run logged and nobody registered yet; id is `m-` and 32 hex digits."""

    kind: ClassVar[str] = "logged_model"
    name: str
    run_id: str | None = None
    state: str = "pending"
    model_type: str = ""
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    metrics: list[dict[str, Any]] = []
    updated_at: float = 0.0
    deleted_at: float | None = None


class RunLink(Record, frozen=True, kw_only=True):
    """A dataset that a run read, or a logged model that it wrote or read."""

    kind: ClassVar[str] = "run_link"
    run_id: str
    direction: Literal["input", "output"]
    target: Literal["dataset", "model"]
    name: str  # the dataset's name, or the logged model's id
    digest: str = ""
    facts: dict[str, Any] = {}  # dataset: source, source_type, schema, profile; model: step
    tags: dict[str, str] = {}


UPLOADS = "upload-"  # begins the owner of a file that was sent and belongs to nothing yet


class ArtifactFile(Record, frozen=True, kw_only=True):
    """A file kept with a run or a logged model; id is `owner/path`."""

    kind: ClassVar[str] = "artifact_file"
    owner: str  # a run id, or a logged model's id
    path: str  # relative, forward slashes
    artifact: Artifact


class Alias(Record, frozen=True, kw_only=True):
    """A name for a model version; id is `model/alias`. Moved by compare-and-set, with history."""

    kind: ClassVar[str] = "alias"
    model: str
    name: str
    number: int
    history: list[dict[str, Any]] = []


class Rollout(Struct, frozen=True, kw_only=True):
    """A candidate beside the version that an endpoint serves (`base`): what is wanted, and what was last seen.

    `label` is what the candidate is called as a version in requests and metrics. `steps` are its shares of the
    requests in percent, one after another; `is_held`: it is never promoted by itself. A shadow answers nobody.
    `facts` are the evidence of the canary test (`stats.canary.Evidence`) and what was counted.
    """

    id: str
    number: int
    variant: str = ""
    label: str
    base: int
    steps: tuple[float, ...] = (10.0,)
    step: int = 0
    is_shadow: bool = False
    is_held: bool = False
    state: Literal["starting", "running", "promoted", "aborted"] = "starting"
    reason: str = ""
    by: str = ""
    started_at: float = 0.0
    stepped_at: float = 0.0  # since when it has had its present share; 0: not yet
    ended_at: float | None = None
    facts: dict[str, Any] = {}

    @property
    def is_active(self) -> bool:
        """Whether the candidate is (to be) served."""
        return self.state in ("starting", "running")

    @property
    def weight(self) -> float:
        """The candidate's share of the requests now, in percent."""
        return 0.0 if self.is_shadow else self.steps[self.step]


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
    is_managed: bool = False  # kept by the server's loop; else it lives with the command that serves it
    is_isolated: bool = False  # a group of serving processes of its own
    min_replicas: int = 1  # of these processes; 0: none while nobody asks
    max_replicas: int = 1
    replicas: int = 0  # how many serve now
    threads: int = 1  # of one call; 0: found out by measuring
    slo_p99_ms: float | None = None
    text: str = ""  # why it is in this state
    rollout: Rollout | None = None  # the present one, or the last


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


class TrustedKey(Record, frozen=True, kw_only=True):
    """The public key of a home that works on these records: every other home on them trusts it. Its id is the key's."""

    kind: ClassVar[str] = "trusted_key"
    pem: str
    home: str = ""
    not_before: float | None = None
    not_after: float | None = None
    revoked_at: float | None = None  # what it has signed counts no more


class Token(Record, frozen=True, kw_only=True):
    """What a client proves itself with. `id` is the SHA-256 of the secret, which is kept nowhere.

    It acts for `user_name`, within its scopes: names of roles, each alone (everywhere) or as `role:project`.
    """

    kind: ClassVar[str] = "token"
    name: str
    prefix: str  # the first characters of the secret, so that its owner knows it again
    scopes: tuple[str, ...]
    user_name: str = ""  # "" is a token of nobody's: its scopes are all that it may
    made_by: str = ""  # another token of nobody's, which is the same person; "" where an owner made it
    is_once: bool = False  # sets the password of its user, and ends with that
    is_of_login: bool = False  # of a terminal that its user has signed in: ends as their sessions do
    work_id: str | None = None  # it is good for this work alone
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None  # to the minute


class WorkItem(Record, frozen=True, kw_only=True):
    """A work for whoever asks for one: written by a run's driver, claimed by a worker of another machine.

    `attempt` fences: what an earlier claimant says counts no more.
    """

    kind: ClassVar[str] = "work_item"
    run_id: str
    name: str
    work: dict[str, Any]
    project_tree: Artifact | None = None  # the folder of the spec
    state: Literal["queued", "claimed", "ended"] = "queued"
    attempt: int = 0
    worker: str = ""
    seen_at: float = 0.0  # when its worker was last heard
    received: int = 0  # frames that are stored
    cancel: Literal["", "ask", "now"] = ""


class WorkFrame(Record, frozen=True, kw_only=True):
    """Frames of a work on their way to its driver; `number` orders them."""

    kind: ClassVar[str] = "work_frame"
    work_id: str
    number: int
    frames: list[dict[str, Any]]


class User(Record, frozen=True, kw_only=True):
    """Somebody, or a service account. `id` is the name; events know it as `user:NAME`."""

    kind: ClassVar[str] = "user"
    name: str
    password: str = ""  # argon2id in its PHC form; "" has none: signs in elsewhere, or is a service account
    email: str = ""
    is_service: bool = False
    groups: tuple[str, ...] = ()  # of the identity provider, at the last sign-in
    external: str = ""  # `issuer|subject` of the identity provider
    totp: str = ""  # secret of the second factor, base32; "" has none
    totp_step: int = 0  # of the last code used: none is good twice
    failures: int = 0  # wrong passwords since the last right one
    not_before: float = 0.0  # no password is looked at before
    disabled_at: float | None = None


class Session(Record, frozen=True, kw_only=True):
    """A browser that has signed in. `id` is the SHA-256 of its cookie."""

    kind: ClassVar[str] = "session"
    user_name: str  # "" is about to sign in: `pending` says how
    csrf: str
    used_at: float
    expires_at: float
    pending: dict[str, str] = {}


class Role(Record, frozen=True, kw_only=True):
    """A custom role; `id` is the name. Patterns of operations, such as `model.*`; what is denied is denied."""

    kind: ClassVar[str] = "role"
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    description: str = ""


class RoleBinding(Record, frozen=True, kw_only=True):
    """Who has a role where. `principal` is `user:NAME` or `group:NAME`; `where` a project, or `*`."""

    kind: ClassVar[str] = "role_binding"
    principal: str
    role: str
    where: str = "*"


class Quota(Record, frozen=True, kw_only=True):
    """What a project may use; `id` is the project, absent bounds do not bind."""

    kind: ClassVar[str] = "quota"
    storage_bytes: int | None = None
    runs: int | None = None  # at once
    requests_per_s: float | None = None


class ApprovalRule(Record, frozen=True, kw_only=True):
    """Promotions of a project's models to an alias want so many other people. `id` is `project/alias`."""

    kind: ClassVar[str] = "approval_rule"
    alias: str
    needed: int = 1


class Approval(Record, frozen=True, kw_only=True):
    """A promotion that waits, or has been decided."""

    kind: ClassVar[str] = "approval"
    model: str
    alias: str
    number: int
    asked_by: str
    approved_by: tuple[str, ...] = ()
    state: Literal["waiting", "approved", "refused", "used"] = "waiting"
    reason: str = ""


class Secret(Record, frozen=True, kw_only=True):
    """A value that only steps see which ask for it. `id` is `project/name`; `sealed` is its ciphertext, base64."""

    kind: ClassVar[str] = "secret"
    name: str
    sealed: str
    number: int = 1  # goes up with every change
    changed_at: float = 0.0


class DataKey(Record, frozen=True, kw_only=True):
    """How a blob is encrypted. `id` is the digest of its plain bytes."""

    kind: ClassVar[str] = "data_key"
    stored: str  # digest of the ciphertext; the blob below
    wrapped: str  # the data key, wrapped by the key `kek`, base64; "" was erased
    kek: str
    size_bytes: int
    data_subject: str = ""  # whose data it is: erased together


class AuditHead(Record, frozen=True, kw_only=True):
    """A signed head of the Merkle tree over the sealed events (RFC 6962). `id` is the size with leading zeros."""

    kind: ClassVar[str] = "audit_head"
    size: int
    root: str
    chain: str  # of the event numbered `size`
    signature: str  # a signature document over the head, as text
    previous: str = ""  # digest of the head before, as it was signed
    nodes: tuple[str, ...] = ()  # of the complete subtrees: the tree goes on from here
    published: str = ""  # where it went to, as a digest; "" nowhere yet


RECORD_TYPES: dict[str, type[Record]] = {
    record.kind: record
    for record in (
        Project,
        Run,
        Step,
        DatasetVersion,
        Model,
        ModelVersion,
        LoggedModel,
        RunLink,
        ArtifactFile,
        Alias,
        Endpoint,
        Alert,
        Lease,
        TrustedKey,
        Token,
        WorkItem,
        WorkFrame,
        User,
        Session,
        Role,
        RoleBinding,
        Quota,
        ApprovalRule,
        Approval,
        Secret,
        DataKey,
        AuditHead,
    )
}
