"""A store in an SQLite file (`mlflow.db`, MLflow's default since 3.7), read without MLflow; nothing is written."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import msgspec

from millrace.core.errors import InputError, NotFoundError
from millrace.core.ports import Blobs
from millrace.core.types import Artifact, LoggedModel, MetricPoint, Model, ModelVersion, Run, RunLink
from millrace.formats.mlflow.plain_files import PlainFiles, reason_of
from millrace.formats.mlflow.source import (
    NAME_TAG,
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

RUNS_AT_ONCE = 500
POINTS_AT_ONCE = 10_000
BUSY_S = 30.0
OWN_WORKSPACE = "default"
_NEEDED = frozenset({"experiments", "runs", "metrics", "params", "tags"})
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError)
_VERSION_STATES = {"PENDING_REGISTRATION": "pending", "FAILED_REGISTRATION": "failed"}
# A run is in inputs twice over: what it read has it as destination, models have it as source.
_DATASETS = """
SELECT i.input_uuid, d.name, d.digest, d.dataset_source_type AS source_type, d.dataset_source AS source,
    d.dataset_schema AS "schema", d.dataset_profile AS profile
FROM inputs i JOIN datasets d ON d.dataset_uuid = i.source_id
WHERE i.destination_type = 'RUN' AND i.destination_id = ? AND i.source_type = 'DATASET' ORDER BY i.input_uuid
"""
_MODELS = "SELECT * FROM inputs WHERE source_type IN ('RUN_INPUT', 'RUN_OUTPUT') AND source_id = ? ORDER BY input_uuid"


class DatabaseSource:
    """Implements `Source` for an SQLite file. Files of runs are looked for below `mlruns` and `mlartifacts` beside it.

    Args:
        path: The file.
        artifacts: Where the files of runs are when they are elsewhere, or None.

    Raises:
        NotFoundError: There is no such file or folder.
        InputError: It is no store of MLflow.
    """

    def __init__(self, path: Path, artifacts: Path | None = None) -> None:
        if not path.is_file():
            raise NotFoundError(f"there is no file {path}", hint="name the database: sqlite:///mlflow.db")
        if artifacts is not None and not artifacts.is_dir():
            raise NotFoundError(f"there is no folder {artifacts}", hint="--artifacts names the folder with runs' files")
        self.problems = Problems()
        self._files = PlainFiles(self.problems)
        self._path, self._home = path, path.resolve().parent
        self._roots = [self._home / "mlruns", self._home / "mlartifacts"]
        self._proxied = artifacts.resolve() if artifacts is not None else self._roots[1]
        if artifacts is not None:
            self._roots.insert(0, artifacts.resolve())
        uri = f"file:{quote(str(path.resolve()))}?mode=ro"
        self._database = sqlite3.connect(uri, uri=True, timeout=BUSY_S, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        self._database.text_factory = lambda data: data.decode("utf-8", "replace")
        self._tables: frozenset[str] = frozenset()
        try:
            tables = self._rows("SELECT name FROM sqlite_master WHERE type = 'table'")
            self._tables = frozenset(row["name"] for row in tables)
            if not self._tables >= _NEEDED:
                raise InputError(f"{path} is no store of MLflow: it has no {', '.join(sorted(_NEEDED - self._tables))}")
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    # ----------------------------------------------------------------------- experiments, runs

    def experiments(self) -> Iterator[Experiment]:
        """Every experiment, deleted ones too."""
        for row in self._own(self._rows("SELECT * FROM experiments ORDER BY experiment_id"), "experiment"):
            id, name = row["experiment_id"], str(row["name"])
            tags = "SELECT key, value FROM experiment_tags WHERE experiment_id = ?"
            yield Experiment(
                id=str(id), name=name, is_deleted=row["lifecycle_stage"] == "deleted",
                tags=self._texts("experiment_tags", tags, (id,), f"experiment {name!r}: tag"),
                created_at=seconds(row.get("creation_time")), updated_at=seconds(row.get("last_update_time")),
            )  # fmt: skip

    def runs(self, experiment: Experiment) -> Iterator[SourceRun]:
        """Runs of an experiment, deleted ones too. No query stays open: a server may write meanwhile."""
        if self._table("trace_info", "SELECT 1 FROM trace_info WHERE experiment_id = ? LIMIT 1", (experiment.id,)):
            self.problems.add(f"traces of {experiment.name!r}", "Millrace does not keep traces")
        page = "SELECT * FROM runs WHERE experiment_id = ? AND run_uuid > ? ORDER BY run_uuid LIMIT ?"
        last = ""
        while rows := self._rows(page, (experiment.id, last, RUNS_AT_ONCE)):
            for row in rows:
                last = row["run_uuid"]
                try:
                    yield self._run(experiment, row)
                except _UNREADABLE as error:
                    self.problems.add(f"run {last} of {experiment.name!r}", f"it cannot be read: {error}")

    def _run(self, experiment: Experiment, row: Mapping[str, Any]) -> SourceRun:
        id = str(row["run_uuid"])
        tags = self._texts("tags", "SELECT key, value FROM tags WHERE run_uuid = ?", (id,), f"run {id}: tag")
        params = "SELECT key, value FROM params WHERE run_uuid = ?"
        started = seconds(row["start_time"])
        return SourceRun(
            run=Run(
                id=id, name=str(row["name"] or tags.get(NAME_TAG) or ""), state=state_of(row["status"]),
                created_at=started, started_at=started or None, ended_at=seconds(row["end_time"]) or None,
                created_by=str(row["user_id"] or ""),
            ),
            experiment=experiment, is_deleted=row["lifecycle_stage"] == "deleted", tags=tags, links=self._links(id),
            params=self._texts("params", params, (id,), f"run {id}: parameter"),
            metrics=[row["key"] for row in self._rows("SELECT DISTINCT key FROM metrics WHERE run_uuid = ?", (id,))],
            place=str(row["artifact_uri"] or ""),
        )  # fmt: skip

    def _links(self, run_id: str) -> list[RunLink]:
        """What a run read and wrote."""
        links: list[RunLink] = []
        for row in self._table("inputs", _DATASETS, (run_id,)):
            tags = "SELECT name, value FROM input_tags WHERE input_uuid = ?"
            found = self._table("input_tags", tags, (row["input_uuid"],))
            links.append(dataset_link(row, {str(one["name"]): str(one["value"]) for one in found}))
        for row in self._table("inputs", _MODELS, (run_id,)):
            direction = "input" if row["source_type"] == "RUN_INPUT" else "output"
            links.append(model_link(direction, str(row["destination_id"]), row.get("step")))
        return links

    def points(self, found: SourceRun) -> Iterator[Sequence[MetricPoint]]:
        """The whole history of every metric of a run."""
        for name in found.metrics:
            yield from batches(self._points(found.run.id, name), POINTS_AT_ONCE)

    def _points(self, run_id: str, name: str) -> Iterator[MetricPoint]:
        history = "SELECT timestamp, value, step, is_nan FROM metrics WHERE run_uuid = ? AND key = ?"
        for at, value, step, is_nan in self._asked(f"{history} ORDER BY timestamp, step", (run_id, name)):
            try:
                yield point_of(run_id, name, at, "nan" if is_nan or value is None else value, step)
            except (ValueError, TypeError) as error:
                self.problems.add(f"a point of metric {name!r} of run {run_id}", error)

    def logged_models(self, experiment: Experiment) -> Iterator[SourceModel]:
        """Logged models of an experiment; none in the databases of before there were any."""
        all_of_it = "SELECT * FROM logged_models WHERE experiment_id = ? ORDER BY model_id"
        for row in self._table("logged_models", all_of_it, (experiment.id,)):
            try:
                yield self._model(experiment, row)
            except _UNREADABLE as error:
                self.problems.add(f"logged model {row['model_id']}", f"it cannot be read: {error}")

    def _model(self, experiment: Experiment, row: Mapping[str, Any]) -> SourceModel:
        id = str(row["model_id"])
        texts = {
            what: self._texts(
                f"logged_model_{what}s",
                f"SELECT {what}_key, {what}_value FROM logged_model_{what}s WHERE model_id = ?",
                (id,), f"logged model {id}: {what}",
            )
            for what in ("param", "tag")
        }  # fmt: skip
        metrics = []
        of_model = "SELECT * FROM logged_model_metrics WHERE model_id = ? ORDER BY metric_name, metric_timestamp_ms"
        for one in self._table("logged_model_metrics", of_model, (id,)):
            value = "nan" if one["metric_value"] is None else one["metric_value"]
            point = point_of(
                str(one["run_id"]), str(one["metric_name"]), one["metric_timestamp_ms"], value, one["metric_step"]
            )
            metrics.append(model_metric(point, id, [one["dataset_name"], one["dataset_digest"]]))
        model = LoggedModel(
            id=id, name=str(row["name"] or ""), run_id=str(row["source_run_id"] or "") or None,
            state=model_state_of(row["status"]), model_type=str(row["model_type"] or ""), params=texts["param"],
            tags=texts["tag"], metrics=metrics, created_at=seconds(row["creation_timestamp_ms"]),
            updated_at=seconds(row["last_updated_timestamp_ms"]),
        )  # fmt: skip
        if row["lifecycle_stage"] == "deleted":
            model = msgspec.structs.replace(model, deleted_at=model.updated_at)
        return SourceModel(model=model, experiment=experiment, place=str(row["artifact_location"] or ""))

    # ----------------------------------------------------------------------- files

    def files(self, owner: SourceRun | SourceModel) -> Iterator[SourceFile]:
        """The files of a run or logged model, where they are on this machine and in one of the folders."""
        id, depth = (owner.run.id, 3) if isinstance(owner, SourceRun) else (owner.model.id, 4)
        folder = self._folder(owner.place, depth)
        if folder is None:
            self.problems.add(
                f"files of {id}", f"they are in {owner.place}: name that folder, or a copy of it, with --artifacts"
            )
            return
        for path in self._files.walk(folder, f"{id}: file"):
            yield SourceFile(path=path, key=str(folder / path))

    def _folder(self, place: str, depth: int) -> Path | None:
        """Where the files of a place are; None: in no folder that may be read.

        Args:
            place: A path or URI.
            depth: How many of its last parts are the same wherever the store is moved to.
        """
        parsed = urlsplit(place)
        path = Path(unquote(parsed.path))
        if parsed.scheme == "mlflow-artifacts":
            inside = str(path).strip("/")
            return self._proxied / inside if is_plain_path(inside) and self._proxied.is_dir() else None
        if not place or parsed.scheme not in ("", "file"):
            return None
        path = self._home / path
        real = path.resolve() == path  # no link and no `..` on the way
        if real and any(path.is_relative_to(root) and root.is_dir() for root in self._roots):
            return path
        tail = Path(*path.parts[-depth:])
        if not is_plain_path(str(tail)):
            return None
        return next((root / tail for root in self._roots if (root / tail).is_dir()), None)

    def fetch(self, file: SourceFile, blobs: Blobs) -> Artifact | None:
        """Store a file."""
        try:
            with self._files.open(Path(file.key)) as opened:
                return blobs.put(opened)
        except (OSError, ValueError) as error:
            self.problems.add(f"file {file.key}", reason_of(error))
            return None

    # ----------------------------------------------------------------------- registry

    def models(self) -> Iterator[tuple[Model, dict[str, int]]]:
        """Registered models, prompts too."""
        aliases: dict[str, dict[str, int]] = defaultdict(dict)
        for row in self._own(self._table("registered_model_aliases", "SELECT * FROM registered_model_aliases")):
            aliases[row["name"]][str(row["alias"])] = int(row["version"])
        found = self._table("registered_models", "SELECT * FROM registered_models ORDER BY name")
        for row in self._own(found, "registered model"):
            name = str(row["name"])
            tags = "SELECT * FROM registered_model_tags WHERE name = ?"
            own = self._own(self._table("registered_model_tags", tags, (name,)))
            model = Model(
                id=name, name=name, description=str(row["description"] or ""),
                tags=storable(((one["key"], one["value"]) for one in own), f"model {name!r}: tag", self.problems),
                created_at=seconds(row["creation_time"]), updated_at=seconds(row["last_updated_time"]),
            )  # fmt: skip
            yield model, aliases[name]

    def versions(self, name: str) -> list[SourceVersion]:
        """The versions of a model, those whose numbers are not used again too."""
        tags: dict[int, list[tuple[str, Any]]] = defaultdict(list)
        of_model = "SELECT * FROM model_version_tags WHERE name = ?"
        for row in self._own(self._table("model_version_tags", of_model, (name,))):
            tags[row["version"]].append((row["key"], row["value"]))
        rows = self._own(self._table("model_versions", "SELECT * FROM model_versions WHERE name = ?", (name,)))
        found: list[SourceVersion] = []
        for row in rows:
            what = f"version {row['version']} of {name!r}"
            try:
                found.append(self._version(name, row, storable(tags[row["version"]], what, self.problems)))
            except _UNREADABLE as error:
                self.problems.add(what, f"it cannot be read: {error}")
        return found

    def _version(self, name: str, row: Mapping[str, Any], tags: dict[str, str]) -> SourceVersion:
        version = ModelVersion(
            id="", name=name, number=int(row["version"]), bundle=Artifact(digest="", size_bytes=0), format="opaque",
            source="mlflow", chosen_variant="", run_id=str(row["run_id"] or "") or None,
            description=str(row["description"] or ""), stage=str(row["current_stage"] or "None"), tags=tags,
            state=_VERSION_STATES.get(str(row["status"]), "ready"), state_text=str(row["status_message"] or ""),
            created_by=str(row["user_id"] or ""), source_uri=str(row["source"] or ""),
            facts={"run_link": str(row.get("run_link") or "")},
            created_at=seconds(row["creation_time"]), updated_at=seconds(row["last_updated_time"]),
        )  # fmt: skip
        return SourceVersion(version=version, storage=str(row.get("storage_location") or ""))

    # ----------------------------------------------------------------------- rows

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """All rows at once; columns differ by the release of MLflow that made the file."""
        return [dict(row) for row in self._asked(sql, values)]

    def _asked(self, sql: str, values: Sequence[Any] = ()) -> Iterator[sqlite3.Row]:
        try:
            yield from self._database.execute(sql, values)
        except sqlite3.Error as error:
            hint = "is it MLflow's? an old one is brought up to date by `mlflow db upgrade sqlite:///FILE`"
            raise InputError(f"the database {self._path} cannot be read: {error}", hint=hint) from None

    def _table(self, table: str, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows; none where the release did not have the table yet."""
        return self._rows(sql, values) if table in self._tables else []

    def _texts(self, table: str, sql: str, values: Sequence[Any], what: str) -> dict[str, str]:
        """Keys and values that can be kept."""
        return storable((tuple(row.values()) for row in self._table(table, sql, values)), what, self.problems)

    def _own(self, rows: Sequence[dict[str, Any]], what: str = "") -> list[dict[str, Any]]:
        """Without those of other workspaces: their names may be taken twice. They are noted when `what` says it."""
        own = [row for row in rows if row.get("workspace") in (None, OWN_WORKSPACE)]
        if what and len(own) < len(rows):
            others = {str(row["workspace"]) for row in rows} - {OWN_WORKSPACE}
            self.problems.add(
                f"{len(rows) - len(own)} of kind {what}",
                f"they are in another workspace than {OWN_WORKSPACE!r}: {', '.join(sorted(others))}",
            )
        return own
