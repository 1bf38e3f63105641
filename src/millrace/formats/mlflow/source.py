"""What is read of an MLflow store, whichever kind it is; what could not be read of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from millrace.core.ports import Blobs
from millrace.core.states import RunState
from millrace.core.types import Artifact, LoggedModel, MetricPoint, Model, ModelVersion, Run, RunLink, Struct

RUN_ID = re.compile(r"[0-9a-f]{32}")
MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
NAME_TAG = "mlflow.runName"
DELETED_STAGE = "Deleted_Internal"  # of a version whose number is not used again
PATH_CHARS = 1000
NAME_CHARS = 250  # of a metric, parameter or tag
UNSTORABLE = f"it is longer than {NAME_CHARS} characters, or has some that cannot be stored"
_INT64 = 2**63
_STATES: dict[str, RunState] = {
    "RUNNING": "running",
    "SCHEDULED": "pending",
    "FINISHED": "succeeded",
    "FAILED": "failed",
    "KILLED": "cancelled",
}
_STATE_NUMBERS = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")  # 1 to 5
_MODEL_STATES = ("unspecified", "pending", "ready", "upload_failed")  # 0 to 3


class Experiment(Struct, frozen=True, kw_only=True):
    """An experiment; times in seconds since 1970."""

    id: str
    name: str
    tags: dict[str, str] = {}
    created_at: float = 0.0
    updated_at: float = 0.0
    is_deleted: bool = False


class SourceRun(Struct, frozen=True, kw_only=True):
    """A run: its record without a project, and what is looked up apart from it."""

    run: Run
    experiment: Experiment
    is_deleted: bool = False
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    links: list[RunLink] = []
    metrics: list[str] = []
    place: str = ""  # the URI of its files


class SourceModel(Struct, frozen=True, kw_only=True):
    """A logged model and the URI of its files."""

    model: LoggedModel
    experiment: Experiment
    place: str = ""


class SourceFile(Struct, frozen=True, kw_only=True):
    """A file of a run or logged model; `key` is how the source finds it."""

    path: str
    key: str


class SourceVersion(Struct, frozen=True, kw_only=True):
    """A version as it was; `storage` is where its files are when its source does not say it."""

    version: ModelVersion
    model_id: str = ""
    storage: str = ""


class Problems:
    """What could not be brought over, and why; taken out as it is told."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self.count = 0

    def add(self, what: str, why: object) -> None:
        """Note one thing."""
        self.count += 1
        self._waiting.append(f"{what}: {why}")

    def take(self) -> list[str]:
        """Those that were not taken yet."""
        waiting, self._waiting = self._waiting, []
        return waiting


class Source(Protocol):
    """An MLflow store that is only read. What it cannot read goes to `problems` and is left out."""

    problems: Problems

    def experiments(self) -> Iterator[Experiment]:
        """Every experiment, deleted ones too."""
        ...

    def runs(self, experiment: Experiment) -> Iterator[SourceRun]:
        """Runs of an experiment, deleted ones too."""
        ...

    def points(self, found: SourceRun) -> Iterator[Sequence[MetricPoint]]:
        """The whole history of every metric of a run, some points at a time."""
        ...

    def logged_models(self, experiment: Experiment) -> Iterator[SourceModel]:
        """Logged models of an experiment."""
        ...

    def files(self, owner: SourceRun | SourceModel) -> Iterator[SourceFile]:
        """The files of a run or logged model."""
        ...

    def fetch(self, file: SourceFile, blobs: Blobs) -> Artifact | None:
        """Store a file; None when it cannot be read."""
        ...

    def models(self) -> Iterator[tuple[Model, dict[str, int]]]:
        """Registered models, prompts too, with the numbers that their aliases are at."""
        ...

    def versions(self, name: str) -> list[SourceVersion]:
        """The versions of a model."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


# --------------------------------------------------------------------------- values


def batches(points: Iterable[MetricPoint], size: int) -> Iterator[list[MetricPoint]]:
    """Points some at a time, so that memory stays bounded.

    Example:
        >>> points = [MetricPoint("r", "loss", step, 0.0, 0.0) for step in range(5)]
        >>> [len(some) for some in batches(points, 2)]
        [2, 2, 1]
    """
    waiting: list[MetricPoint] = []
    for point in points:
        waiting.append(point)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def seconds(milliseconds: Any) -> float:
    """A time of MLflow in seconds since 1970; absent is 0.

    Example:
        >>> seconds(1500), seconds(None)
        (1.5, 0.0)
    """
    return int(milliseconds or 0) / 1000


def state_of(status: Any) -> RunState:
    """A run's state from MLflow's name or number of it.

    Example:
        >>> state_of("KILLED"), state_of(3), state_of("5")
        ('cancelled', 'succeeded', 'cancelled')

    Raises:
        ValueError: There is no such status.
    """
    text = str(status)
    if text.isascii() and text.isdigit() and 1 <= int(text) <= len(_STATE_NUMBERS):
        text = _STATE_NUMBERS[int(text) - 1]
    if text not in _STATES:
        raise ValueError(f"there is no status {text!r}")
    return _STATES[text]


def model_state_of(status: Any) -> str:
    """A logged model's state from MLflow's name or number of it.

    Example:
        >>> model_state_of("LOGGED_MODEL_READY"), model_state_of(1)
        ('ready', 'pending')
    """
    text = str(status).removeprefix("LOGGED_MODEL_").removeprefix("STATUS_").lower()
    if text.isascii() and text.isdigit() and int(text) < len(_MODEL_STATES):
        return _MODEL_STATES[int(text)]
    return text if text in _MODEL_STATES else "unspecified"


def point_of(run_id: str, name: str, timestamp: Any, value: Any, step: Any) -> MetricPoint:
    """A point from texts or numbers.

    Raises:
        ValueError: One of them is no number of 64 bits.

    Example:
        >>> point_of("r", "loss", "1500", "Infinity", 2).value
        inf
    """
    at, number = int(timestamp), int(step)
    if not (0 <= at < _INT64 and -_INT64 <= number < _INT64):
        raise ValueError(f"want a time and a step of 64 bits, got {at} and {number}")
    return MetricPoint(run_id, name, number, float(value), at / 1000)


def is_plain_path(path: str) -> bool:
    """Whether a file's path stays below its owner, also when it is decoded.

    Example:
        >>> is_plain_path("model/MLmodel"), is_plain_path("a/%2e%2e/b"), is_plain_path("/etc/passwd")
        (True, False, False)
    """
    for form in (path, unquote(path)):
        if any(part in ("", ".", "..") for part in form.split("/")) or not is_storable(form):
            return False
        if "\\" in form or form.startswith("file:") or any(ord(char) < 32 or char == "\x7f" for char in form):
            return False
    return len(path) <= PATH_CHARS


def is_storable(text: str) -> bool:
    """Whether a record can hold a text: no NUL, no half characters.

    Example:
        >>> is_storable("a"), is_storable("a\\0"), is_storable("\\ud800")
        (True, False, False)
    """
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def is_name(text: str) -> bool:
    """Whether a metric, parameter or tag can have this name.

    Example:
        >>> is_name("val acc"), is_name(""), is_name("a" * 251)
        (True, False, False)
    """
    return is_storable(text) and 0 < len(text) <= NAME_CHARS


def storable(pairs: Iterable[tuple[str, Any]], what: str, problems: Problems) -> dict[str, str]:
    """The tags or parameters that can be kept.

    Args:
        pairs: Names and values.
        what: For the problem of the others.
        problems: Where they are noted.
    """
    kept: dict[str, str] = {}
    for name, value in pairs:
        text = "" if value is None else str(value)
        if is_name(name) and is_storable(text):
            kept[name] = text
        else:
            problems.add(f"{what} {name[:300]!r}", UNSTORABLE)
    return kept


def dataset_link(dataset: Mapping[str, Any], tags: Mapping[str, str]) -> RunLink:
    """A dataset that a run read."""
    optional = {name: str(dataset[name]) for name in ("schema", "profile") if dataset.get(name)}
    facts = {"source_type": str(dataset.get("source_type") or ""), "source": str(dataset.get("source") or "")}
    return RunLink(
        id="", run_id="", direction="input", target="dataset", name=str(dataset["name"]),
        digest=str(dataset.get("digest") or ""), facts={**facts, **optional}, tags=dict(tags),
    )  # fmt: skip


def model_link(direction: Any, model_id: str, step: Any = 0) -> RunLink:
    """A logged model that a run read or wrote."""
    facts = {"step": int(step or 0)} if direction == "output" else {}
    return RunLink(id="", run_id="", direction=direction, target="model", name=model_id, facts=facts)


def model_metric(point: MetricPoint, model_id: str, dataset: Sequence[str | None]) -> dict[str, Any]:
    """A point of a logged model as its record has it.

    Args:
        point: Whose run is the one that logged it.
        model_id: The model.
        dataset: Name and digest, or nothing.
    """
    value: Any = point.value
    if value != value or value in (float("inf"), float("-inf")):
        value = "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    kept = {
        "key": point.name, "value": value, "timestamp": round(point.at * 1000), "step": point.step,
        "model_id": model_id, "run_id": point.run_id,
    }  # fmt: skip
    if len(dataset) == 2 and all(dataset):
        kept |= {"dataset_name": dataset[0], "dataset_digest": dataset[1]}
    return kept
