"""A store behind a running MLflow server, read by its REST API."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from millrace.core.errors import InputError, UnavailableError
from millrace.core.ports import Blobs
from millrace.core.types import Artifact, LoggedModel, MetricPoint, Model, ModelVersion, Run, RunLink
from millrace.formats.mlflow.source import (
    Experiment,
    Problems,
    SourceFile,
    SourceModel,
    SourceRun,
    SourceVersion,
    batches,
    dataset_link,
    is_plain_path,
    model_link,
    model_metric,
    model_state_of,
    point_of,
    seconds,
    state_of,
    storable,
)

API = "/api/2.0/mlflow"
PROXY = "/api/2.0/mlflow-artifacts/artifacts/"
TIMEOUT_S = 120.0
RUNS_AT_ONCE = 100
POINTS_AT_ONCE = 10_000
FOLDERS_DEEP = 64
PROMPTS = "tag.`mlflow.prompt.is_prompt` = 'true'"
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")  # in JSON, behind whole pairs of backslashes
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RefusedError(Exception):
    """The server answered one question with an error: what was asked for is left out, and noted."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class RestSource:
    """Implements `Source` for a URL.

    `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, or `MLFLOW_TRACKING_TOKEN`, are sent when they are set.

    Args:
        url: The server, for example `http://127.0.0.1:5000`.

    Raises:
        InputError: The URL is not one of HTTP, or has a password in it.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InputError(f"want the URL of an MLflow server, got {url[:300]!r}: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"want the URL of an MLflow server, http://…, got {url[:300]!r}")
        if parsed.userinfo:
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise InputError("a URL with a password would be kept in the journal", hint=hint)
        self.problems = Problems()
        self.url = url.rstrip("/")
        token, user = os.environ.get("MLFLOW_TRACKING_TOKEN"), os.environ.get("MLFLOW_TRACKING_USERNAME")
        self._http = httpx.Client(
            base_url=self.url, timeout=TIMEOUT_S, transport=httpx.HTTPTransport(retries=3),
            auth=(user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user and not token else None,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=parsed.host not in _LOOPBACK,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    # ----------------------------------------------------------------------- experiments, runs

    def experiments(self) -> Iterator[Experiment]:
        """Every experiment, deleted ones too.

        Raises:
            InputError: The server does not answer as one of MLflow does, or wants a password.
        """
        try:
            yield from self._experiments()
        except RefusedError as error:
            hint = "is it the URL of an MLflow server? MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN, say who asks"
            raise InputError(f"{self.url} cannot be read: {error}", hint=hint) from None

    def _experiments(self) -> Iterator[Experiment]:
        for one in self._pages("/experiments/search", "experiments", {"view_type": "ALL", "max_results": 1000}):
            name = str(one["name"])
            yield Experiment(
                id=str(one["experiment_id"]), name=name, is_deleted=one.get("lifecycle_stage") == "deleted",
                created_at=seconds(one.get("creation_time")), updated_at=seconds(one.get("last_update_time")),
                tags=storable(_pairs(one.get("tags")), f"experiment {name!r}: tag", self.problems),
            )  # fmt: skip

    def runs(self, experiment: Experiment) -> Iterator[SourceRun]:
        """Runs of an experiment, deleted ones too."""
        body = {"experiment_ids": [experiment.id], "run_view_type": "ALL", "max_results": RUNS_AT_ONCE}
        for one in self._noted(f"runs of {experiment.name!r}", self._pages("/runs/search", "runs", body)):
            try:
                yield self._run(experiment, one["info"], one.get("data") or {}, _links(one))
            except _UNREADABLE as error:
                self._unread(f"a run of {experiment.name!r}", one, error)

    def _run(
        self, experiment: Experiment, info: Mapping[str, Any], data: Mapping[str, Any], links: list[RunLink]
    ) -> SourceRun:
        id = str(info.get("run_id") or info["run_uuid"])
        tags = storable(_pairs(data.get("tags")), f"run {id}: tag", self.problems)
        started = seconds(info.get("start_time"))
        return SourceRun(
            run=Run(
                id=id, name=str(info.get("run_name") or tags.get("mlflow.runName", "")), state=state_of(info["status"]),
                created_at=started, started_at=started or None, ended_at=seconds(info.get("end_time")) or None,
                created_by=str(info.get("user_id") or ""),
            ),
            experiment=experiment, is_deleted=info.get("lifecycle_stage") == "deleted", tags=tags, links=links,
            params=storable(_pairs(data.get("params")), f"run {id}: parameter", self.problems),
            metrics=[str(metric["key"]) for metric in data.get("metrics") or ()],
            place=str(info.get("artifact_uri") or ""),
        )  # fmt: skip

    def points(self, found: SourceRun) -> Iterator[Sequence[MetricPoint]]:
        """The whole history of every metric of a run."""
        for name in found.metrics:
            query: dict[str, Any] = {"run_id": found.run.id, "metric_key": name, "max_results": POINTS_AT_ONCE}
            pages = self._pages("/metrics/get-history", "metrics", query, method="GET")
            what = f"metric {name!r} of run {found.run.id}"
            yield from batches(self._points(found.run.id, name, self._noted(what, pages)), POINTS_AT_ONCE)

    def _points(self, run_id: str, name: str, given: Iterable[Mapping[str, Any]]) -> Iterator[MetricPoint]:
        for one in given:
            try:
                yield point_of(run_id, name, one.get("timestamp", 0), one["value"], one.get("step", 0))
            except (ValueError, KeyError, TypeError) as error:
                self.problems.add(f"a point of metric {name!r} of run {run_id}", error)

    def logged_models(self, experiment: Experiment) -> Iterator[SourceModel]:
        """Logged models of an experiment; none where the server is older than they are."""
        body = {"experiment_ids": [experiment.id], "max_results": 50}
        try:
            for one in self._pages("/logged-models/search", "models", body):
                try:
                    yield self._model(experiment, one["info"], one.get("data") or {})
                except _UNREADABLE as error:
                    self._unread(f"a logged model of {experiment.name!r}", one, error)
        except RefusedError as error:
            if error.status not in (404, 405):
                self.problems.add(f"logged models of {experiment.name!r}", error)

    def _model(self, experiment: Experiment, info: Mapping[str, Any], data: Mapping[str, Any]) -> SourceModel:
        id = str(info["model_id"])
        run_id = str(info.get("source_run_id") or "")
        metrics = []
        for one in data.get("metrics") or ():
            run = str(one.get("run_id") or run_id)
            point = point_of(run, str(one["key"]), one.get("timestamp", 0), one["value"], one.get("step", 0))
            metrics.append(model_metric(point, id, [one.get("dataset_name"), one.get("dataset_digest")]))
        model = LoggedModel(
            id=id, name=str(info.get("name") or ""), run_id=run_id or None, state=model_state_of(info.get("status")),
            model_type=str(info.get("model_type") or ""), metrics=metrics,
            params=storable(_pairs(data.get("params")), f"logged model {id}: parameter", self.problems),
            tags=storable(_pairs(info.get("tags")), f"logged model {id}: tag", self.problems),
            created_at=seconds(info.get("creation_timestamp_ms")),
            updated_at=seconds(info.get("last_updated_timestamp_ms")),
        )  # fmt: skip
        return SourceModel(model=model, experiment=experiment, place=str(info.get("artifact_uri") or ""))

    # ----------------------------------------------------------------------- files

    def files(self, owner: SourceRun | SourceModel) -> Iterator[SourceFile]:
        """The files of a run or logged model, whatever store the server keeps them in."""
        waiting = [("", 0)]
        while waiting:
            folder, depth = waiting.pop()
            for one in self._listed(owner, folder):
                path = str(one.get("path") or "")
                if not is_plain_path(path) or not path.startswith(f"{folder}/" if folder else "") or path == folder:
                    self.problems.add(f"file {path[:300]!r} of {_owner_id(owner)}", "its path leaves its folder")
                elif not one.get("is_dir"):
                    yield SourceFile(path=path, key=_download_path(owner, path))
                elif depth < FOLDERS_DEEP:
                    waiting.append((path, depth + 1))
                else:
                    self.problems.add(f"folder {path[:300]!r} of {_owner_id(owner)}", "it is too deep")

    def _listed(self, owner: SourceRun | SourceModel, folder: str) -> Iterator[Mapping[str, Any]]:
        if isinstance(owner, SourceRun):
            path, query = "/artifacts/list", {"run_id": owner.run.id, **({"path": folder} if folder else {})}
        else:
            path = f"/logged-models/{owner.model.id}/artifacts/directories"
            query = {"artifact_directory_path": folder} if folder else {}
        try:
            yield from self._pages(path, "files", query, method="GET")
        except RefusedError as error:
            self.problems.add(f"files of {_owner_id(owner)} below {folder!r}", error)

    def fetch(self, file: SourceFile, blobs: Blobs) -> Artifact | None:
        """Store a file as it arrives."""
        try:
            with self._http.stream("GET", file.key) as answer:
                if answer.is_error:
                    self.problems.add(f"file {file.key}", f"the server answered {answer.status_code}")
                    return None
                return blobs.put(cast(BinaryIO, _Body(answer)))
        except httpx.HTTPError as error:
            self.problems.add(f"file {file.key}", f"{type(error).__name__}: {error}")
            return None

    # ----------------------------------------------------------------------- registry

    def models(self) -> Iterator[tuple[Model, dict[str, int]]]:
        """Registered models, prompts too; a server does not show both at once."""
        seen: set[str] = set()
        for filter_text in ("", PROMPTS):
            body = {"max_results": 100, **({"filter": filter_text} if filter_text else {})}
            pages = self._pages("/registered-models/search", "registered_models", body, method="GET")
            for one in self._noted("registered models", pages):
                if one.get("name") in seen:
                    continue
                try:
                    yield self._registered(one)
                    seen.add(str(one["name"]))
                except _UNREADABLE as error:
                    self._unread("a registered model", one, error)

    def _registered(self, one: Mapping[str, Any]) -> tuple[Model, dict[str, int]]:
        name = str(one["name"])
        model = Model(
            id=name, name=name, description=str(one.get("description") or ""),
            created_at=seconds(one.get("creation_timestamp")), updated_at=seconds(one.get("last_updated_timestamp")),
            tags=storable(_pairs(one.get("tags")), f"model {name!r}: tag", self.problems),
        )  # fmt: skip
        return model, {str(alias["alias"]): int(alias["version"]) for alias in one.get("aliases") or ()}

    def versions(self, name: str) -> list[SourceVersion]:
        """The versions of a model."""
        if "'" in name and '"' in name:
            self.problems.add(f"versions of {name!r}", "MLflow has no way to ask for a name with both kinds of quotes")
            return []
        mark = '"' if "'" in name else "'"
        named = f"name = {mark}{name}{mark}"
        found: dict[str, SourceVersion] = {}
        for filter_text in (named, f"{named} AND {PROMPTS}"):
            query = {"filter": filter_text, "max_results": 1000}
            pages = self._pages("/model-versions/search", "model_versions", query, method="GET")
            for one in self._noted(f"versions of model {name!r}", pages):
                try:
                    found.setdefault(str(one["version"]), self._version(name, one))
                except _UNREADABLE as error:
                    self._unread(f"a version of model {name!r}", one, error)
        return list(found.values())

    def _version(self, name: str, one: Mapping[str, Any]) -> SourceVersion:
        what = f"version {one['version']} of {name!r}"
        version = ModelVersion(
            id="", name=name, number=int(one["version"]), bundle=Artifact(digest="", size_bytes=0), format="opaque",
            source="mlflow", chosen_variant="", run_id=str(one.get("run_id") or "") or None,
            description=str(one.get("description") or ""), tags=storable(_pairs(one.get("tags")), what, self.problems),
            stage=str(one.get("current_stage") or "None"), state=_version_state(one.get("status")),
            state_text=str(one.get("status_message") or ""), created_by=str(one.get("user_id") or ""),
            source_uri=str(one.get("source") or ""), facts={"run_link": str(one.get("run_link") or "")},
            created_at=seconds(one.get("creation_timestamp")), updated_at=seconds(one.get("last_updated_timestamp")),
        )  # fmt: skip
        return SourceVersion(version=version, model_id=str(one.get("model_id") or ""))

    # ----------------------------------------------------------------------- the wire

    def _unread(self, what: str, one: object, error: Exception) -> None:
        """Note a part of an answer that is not as MLflow's are."""
        self.problems.add(what, f"the server's answer cannot be read, {error!r}: {str(one)[:200]}")

    def _noted(self, what: str, pages: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The pages up to the first that is refused."""
        try:
            yield from pages
        except RefusedError as error:
            self.problems.add(what, error)

    def _pages(
        self, path: str, field: str, body: Mapping[str, Any], method: str = "POST"
    ) -> Iterator[Mapping[str, Any]]:
        asked = dict(body)
        while True:
            answer = self._ask(method, path, asked)
            yield from answer.get(field) or ()
            token = answer.get("next_page_token")
            if not token or token == asked.get("page_token"):
                return
            asked["page_token"] = token

    def _ask(self, method: str, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One answer.

        Raises:
            UnavailableError: The server cannot be reached, or is none of MLflow.
            RefusedError: It answered with an error.
        """
        try:
            if method == "GET":
                answer = self._http.get(API + path, params=dict(fields))
            else:
                answer = self._http.post(API + path, json=dict(fields))
        except httpx.HTTPError as error:
            hint = "start it, then import again: what is here already is not read twice"
            raise UnavailableError(f"{self.url} does not answer: {error or type(error).__name__}", hint=hint) from None
        if answer.is_error:
            text = answer.text.strip()[:300] or answer.reason_phrase
            raise RefusedError(answer.status_code, f"{path} was answered with {answer.status_code}: {text}")
        try:
            content, nulls = _NUL.subn(rb"\1\\ufffd", answer.content)
            if nulls:
                self.problems.add(path, "it has NUL characters, which cannot be stored: they were replaced")
            return msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.MsgspecError:
            raise UnavailableError(f"{self.url} is not a server of MLflow: {path} is not a JSON object") from None


class _Body(io.RawIOBase):
    """The body of an answer as a file that is read once."""

    def __init__(self, answer: httpx.Response) -> None:
        self._parts = answer.iter_bytes(1 << 20)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._parts, b""))
        size = min(len(self._rest), len(buffer))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _pairs(given: Sequence[Mapping[str, Any]] | None) -> list[tuple[str, Any]]:
    return [(str(pair["key"]), pair.get("value")) for pair in given or ()]


def _links(run: Mapping[str, Any]) -> list[RunLink]:
    inputs, outputs = run.get("inputs") or {}, run.get("outputs") or {}
    links = [
        dataset_link(one["dataset"], {key: str(value) for key, value in _pairs(one.get("tags"))})
        for one in inputs.get("dataset_inputs") or ()
    ]
    links += [model_link("input", str(one["model_id"])) for one in inputs.get("model_inputs") or ()]
    return links + [
        model_link("output", str(one["model_id"]), one.get("step")) for one in outputs.get("model_outputs") or ()
    ]


def _owner_id(owner: SourceRun | SourceModel) -> str:
    return f"run {owner.run.id}" if isinstance(owner, SourceRun) else f"logged model {owner.model.id}"


def _download_path(owner: SourceRun | SourceModel, path: str) -> str:
    """Where a file can be had: from the proxy, or from whatever store the server reads."""
    parsed = urlsplit(owner.place)
    root = parsed.path.partition(PROXY)[2] if PROXY in parsed.path else parsed.path
    if parsed.scheme == "mlflow-artifacts" or PROXY in parsed.path:
        return PROXY + quote(f"{root.strip('/')}/{path}")
    if isinstance(owner, SourceRun):
        return f"/get-artifact?run_id={owner.run.id}&path={quote(path, safe='')}"
    files = f"/ajax-api/2.0/mlflow/logged-models/{owner.model.id}/artifacts/files"
    return f"{files}?artifact_file_path={quote(path, safe='')}"


def _version_state(status: Any) -> str:
    known = {"PENDING_REGISTRATION": "pending", "FAILED_REGISTRATION": "failed"}
    return known.get(str(status), "ready")
