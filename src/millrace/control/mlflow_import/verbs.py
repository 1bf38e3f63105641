"""The verb: an MLflow store comes over, an experiment at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from millrace.control.dispatch import handles
from millrace.control.mlflow_import.keeping import Keeper
from millrace.control.mlflow_import.keeping_models import is_copy, keep_model
from millrace.control.services import Services
from millrace.core.errors import InputError, NotFoundError
from millrace.core.operations import imports as ops
from millrace.core.types import LoggedModel, Model, Run
from millrace.formats.mlflow.database import DatabaseSource
from millrace.formats.mlflow.folder import FolderSource
from millrace.formats.mlflow.rest import RestSource
from millrace.formats.mlflow.source import DELETED_STAGE, Experiment, Source, SourceVersion


@handles(ops.IMPORT_MLFLOW)
def import_mlflow(services: Services, body: ops.ImportRequest) -> Iterator[ops.ImportEvent]:
    """Read the store's experiments, so that what is wrong with the request is said at once; then bring all over."""
    source = open_source(body)
    try:
        experiments = list(source.experiments())
        absent = sorted(set(body.experiments) - {one.name for one in experiments})
        if absent:
            names = ", ".join(one.name for one in experiments[:12])
            raise NotFoundError(f"{body.source} has no experiment {absent[0]!r}", hint=f"it has {names}")
    except BaseException:
        source.close()
        raise
    chosen = [one for one in experiments if not body.experiments or one.name in body.experiments]
    return Import(services, source, body).events(chosen)


def open_source(body: ops.ImportRequest) -> Source:
    """The store that a request names.

    Raises:
        InputError: It is neither a URL of HTTP, nor a database of SQLite, nor a folder with a file store.
        NotFoundError: There is no such file or folder.
    """
    if body.source.startswith(("http://", "https://")):
        if body.artifacts is not None:
            raise InputError("a server says itself where its files are", hint="leave --artifacts out")
        return RestSource(body.source)
    artifacts = Path(body.artifacts).absolute() if body.artifacts else None
    scheme, mark, rest = body.source.partition("://")
    if scheme == "sqlite" and rest.startswith("/"):  # as SQLAlchemy writes it: three slashes, then the path
        return DatabaseSource(Path(rest[1:].partition("?")[0]).absolute(), artifacts)
    if mark and scheme != "file":
        raise InputError(
            f"want the URL of an MLflow server, the folder of a file store or sqlite:///FILE, got {scheme}://…",
            hint="`mlflow server --backend-store-uri URI --port 5000` serves it: then import http://127.0.0.1:5000",
        )
    path = Path(body.source.removeprefix("file://")).absolute()
    if os.path.isfile(path):  # never raises, whatever the name
        return DatabaseSource(path, artifacts)
    return FolderSource(path, artifacts)


class Import:
    """One import.

    Args:
        services: The home.
        source: What is read; closed at the end.
        body: What was asked for.
    """

    def __init__(self, services: Services, source: Source, body: ops.ImportRequest) -> None:
        self._services, self._source, self._body = services, source, body
        self._keeper = Keeper(services, source, body.source, body.dry_run)

    def events(self, experiments: Sequence[Experiment]) -> Iterator[ops.ImportEvent]:
        """Do it; what happens as it happens."""
        try:
            for experiment in experiments:
                yield from self._experiment(experiment)
            yield from self._registry()
            yield self._event("done", "nothing was written" if self._body.dry_run else "")
        finally:
            self._source.close()

    def _experiment(self, experiment: Experiment) -> Iterator[ops.ImportEvent]:
        before = self._keeper.counts.copy()
        project = self._keeper.project(experiment)
        for model in self._source.logged_models(experiment):
            self._keep(f"logged model {model.model.id}", self._keeper.logged_model, model, project)
            yield from self._problems()
        for run in self._source.runs(experiment):
            self._keep(f"run {run.run.id}", self._keeper.run, run, project)
            yield from self._problems()
        yield from self._problems()
        came = self._keeper.counts - before
        text = ", ".join(
            f"{number} {name}" for name, number in sorted(came.items()) if name not in ("experiments", "bytes")
        )
        yield self._event("experiment", f"{experiment.name}: {text or 'empty'}")

    def _registry(self) -> Iterator[ops.ImportEvent]:
        """Models; those with versions that are copies of others' come last, when the others are there."""
        copies: list[tuple[Model, dict[str, int], list[SourceVersion]]] = []
        for model, aliases in self._source.models():
            found = self._source.versions(model.name)
            model = msgspec.structs.replace(model, last_number=max((one.version.number for one in found), default=0))
            wanted = self._wanted([one for one in found if one.version.stage != DELETED_STAGE])
            if self._body.experiments and not wanted:
                continue
            if any(is_copy(one) for one in wanted):
                copies.append((model, aliases, wanted))
            else:
                yield from self._model(model, aliases, wanted)
        for model, aliases, versions in sorted(copies, key=lambda one: one[0].created_at):
            yield from self._model(model, aliases, versions)
        yield from self._problems()

    def _model(self, model: Model, aliases: dict[str, int], versions: list[SourceVersion]) -> Iterator[ops.ImportEvent]:
        self._keep(f"model {model.name!r}", keep_model, self._keeper, model, aliases, versions)
        yield from self._problems()
        yield self._event("model", f"{model.name}: {len(versions)} versions")

    def _wanted(self, versions: list[SourceVersion]) -> list[SourceVersion]:
        """With chosen experiments: the versions from runs and logged models that are here."""
        if not self._body.experiments:
            return versions
        records = self._services.records
        return [
            one
            for one in versions
            if (one.version.run_id and records.get(Run, one.version.run_id))
            or (one.model_id and records.get(LoggedModel, one.model_id))
        ]

    def _keep(self, what: str, keep: Callable[..., None], *given: Any) -> None:
        """Keep one thing; when a record cannot hold it, it is left out as a whole."""
        try:
            keep(*given)
        except InputError as error:
            self._source.problems.add(what, error.message)

    def _problems(self) -> Iterator[ops.ImportEvent]:
        for text in self._source.problems.take():
            yield self._event("problem", text)

    def _event(self, kind: Literal["experiment", "model", "problem", "done"], text: str) -> ops.ImportEvent:
        counts = {**self._keeper.counts, "problems": self._source.problems.count}
        return ops.ImportEvent(kind=kind, text=text, counts=counts)
