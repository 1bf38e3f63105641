"""Verbs on runs."""

from __future__ import annotations

from typing import Any

from millrace.core.operations import Operation, Page, Request
from millrace.core.search import RunValues
from millrace.core.types import MetricPoint, Run, Step, Struct


class SpecRequest(Request, frozen=True, kw_only=True):
    """A spec file with overrides (`train.epochs=5`)."""

    spec_path: str
    overrides: list[str] = []


class SubmitRequest(SpecRequest, frozen=True, kw_only=True):
    """`detach`: drive the run in a process of its own."""

    detach: bool = False


class RunRequest(Request, frozen=True, kw_only=True):
    """One run, by id, a unique prefix of it, or `last`."""

    run: str


class RunList(Page, frozen=True, kw_only=True):
    """Runs, newest first."""

    state: str | None = None


class DiffRequest(Request, frozen=True, kw_only=True):
    """Two runs."""

    left: str
    right: str


class CancelRequest(RunRequest, frozen=True, kw_only=True):
    """`now`: do not wait for steps to save."""

    now: bool = False


class LogsRequest(RunRequest, frozen=True, kw_only=True):
    """A step's log from byte `offset`; without a step: the last one that has a log."""

    step: str | None = None
    offset: int = 0


class LogsResponse(Struct, frozen=True, kw_only=True):
    """What was printed, the next offset, and whether more may come."""

    step: str
    text: str
    next_offset: int
    is_finished: bool
    path: str


class MetricsRequest(RunRequest, frozen=True, kw_only=True):
    """Points of a run, skipping the first `since`."""

    name: str | None = None
    since: int = 0


class PlannedStep(Struct, frozen=True, kw_only=True):
    """What a run would do with a step, and why."""

    name: str
    action: str  # "run" | "may run" (its inputs may come out as they were) | "cached"
    reason: str


class Plan(Struct, frozen=True, kw_only=True):
    """The steps in order."""

    steps: list[PlannedStep]


class Submitted(Struct, frozen=True, kw_only=True):
    """The run; `is_joined` when a live one on the same spec was found."""

    run: Run
    is_joined: bool = False


class RunView(Struct, frozen=True, kw_only=True):
    """A run with its steps and their facts; its parameters, tags and latest metrics."""

    run: Run
    steps: list[Step]
    report_path: str | None = None
    values: RunValues = RunValues()


class RunEvent(Struct, frozen=True, kw_only=True):
    """Something that happened while a run is driven or followed."""

    kind: str  # "step" | "progress" | "end"
    step: str = ""
    state: str = ""
    text: str = ""
    done: float = 0.0
    total: float = 0.0
    duration_s: float = 0.0
    facts: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    report_path: str | None = None


class RunDiff(Struct, frozen=True, kw_only=True):
    """What differs: specs by key, facts by metric, outputs by step."""

    left: str
    right: str
    spec: dict[str, list[Any]] = {}
    outputs: dict[str, list[str]] = {}
    metrics: dict[str, list[float | None]] = {}


class TrackRequest(Request, frozen=True, kw_only=True):
    """Begin a run of the user's own script."""

    name: str = ""
    project: str = "default"
    params: dict[str, Any] = {}
    tags: dict[str, str] = {}


class TrackLog(Request, frozen=True, kw_only=True):
    """Points, parameters and tags of a tracked run."""

    run: str
    points: list[MetricPoint] = []
    params: dict[str, Any] = {}
    tags: dict[str, str] = {}


class TrackArtifact(Request, frozen=True, kw_only=True):
    """A local file or folder to keep with a tracked run; `data_subject`: whose data it is, to be erased together."""

    run: str
    name: str
    path: str
    data_subject: str = ""


class TrackEnd(Request, frozen=True, kw_only=True):
    """The end of a tracked run."""

    run: str
    state: str = "succeeded"
    error: dict[str, Any] | None = None


_SPEC = {"spec_path": "millrace.yaml"}
_RUN = {"run": "last"}
PLAN_RUN = Operation(
    name="run.plan", summary="What a run would do, and why.", request=SpecRequest, response=Plan,
    method="POST", path="/runs/plan", example=_SPEC,
)  # fmt: skip
SUBMIT_RUN = Operation(
    name="run.submit", summary="Create a run of a spec, or join the live one.", request=SubmitRequest,
    response=Submitted, method="POST", path="/runs", is_write=True, makes="run", example=_SPEC,
)  # fmt: skip
DRIVE_RUN = Operation(
    name="run.drive", summary="Drive a run to its end; follows when another process drives it.", request=RunRequest,
    response=RunEvent, method="POST", path="/runs/{run}/drive", is_write=True, is_stream=True,
    subject_kind="run", subject_field="run", example=_RUN,
)  # fmt: skip
LIST_RUNS = Operation(
    name="run.list", summary="Runs, newest first.", request=RunList, response=list[Run], method="GET", path="/runs",
)  # fmt: skip
GET_RUN = Operation(
    name="run.get", summary="A run with its steps.", request=RunRequest, response=RunView, method="GET",
    path="/runs/{run}", subject_kind="run", subject_field="run", example=_RUN,
)  # fmt: skip
DIFF_RUNS = Operation(
    name="run.diff", summary="What differs between two runs.", request=DiffRequest, response=RunDiff, method="GET",
    path="/runs/{left}/diff/{right}", subject_kind="run", subject_field="left",
    example={"left": "last", "right": "last"},
)  # fmt: skip
CANCEL_RUN = Operation(
    name="run.cancel", summary="Cancel a run.", request=CancelRequest, response=Run, method="POST",
    path="/runs/{run}/cancel", is_write=True, subject_kind="run", subject_field="run", example=_RUN,
)  # fmt: skip
DELETE_RUN = Operation(
    name="run.delete", summary="Delete an ended run; it can be restored until `system gc` removes it.",
    request=RunRequest, response=Run, method="DELETE", path="/runs/{run}", is_write=True, subject_kind="run",
    subject_field="run", example=_RUN,
)  # fmt: skip
RESTORE_RUN = Operation(
    name="run.restore", summary="Bring a deleted run back.", request=RunRequest, response=Run, method="POST",
    path="/runs/{run}/restore", is_write=True, subject_kind="run", subject_field="run", example=_RUN,
)  # fmt: skip
READ_LOGS = Operation(
    name="run.logs", summary="What a step printed.", request=LogsRequest, response=LogsResponse, method="GET",
    path="/runs/{run}/logs", subject_kind="run", subject_field="run", example=_RUN,
)  # fmt: skip
READ_METRICS = Operation(
    name="run.metrics", summary="Points of a run.", request=MetricsRequest, response=list[MetricPoint], method="GET",
    path="/runs/{run}/metrics", subject_kind="run", subject_field="run", example=_RUN,
)  # fmt: skip
TRACK_START = Operation(
    name="run.track", summary="Begin a run of your own script.", request=TrackRequest, response=Run, method="POST",
    path="/runs/track", is_write=True, makes="run", example={"name": "sweep"},
)  # fmt: skip
TRACK_LOG = Operation(
    name="run.log", summary="Record points, parameters and tags.", request=TrackLog, response=None, method="POST",
    path="/runs/{run}/log", is_write=True, is_audited=False, subject_kind="run", subject_field="run",
    example={"run": "last"},
)  # fmt: skip
TRACK_ARTIFACT = Operation(
    name="run.artifact", summary="Keep a file or folder with a run.", request=TrackArtifact, response=Step,
    method="POST", path="/runs/{run}/artifacts", is_write=True, subject_kind="run", subject_field="run",
    hidden_fields=("data_subject",), example={"run": "last", "name": "weights", "path": "weights.safetensors"},
)  # fmt: skip
TRACK_END = Operation(
    name="run.end", summary="End a tracked run.", request=TrackEnd, response=Run, method="POST",
    path="/runs/{run}/end", is_write=True, subject_kind="run", subject_field="run", example={"run": "last"},
)  # fmt: skip
OPERATIONS = (
    PLAN_RUN, SUBMIT_RUN, DRIVE_RUN, LIST_RUNS, GET_RUN, DIFF_RUNS, CANCEL_RUN, DELETE_RUN, RESTORE_RUN, READ_LOGS,
    READ_METRICS, TRACK_START, TRACK_LOG, TRACK_ARTIFACT, TRACK_END,
)  # fmt: skip
