"""Keeping what was read as records: a transaction per run, logged model or registered model; twice is once."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO

import msgspec

from millrace.control.projects import DEFAULT_KEY, ensure_project
from millrace.control.services import Services
from millrace.core.ids import digest_json
from millrace.core.ports import Transaction
from millrace.core.search import RunValues
from millrace.core.types import ArtifactFile, LoggedModel, MetricPoint, Project, Run, RunLink
from millrace.formats.mlflow.source import (
    MODEL_ID,
    NAME_TAG,
    RUN_ID,
    UNSTORABLE,
    Experiment,
    Source,
    SourceModel,
    SourceRun,
    is_name,
)

MARK = "mlflow_import"  # in a run's facts: where it is from, and whether all of it came
UNFINISHED = ("pending", "running")
PROJECT_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LENGTH_BYTES = 8


class Keeper:
    """Writes what a source has.

    Args:
        services: The home.
        source: What is read.
        name: What the source is called in the records of runs.
        dry_run: Only count.
    """

    def __init__(self, services: Services, source: Source, name: str, dry_run: bool) -> None:
        self.services, self.source, self.name, self.dry_run = services, source, name, dry_run
        self.counts: Counter[str] = Counter()

    # ----------------------------------------------------------------------- projects

    def project(self, experiment: Experiment) -> Project:
        """The project with the experiment's name, made where there is none; one that is here keeps what it has."""
        self.counts["experiments"] += 1
        if self.dry_run:
            found = self.services.records.find(Project, {"name": experiment.name}, limit=1)
            return found[0] if found else Project(id="", name=experiment.name)
        now = self.services.clock.now()
        with self.services.records.transaction() as transaction:
            default = ensure_project(transaction, DEFAULT_KEY, now - 0.001)
            here = transaction.find(Project, {"name": experiment.name})
            project = here[0] if here else _new_project(transaction, experiment, now)
            changed = msgspec.structs.replace(project, tags={**experiment.tags, **project.tags})
            if project.id == default.id:  # always the oldest
                oldest = min(project.created_at, experiment.created_at or now)
                changed = msgspec.structs.replace(changed, created_at=oldest)
            return project if changed == project else transaction.put(changed, expect_version=project.version)

    # ----------------------------------------------------------------------- runs

    def run(self, found: SourceRun, project: Project) -> None:
        """A run with all that it has. One that is here and complete is passed over."""
        id = found.run.id
        if not RUN_ID.fullmatch(id):
            self.source.problems.add(f"run {id[:100]!r}", "its id is not 32 hexadecimal digits")
            return
        existing = self.services.records.get(Run, id)
        mark = existing.facts.get(MARK, {}) if existing else {}
        if existing is not None and not mark:
            self.source.problems.add(f"run {id}", "a run with this id is here already, and was not imported")
            return
        if existing is not None and mark["complete"] and existing.state not in UNFINISHED:
            self.counts["runs here already"] += 1
            return
        self.counts["runs completed" if existing else "runs"] += 1
        if self.dry_run:
            return
        problems = self.source.problems.count
        files = self._files(id, project, found)
        with tempfile.TemporaryFile() as spool:
            for points in self.source.points(self._nameable(found)):
                _spool(spool, points)
            complete = self.source.problems.count == problems
            with self.services.records.transaction() as transaction:
                self._put_run(transaction, found, project, complete)
                for points in _unspooled(spool):
                    transaction.log(id, points=points)
                    self.counts["points"] += len(points)
                self._put_links(transaction, id, project, found.links)
                self._put_files(transaction, files)

    def _put_run(self, transaction: Transaction, found: SourceRun, project: Project, complete: bool) -> None:
        run, now = found.run, self.services.clock.now()
        is_deleted = found.is_deleted or project.deleted_at is not None
        existing = transaction.get(Run, run.id)
        values = self.services.records.run_values([run.id]).get(run.id, RunValues()) if existing else RunValues()
        facts = {MARK: {"source": self.name, "experiment": found.experiment.name, "complete": complete}}
        if existing is None:
            own = msgspec.structs.replace(
                run, project=project.project, created_at=run.created_at or now, facts=facts,
                tags={"source": "mlflow"}, deleted_at=now if is_deleted else None,
            )  # fmt: skip
        else:
            ended = existing.state not in UNFINISHED
            own = msgspec.structs.replace(
                existing, facts={**existing.facts, **facts}, state=existing.state if ended else run.state,
                ended_at=existing.ended_at if ended else run.ended_at,
            )  # fmt: skip
        transaction.put(own, expect_version=own.version)
        params = {name: value for name, value in found.params.items() if name not in values.params}
        tags = {NAME_TAG: own.name, **found.tags}
        absent = {name: value for name, value in tags.items() if name not in values.tags}
        transaction.log(run.id, params=params, tags=absent)

    def _nameable(self, found: SourceRun) -> SourceRun:
        bad = [name for name in found.metrics if not is_name(name)]
        for name in bad:
            self.source.problems.add(f"metric {name[:300]!r} of run {found.run.id}", UNSTORABLE)
        return msgspec.structs.replace(found, metrics=[name for name in found.metrics if name not in bad])

    def _put_links(self, transaction: Transaction, run_id: str, project: Project, links: Sequence[RunLink]) -> None:
        for link in links:
            what = [run_id, link.direction, link.target, link.name, link.digest]
            id = digest_json(what).removeprefix("sha256:")[:32]  # as control.recorded has it
            if transaction.get(RunLink, id) is None:
                own = msgspec.structs.replace(
                    link, id=id, run_id=run_id, project=project.project, created_at=self.services.clock.now()
                )
                transaction.put(own, expect_version=0)

    # ----------------------------------------------------------------------- files

    def _files(self, owner: str, project: Project, found: SourceRun | SourceModel) -> list[ArtifactFile]:
        """The files that are not here yet, their bytes stored."""
        here = {file.path for file in self.services.records.find(ArtifactFile, {"owner": owner})}
        kept: list[ArtifactFile] = []
        for file in self.source.files(found):
            if file.path in here:
                continue
            artifact = self.source.fetch(file, self.services.blobs)
            if artifact is not None:
                kept.append(
                    ArtifactFile(
                        id=f"{owner}/{file.path}", project=project.project, created_at=self.services.clock.now(),
                        owner=owner, path=file.path, artifact=artifact,
                    )
                )  # fmt: skip
        return kept

    def _put_files(self, transaction: Transaction, files: Sequence[ArtifactFile]) -> None:
        for file in files:
            if transaction.get(ArtifactFile, file.id) is None:
                transaction.put(file, expect_version=0)
                self.counts["files"] += 1
                self.counts["bytes"] += file.artifact.size_bytes

    # ----------------------------------------------------------------------- logged models

    def logged_model(self, found: SourceModel, project: Project) -> None:
        """A logged model with its files; what one that is here lacks is added."""
        model = found.model
        if not MODEL_ID.fullmatch(model.id):
            self.source.problems.add(f"logged model {model.id[:100]!r}", "its id is not m- and 32 hexadecimal digits")
            return
        existing = self.services.records.get(LoggedModel, model.id)
        self.counts["logged models here already" if existing else "logged models"] += 1
        if self.dry_run:
            return
        files = self._files(model.id, project, found)
        with self.services.records.transaction() as transaction:
            existing = transaction.get(LoggedModel, model.id)
            if existing is None:
                now = self.services.clock.now()
                own = msgspec.structs.replace(
                    model, project=project.project, created_at=model.created_at or now,
                    updated_at=model.updated_at or now,
                )  # fmt: skip
            else:
                new = [metric for metric in model.metrics if metric not in existing.metrics]
                own = msgspec.structs.replace(
                    existing, metrics=[*existing.metrics, *new], params={**model.params, **existing.params},
                    tags={**model.tags, **existing.tags},
                    state=model.state if existing.state == "pending" else existing.state,
                )  # fmt: skip
            if own != existing:
                transaction.put(own, expect_version=own.version)
            self._put_files(transaction, files)


def _new_project(transaction: Transaction, experiment: Experiment, now_s: float) -> Project:
    name = experiment.name
    is_key = PROJECT_KEY.fullmatch(name) and not transaction.find(Project, {"project": name})
    key = name if is_key else "experiment-" + digest_json(name).removeprefix("sha256:")[:16]
    made = ensure_project(transaction, key, now_s)
    own = msgspec.structs.replace(
        made, name=name, created_at=experiment.created_at or now_s, updated_at=experiment.updated_at or now_s,
        deleted_at=now_s if experiment.is_deleted else None,
    )  # fmt: skip
    return transaction.put(own, expect_version=made.version)


def _spool(spool: IO[bytes], points: Sequence[MetricPoint]) -> None:
    content = msgspec.msgpack.encode(points)
    spool.write(len(content).to_bytes(_LENGTH_BYTES))
    spool.write(content)


def _unspooled(spool: IO[bytes]) -> Iterator[list[MetricPoint]]:
    """The points again: they wait in a file, so that no transaction is open while a source is read."""
    spool.seek(0)
    while length := spool.read(_LENGTH_BYTES):
        yield msgspec.msgpack.decode(spool.read(int.from_bytes(length)), type=list[MetricPoint])
