"""The ports: what the rooms ask of one another. Implementations are chosen in `wiring`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, TypeVar, runtime_checkable

from millrace.core.search import RunSearch, TrackingWriter
from millrace.core.types import Artifact, Event, MetricPoint, Record, Struct, TreeEntry

if TYPE_CHECKING:
    import numpy as np


R = TypeVar("R", bound=Record)


# --------------------------------------------------------------------------- store


class Transaction(TrackingWriter, Protocol):
    """One atomic change: everything or nothing becomes durable when the `with` block ends."""

    def get(self, record_type: type[R], id: str) -> R | None:
        """The record inside this transaction, or None."""
        ...

    def find(self, record_type: type[R], where: Mapping[str, Any] | None = None) -> list[R]:
        """Records whose fields equal `where`, inside this transaction, oldest first."""
        ...

    def put(self, record: R, expect_version: int | None = None) -> R:
        """Insert or replace; returns the record with its new version.

        `expect_version=0` inserts only; n replaces only version n; None replaces whatever is there.

        Raises:
            ConflictError: The stored version is another one.
        """
        ...

    def delete(self, record_type: type[Record], id: str) -> bool:
        """Remove a record; False when there was none."""
        ...

    def append(self, event: Event) -> None:
        """Add an event, unsealed, that commits or vanishes with the rest."""
        ...


class Records(RunSearch, Protocol):
    """Durable records. Thread-safe; several processes may use one home at once.

    Every write is one durable transaction (fsync'd) when the call returns.
    """

    def get(self, record_type: type[R], id: str) -> R | None:
        """The newest committed record, or None."""
        ...

    def find(
        self,
        record_type: type[R],
        where: Mapping[str, Any] | None = None,
        order: str = "created_at",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[R]:
        """Records whose fields equal `where` (a list means: one of), ordered by a field.

        Args:
            record_type: The class, for example `Run`.
            where: Field → value or list of values; indexed fields are quick, others filter.
            order: A field, `-field` for descending; ties by id.
            limit: At most so many.
            offset: Skip so many first.
        """
        ...

    def put(self, record: R, expect_version: int | None = None) -> R:
        """One put in a transaction of its own; see `Transaction.put`."""
        ...

    def transaction(self) -> AbstractContextManager[Transaction]:
        """A write transaction (BEGIN IMMEDIATE); an exception rolls everything back."""
        ...

    def events(self, since: int = 0, subject: str | None = None, limit: int = 1000) -> list[Event]:
        """Sealed events with `seq` > since, in order."""
        ...

    def seal(self, fence: int = 0) -> int:
        """Seal every unsealed event: assign seq and the chained digest. Returns how many.

        Concurrent callers are safe: one transaction seals, the others find nothing left.
        """
        ...

    def append_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Append points; durable together with the next transaction or within one second."""
        ...

    def metrics(self, run_id: str, name: str | None = None, since: int = 0, limit: int = 100_000) -> list[MetricPoint]:
        """Points of a run in the order of arrival, skipping the first `since`."""
        ...

    def close(self) -> None:
        """Flush and let go of the files."""
        ...


class Blobs(Protocol):
    """Content-addressed bytes. Thread- and process-safe; a put is durable when it returns.

    Nothing half-written is ever visible: temp, fsync, rename, fsync of the folder.
    """

    def put(self, source: BinaryIO | bytes | Path, media_type: str = "application/octet-stream") -> Artifact:
        """Store bytes, a stream or a file; equal bytes are stored once.

        Raises:
            DiskFullError: No space; nothing remains.
        """
        ...

    def open(self, digest: str) -> BinaryIO:
        """A reader that verifies: at the end of the stream a wrong digest raises CorruptError.

        Raises:
            NotFoundError: There is no such blob.
        """
        ...

    def read(self, digest: str) -> bytes:
        """All bytes, verified.

        Raises:
            CorruptError: The bytes have another digest; the message names the blob.
        """
        ...

    def path(self, digest: str) -> Path:
        """A read-only local file with these bytes, verified."""
        ...

    def exists(self, digest: str) -> bool:
        """Whether it is stored."""
        ...

    def delete(self, digest: str) -> bool:
        """Remove it; False when it was not there."""
        ...

    def list(self) -> Iterator[Artifact]:
        """Every stored blob that is not discarded."""
        ...

    def modified_at(self, digest: str) -> float:
        """When it was last put or touched, in seconds since 1970."""
        ...

    def touch(self, digest: str) -> None:
        """Make it count as new, so that garbage collection spares it for a while."""
        ...

    def discard(self, digest: str) -> bool:
        """Put it aside; whoever asks for it brings it back. False when it was not there."""
        ...

    def discarded(self) -> Iterator[tuple[Artifact, float]]:
        """What was put aside, and when."""
        ...

    def purge(self, digest: str) -> bool:
        """Delete what was put aside; False when it was brought back, or purged, meanwhile."""
        ...

    def put_tree(self, folder: Path) -> Artifact:
        """Store every regular file below `folder` and the listing; the artifact of the listing."""
        ...

    def tree(self, digest: str) -> list[TreeEntry]:
        """The listing of a tree, verified."""
        ...

    def materialize(self, digest: str, folder: Path) -> Path:
        """Write a tree's files read-only (hard links where possible) into a new `folder`."""
        ...


class StepBlobs(Protocol):
    """What a step needs of the blobs, wherever it runs. Thread-safe."""

    def path(self, digest: str) -> Path:
        """A read-only local file with these bytes, verified."""
        ...

    def put(self, source: BinaryIO | bytes | Path, media_type: str = "application/octet-stream") -> Artifact:
        """Store bytes, a stream or a file; equal bytes are stored once."""
        ...

    def put_tree(self, folder: Path) -> Artifact:
        """Store every regular file below `folder` and the listing; the artifact of the listing."""
        ...

    def materialize(self, digest: str, folder: Path) -> Path:
        """Write a tree's files read-only into a new `folder`."""
        ...


# --------------------------------------------------------------------------- compute


class Work(Struct, frozen=True, kw_only=True):
    """One step, ready to be executed by any compute: plain data only."""

    step_id: str
    run_id: str
    name: str
    implementation: str  # "package.module:function"
    spec: bytes  # JSON of the resolved Spec
    inputs: dict[str, Artifact] = {}
    params: dict[str, Any] = {}
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    project_dir: str = "."  # folder of the spec: user code and relative data paths
    scratch_dir: str = ""  # private to this step's cache key; survives a kill
    log_path: str = ""
    home_dir: str = ""
    memory_limit_bytes: int | None = None
    wall_time_s: float | None = None
    project: str = "default"
    secrets: tuple[str, ...] = ()  # their names; values never stand here


class ProgressFrame(Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a step is: `done` of `total`, with a line for people."""

    done: float
    total: float
    text: str = ""


class MetricsFrame(Struct, frozen=True, kw_only=True, tag="metrics"):
    """Points logged by a step."""

    points: list[MetricPoint]


class OutputFrame(Struct, frozen=True, kw_only=True, tag="output"):
    """An output has been stored as a blob."""

    name: str
    artifact: Artifact


class HeartbeatFrame(Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """The worker's interpreter is alive."""

    at: float
    rss_bytes: int = 0


class WorkResult(Struct, frozen=True, kw_only=True, tag="result"):
    """How a step ended."""

    state: Literal["succeeded", "failed", "cancelled"]
    outputs: dict[str, Artifact] = {}
    facts: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    peak_rss_bytes: int = 0
    environment: Artifact | None = None  # what it ran with: a `core.environment.Environment`


Frame = ProgressFrame | MetricsFrame | OutputFrame | HeartbeatFrame | WorkResult


class LogFrame(Struct, frozen=True, kw_only=True, tag="log"):
    """What a step of another machine has printed."""

    data: bytes


class Capacity(Struct, frozen=True, kw_only=True):
    """What a compute has."""

    cpus: int
    memory_bytes: int
    devices: tuple[str, ...] = ("cpu",)


class WorkHandle(Protocol):
    """A submitted work. Thread-safe."""

    @property
    def pid(self) -> int | None:
        """The worker's process id where there is one."""
        ...

    def wait(self, timeout_s: float | None = None) -> WorkResult | None:
        """The result, or None when it is not there within the time."""
        ...

    def logs(self, offset: int = 0) -> bytes:
        """What the step has printed from byte `offset` on."""
        ...

    def cancel(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after the grace; the result becomes `cancelled`. Idempotent."""
        ...


class Compute(Protocol):
    """Where work runs. Works die with their driver: link closed → stopped within 1 s."""

    def capacity(self) -> Capacity:
        """What is there."""
        ...

    def submit(
        self, work: Work, on_frame: Callable[[Frame], None], secrets: Mapping[str, str] | None = None
    ) -> WorkHandle:
        """Start a work; `on_frame` is called from one thread, in order, never after the result.

        `secrets` are the values of `work.secrets` by name: handed to the worker, stored nowhere.
        """
        ...

    def close(self) -> None:
        """Cancel what runs and stop."""
        ...


# --------------------------------------------------------------------------- stages


class StageDescriptor(Struct, frozen=True, kw_only=True):
    """What planning must know of a stage, without importing it."""

    name: str
    implementation: str  # "package.module:function", (spec, ctx) -> facts
    version: str  # goes up when the stage would give other outputs
    sections: tuple[str, ...]  # spec sections that enter the cache key
    inputs: tuple[str, ...] = ()  # "step.output", for example "data.dataset"
    outputs: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()  # installed versions that enter the cache key
    extras: tuple[tuple[str, str], ...] = ()  # (module, extra) that must be importable
    timed: bool = False  # times or quantises: CPU flags enter the cache key
    uses_code: bool = False  # user code (model.py and its local imports) enters the cache key
    uses_source: bool = False  # the digests of the data files enter the cache key
    stays_home: bool = False  # needs the home's keys or its server: never sent to a worker of another machine


@runtime_checkable
class Context(Protocol):
    """Everything that a stage may touch."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        ...

    @property
    def threads(self) -> int:
        """How many threads to use."""
        ...

    @property
    def device(self) -> str:
        """ "cpu", "cuda" or "mps"; resolved."""
        ...

    @property
    def project_dir(self) -> Path:
        """The folder of the spec."""
        ...

    @property
    def scratch(self) -> Path:
        """A folder for this step alone, empty at its first attempt; removed after success."""
        ...

    @property
    def checkpoints(self) -> Path:
        """A folder that survives kills of this step until it succeeds."""
        ...

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of this step."""
        ...

    @property
    def cancelled(self) -> bool:
        """True once the run is being cancelled: save a checkpoint and return."""
        ...

    def secret(self, name: str) -> str:
        """The value of a secret that the spec names for this step."""
        ...

    def input(self, name: str) -> Path:
        """A read-only file, or folder for a tree, with a named input (`data.dataset`)."""
        ...

    def has_input(self, name: str) -> bool:
        """Whether an optional input was given."""
        ...

    def output(self, name: str, path: Path) -> Artifact:
        """Store a file or folder as the step's output `name`."""
        ...

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """Record one point; cheap, sent in batches."""
        ...

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far the step is."""
        ...


# --------------------------------------------------------------------------- serving


class Runtime(Protocol):
    """Runs a model. `infer` may be called from several threads once loaded."""

    def load(self) -> None:
        """Load and verify; raises CorruptError or UntrustedError."""
        ...

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; the first dimension of every tensor is the row."""
        ...

    def unload(self) -> None:
        """Free the memory."""
        ...

    @property
    def is_ready(self) -> bool:
        """Loaded, and the golden self-test passed."""
        ...


class Verifier(Protocol):
    """Decides whether a signature over a digest is by a trusted key."""

    def verify(self, digest: str, signature: bytes) -> str:
        """The key id that signed.

        Raises:
            UntrustedError: No trusted key made this signature.
        """
        ...


class Signer(Verifier, Protocol):
    """Signs digests with the home's key."""

    def sign(self, digest: str) -> bytes:
        """A signature document (JSON: key id, algorithm, digest, signature)."""
        ...


# --------------------------------------------------------------------------- control


class Transport(Protocol):
    """How the CLI and the SDK reach operations: in process, or over HTTP."""

    def call(self, operation: str, body: Mapping[str, Any]) -> Any:
        """Validate, authorise, run; the response struct of the operation.

        Raises:
            MillraceError: Whatever the operation raises.
        """
        ...

    def stream(self, operation: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The same for an operation that answers with a sequence."""
        ...

    def close(self) -> None:
        """Let go of the home, or of the connections."""
        ...
