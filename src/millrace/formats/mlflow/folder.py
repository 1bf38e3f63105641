"""A file store (`mlruns/`), read as plain files: no link is followed, nothing outside is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from millrace.core.errors import InputError, NotFoundError
from millrace.core.ports import Blobs
from millrace.core.types import Artifact, LoggedModel, MetricPoint, Model, ModelVersion, Run, RunLink
from millrace.formats.mlflow.plain_files import META, PlainFiles, is_folder, reason_of
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
)

TRASH, REGISTRY = ".trash", "models"
BESIDE_RUNS = frozenset({"tags", "datasets", "traces", "models"})
POINTS_AT_ONCE = 10_000
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


class FolderSource:
    """Implements `Source` for a folder.

    Args:
        folder: The store: it holds experiments, and `models` for the registry.
        artifacts: Where a server kept the files of `mlflow-artifacts:` places, or None.

    Raises:
        NotFoundError: There is no such folder.
        InputError: It is no file store.
    """

    def __init__(self, folder: Path, artifacts: Path | None = None) -> None:
        for one in (folder, artifacts):
            if one is not None and not os.path.isdir(one):  # never raises, whatever the name
                raise NotFoundError(f"there is no folder {one}", hint="name the folder `mlruns` of a file store")
        self.problems = Problems()
        self._files = PlainFiles(self.problems)
        self.root = folder.resolve()
        self.artifacts = artifacts.resolve() if artifacts else None
        if not any((one / META).is_file() for place in (self.root, self.root / TRASH) for one in place.glob("*/")):
            raise InputError(
                f"{folder} is no file store of MLflow: no folder in it has a {META}",
                hint="is the store in a database? name that: `millrace import mlflow sqlite:///mlflow.db`",
            )

    def close(self) -> None:
        """Nothing is open."""

    # ----------------------------------------------------------------------- experiments, runs

    def _experiment_folders(self) -> Iterator[Path]:
        for parent in (self.root, self.root / TRASH):
            for name in self._files.names(parent):
                if name in (TRASH, REGISTRY) and parent == self.root:
                    continue
                if is_folder(parent / name):
                    yield parent / name
                elif (parent / name).is_symlink():
                    self.problems.add(f"experiment {name}", "it is a symbolic link")

    def experiments(self) -> Iterator[Experiment]:
        """Every experiment, those in the trash too."""
        for folder in self._experiment_folders():
            what = f"experiment {folder.name}"
            meta = self._files.meta(folder, what)
            if meta is None:
                continue
            if "name" not in meta:
                self.problems.add(what, f"its {META} has no name")
                continue
            yield Experiment(
                id=str(folder.relative_to(self.root)), name=str(meta["name"]),
                is_deleted=meta.get("lifecycle_stage") == "deleted" or folder.parent.name == TRASH,
                tags=self._files.texts(folder / "tags", f"{what}: tag"),
                created_at=seconds(meta.get("creation_time")), updated_at=seconds(meta.get("last_update_time")),
            )  # fmt: skip

    def runs(self, experiment: Experiment) -> Iterator[SourceRun]:
        """Runs of an experiment, deleted ones too."""
        home = self.root / experiment.id
        if self._files.names(home / "traces"):
            self.problems.add(f"traces of {experiment.name!r}", "Millrace does not keep traces")
        for name in self._files.names(home):
            if name in BESIDE_RUNS or name == META:
                continue
            what = f"run {name} of {experiment.name!r}"
            if not is_folder(home / name):
                self.problems.add(what, "it is no folder of its own: a link, or a file")
                continue
            meta = self._files.meta(home / name, what)
            if meta is None:
                continue
            try:
                yield self._run(experiment, home / name, meta)
            except _UNREADABLE as error:
                self.problems.add(what, f"it cannot be read: {error}")

    def _run(self, experiment: Experiment, folder: Path, meta: Mapping[str, Any]) -> SourceRun:
        id = str(meta.get("run_id") or meta["run_uuid"])
        if id != folder.name:
            raise ValueError(f"its {META} says that it is the run {id}")
        tags = self._files.texts(folder / "tags", f"run {id}: tag")
        started = seconds(meta.get("start_time"))
        return SourceRun(
            run=Run(
                id=id, name=str(meta.get("run_name") or tags.get(NAME_TAG) or ""), state=state_of(meta["status"]),
                created_at=started, started_at=started or None, ended_at=seconds(meta.get("end_time")) or None,
                created_by=str(meta.get("user_id") or ""),
            ),
            experiment=experiment, is_deleted=meta.get("lifecycle_stage") == "deleted", tags=tags,
            params=self._files.texts(folder / "params", f"run {id}: parameter"), links=self._links(folder),
            metrics=list(self._files.walk(folder / "metrics", f"run {id}: metric")),
            place=str(meta.get("artifact_uri") or ""),
        )  # fmt: skip

    def _links(self, folder: Path) -> list[RunLink]:
        """What a run read and wrote. What it says of a dataset is kept with the experiment."""
        links: list[RunLink] = []
        for direction in ("input", "output"):
            above = folder / f"{direction}s"
            for name in self._files.names(above):
                what = f"run {folder.name}: {direction} {name}"
                meta = self._files.meta(above / name, what)
                if meta is None:
                    continue
                id = str(meta.get("source_id") or name)
                if direction == "output" or meta.get("source_type") == "MODEL":
                    links.append(model_link(direction, id, meta.get("step")))
                    continue
                dataset = self._files.meta(folder.parent / "datasets" / Path(id).name, what)
                if dataset is not None and "name" in dataset:
                    tags = {str(key): str(value) for key, value in (meta.get("tags") or {}).items()}
                    links.append(dataset_link(dataset, tags))
        return links

    def points(self, found: SourceRun) -> Iterator[Sequence[MetricPoint]]:
        """The whole history of every metric of a run."""
        folder = self.root / found.experiment.id / found.run.id / "metrics"
        for name in found.metrics:
            yield from batches(self._points(folder / name, found.run.id, name), POINTS_AT_ONCE)

    def _points(self, path: Path, run_id: str, name: str) -> Iterator[MetricPoint]:
        """`time value [step [dataset digest]]` a line."""
        for number, words in self._files.lines(path, f"metric {name!r} of run {run_id}"):
            try:
                if len(words) not in (2, 3, 5):
                    raise ValueError(f"want 2, 3 or 5 words, got {len(words)}")
                yield point_of(run_id, name, words[0], words[1], words[2] if len(words) > 2 else 0)
            except ValueError as error:
                self.problems.add(f"metric {name!r} of run {run_id}, line {number}", error)

    def logged_models(self, experiment: Experiment) -> Iterator[SourceModel]:
        """Logged models of an experiment."""
        home = self.root / experiment.id / "models"
        for name in self._files.names(home):
            what = f"logged model {name}"
            meta = self._files.meta(home / name, what)
            if meta is None:
                continue
            try:
                yield self._model(experiment, home / name, meta)
            except _UNREADABLE as error:
                self.problems.add(what, f"it cannot be read: {error}")

    def _model(self, experiment: Experiment, folder: Path, meta: Mapping[str, Any]) -> SourceModel:
        id = str(meta["model_id"])
        if id != folder.name:
            raise ValueError(f"its {META} says that it is {id}")
        what = f"logged model {id}"
        model = LoggedModel(
            id=id, name=str(meta.get("name") or ""), run_id=str(meta.get("source_run_id") or "") or None,
            state=model_state_of(meta.get("status")), model_type=str(meta.get("model_type") or ""),
            params=self._files.texts(folder / "params", f"{what}: parameter"),
            tags=self._files.texts(folder / "tags", f"{what}: tag"),
            metrics=[
                metric
                for name in self._files.walk(folder / "metrics", f"{what}: metric")
                for metric in self._model_metrics(folder / "metrics" / name, id, name)
            ],
            created_at=seconds(meta.get("creation_timestamp")), updated_at=seconds(meta.get("last_updated_timestamp")),
        )  # fmt: skip
        if meta.get("lifecycle_stage") == "deleted":
            model = msgspec.structs.replace(model, deleted_at=model.updated_at)
        return SourceModel(model=model, experiment=experiment, place=str(meta.get("artifact_location") or ""))

    def _model_metrics(self, path: Path, id: str, name: str) -> Iterator[dict[str, Any]]:
        """`time value step run [dataset digest]` a line."""
        for number, words in self._files.lines(path, f"metric {name!r} of logged model {id}"):
            try:
                if len(words) not in (4, 6):
                    raise ValueError(f"want 4 or 6 words, got {len(words)}")
                yield model_metric(point_of(words[3], name, *words[:3]), id, words[4:])
            except ValueError as error:
                self.problems.add(f"metric {name!r} of logged model {id}, line {number}", error)

    # ----------------------------------------------------------------------- files

    def files(self, owner: SourceRun | SourceModel) -> Iterator[SourceFile]:
        """The files of a run or logged model."""
        if isinstance(owner, SourceRun):
            id, own = f"run {owner.run.id}", self.root / owner.experiment.id / owner.run.id / "artifacts"
        else:
            id, own = f"logged model {owner.model.id}", self.root / owner.experiment.id / "models" / owner.model.id
            own = own / "artifacts"
        folder = own if self._files.names(own) else self._elsewhere(owner.place, own)
        if folder is None:
            self.problems.add(f"files of {id}", f"they are kept in {owner.place}, outside of the folder")
            return
        for path in self._files.walk(folder, f"{id}: file"):
            yield SourceFile(path=path, key=str(folder / path))

    def _elsewhere(self, place: str, own: Path) -> Path | None:
        """Where files are that are not beside the run: None when that is not in a folder that was named."""
        parsed = urlsplit(place)
        path = unquote(parsed.path)
        if parsed.scheme == "mlflow-artifacts":
            inside = path.strip("/")
            return self.artifacts / inside if self.artifacts and is_plain_path(inside) else None
        if parsed.scheme not in ("", "file"):
            return None
        roots = [root for root in (self.root, self.artifacts) if root is not None]
        if not place or Path(path).parts[-3:] == own.parts[-3:]:
            return own  # the store was moved, and there are no files
        real = Path(path).resolve() == Path(path)  # no link and no `..` on the way
        return Path(path) if real and any(Path(path).is_relative_to(root) for root in roots) else None

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
        home = self.root / REGISTRY
        for name in self._files.names(home):
            what = f"model {name!r}"
            meta = self._files.meta(home / name, what)
            if meta is None:
                continue
            aliases = {str(alias): number for alias, number in (meta.get("aliases") or {}).items()}
            aliases |= {
                key: text for key, text in self._files.texts(home / name / "aliases", f"{what}: alias").items() if text
            }
            model = Model(
                id=name, name=name, description=str(meta.get("description") or ""),
                tags=self._files.texts(home / name / "tags", f"{what}: tag"),
                created_at=seconds(meta.get("creation_timestamp")),
                updated_at=seconds(meta.get("last_updated_timestamp")),
            )  # fmt: skip
            yield model, {alias: int(number) for alias, number in aliases.items() if str(number).isdecimal()}

    def versions(self, name: str) -> list[SourceVersion]:
        """The versions of a model."""
        home = self.root / REGISTRY / name
        found: list[SourceVersion] = []
        for folder in self._files.names(home):
            if not folder.startswith("version-"):
                continue
            what = f"{folder} of model {name!r}"
            meta = self._files.meta(home / folder, what)
            try:
                found += [self._version(name, home / folder, meta)] if meta is not None else []
            except _UNREADABLE as error:
                self.problems.add(what, f"it cannot be read: {error}")
        return found

    def _version(self, name: str, folder: Path, meta: Mapping[str, Any]) -> SourceVersion:
        version = ModelVersion(
            id="", name=name, number=int(meta["version"]), bundle=Artifact(digest="", size_bytes=0), format="opaque",
            source="mlflow", chosen_variant="", run_id=str(meta.get("run_id") or "") or None,
            description=str(meta.get("description") or ""), stage=str(meta.get("current_stage") or "None"),
            tags=self._files.texts(folder / "tags", f"version {meta['version']} of {name!r}: tag"),
            state={"PENDING_REGISTRATION": "pending", "FAILED_REGISTRATION": "failed"}.get(
                str(meta.get("status")), "ready"
            ),
            state_text=str(meta.get("status_message") or ""), created_by=str(meta.get("user_id") or ""),
            source_uri=str(meta.get("source") or ""), facts={"run_link": str(meta.get("run_link") or "")},
            created_at=seconds(meta.get("creation_timestamp")), updated_at=seconds(meta.get("last_updated_timestamp")),
        )  # fmt: skip
        return SourceVersion(
            version=version, model_id=str(meta.get("model_id") or ""), storage=str(meta.get("storage_location") or "")
        )
