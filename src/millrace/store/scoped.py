"""Records as somebody sees them who may work in some projects only: the others do not exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from millrace.core.errors import DeniedError, NotFoundError
from millrace.core.ports import Records, Transaction
from millrace.core.principals import EVERYWHERE, includes
from millrace.core.search import FoundRun, RunQuery, RunValues
from millrace.core.types import (
    Alert,
    Alias,
    Approval,
    ApprovalRule,
    ArtifactFile,
    DatasetVersion,
    Endpoint,
    Event,
    LoggedModel,
    MetricPoint,
    Model,
    ModelVersion,
    Project,
    Quota,
    Record,
    Run,
    RunLink,
    Secret,
    Step,
)

R = TypeVar("R", bound=Record)
OF_PROJECTS: frozenset[type[Record]] = frozenset({
    Project, Run, Step, DatasetVersion, Model, ModelVersion, LoggedModel, RunLink, ArtifactFile, Alias, Endpoint, Alert,
    Approval, ApprovalRule, Quota, Secret,
})  # fmt: skip
_SUBJECTS: dict[str, type[Record]] = {
    "run": Run, "step": Step, "model": Model, "endpoint": Endpoint, "alert": Alert, "dataset": DatasetVersion,
}  # fmt: skip


class ScopedRecords:
    """Implements `core.ports.Records` over another one, for the projects in `where`.

    Args:
        records: All of them.
        where: Projects, as `Principal.where` returns them.
    """

    def __init__(self, records: Records, where: frozenset[str]) -> None:
        self._records, self._where = records, where

    def get(self, record_type: type[R], id: str) -> R | None:
        """The record, if it may be seen."""
        return self._seen(self._records.get(record_type, id))

    def find(
        self,
        record_type: type[R],
        where: Mapping[str, Any] | None = None,
        order: str = "created_at",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[R]:
        """Those that may be seen."""
        if record_type not in OF_PROJECTS:
            return self._records.find(record_type, where, order, limit, offset)
        if EVERYWHERE in self._where:  # all but some: the store has no such question
            found = [one for one in self._records.find(record_type, where, order) if self._sees(one)]
            return found[offset:] if limit is None else found[offset : offset + limit]
        return self._records.find(record_type, self._narrowed(where), order, limit, offset)

    def put(self, record: R, expect_version: int | None = None) -> R:
        """Put one, in a project that may be written."""
        with self.transaction() as transaction:
            return transaction.put(record, expect_version)

    @contextmanager
    def transaction(self) -> Iterator[ScopedTransaction]:
        """A transaction that sees and changes as little."""
        with self._records.transaction() as transaction:
            yield ScopedTransaction(transaction, self)

    def events(self, since: int = 0, subject: str | None = None, limit: int = 1000) -> list[Event]:
        """Events about what may be seen."""
        found: list[Event] = []
        at_once = max(limit, 256)  # many in a row may be about something else
        while len(found) < limit and (page := self._records.events(since, subject, at_once)):
            found.extend(event for event in page if self._sees_subject(event.subject))
            since = page[-1].seq or since
        return found[:limit]

    def seal(self, fence: int = 0) -> int:
        """Seal all."""
        return self._records.seal(fence)

    def append_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Append points of runs that may be written."""
        for run_id in {point.run_id for point in points}:
            self._check_run(run_id)
        self._records.append_metrics(points)

    def metrics(self, run_id: str, name: str | None = None, since: int = 0, limit: int = 100_000) -> list[MetricPoint]:
        """Points of a run; none of one that may not be seen."""
        return self._records.metrics(run_id, name, since, limit) if self._sees_run(run_id) else []

    def search_runs(self, query: RunQuery) -> list[FoundRun]:
        """Runs that fit and may be seen."""
        if EVERYWHERE in self._where:
            keys = {run.project for run in self._records.find(Project)} - {one[1:] for one in self._where}
            wanted = tuple(sorted(key for key in keys if not query.projects or key in query.projects))
        else:
            wanted = tuple(sorted(one for one in self._where if not query.projects or one in query.projects))
        return self._records.search_runs(msgspec.structs.replace(query, projects=wanted)) if wanted else []

    def run_values(self, run_ids: Sequence[str]) -> dict[str, RunValues]:
        """Values of runs; of those that may not be seen, empty ones."""
        seen = [run_id for run_id in run_ids if self._sees_run(run_id)]
        return {run_id: RunValues() for run_id in run_ids} | self._records.run_values(seen)

    def metric_history(
        self, run_id: str, name: str, limit: int | None = None, after: tuple[float, int, int] | None = None
    ) -> list[tuple[MetricPoint, tuple[float, int, int]]]:
        """Points of one metric; none of a run that may not be seen."""
        return self._records.metric_history(run_id, name, limit, after) if self._sees_run(run_id) else []

    def close(self) -> None:
        """Nothing: the records are somebody else's."""

    def __getattr__(self, name: str) -> Any:
        raise DeniedError(
            f"records.{name} is about all projects, and this is asked by somebody who may work in some",
            hint="ask an owner",
        )

    # ------------------------------------------------------------------ what may be seen

    def check_write(self, record: Record, stored: Record | None) -> None:
        """Refuse to write into another project, or over one of its records.

        Raises:
            DeniedError: That is what it would do.
        """
        if type(record) in OF_PROJECTS and not (self._sees(record) and (stored is None or self._sees(stored))):
            where = record.project if not self._sees(record) or stored is None else stored.project
            raise DeniedError(f"you may not write a {record.kind} of the project {where!r}")

    def seen(self, record: R | None) -> R | None:
        """The record, or None."""
        return self._seen(record)

    def _seen(self, record: R | None) -> R | None:
        return record if record is not None and self._sees(record) else None

    def _sees(self, record: Record) -> bool:
        return type(record) not in OF_PROJECTS or includes(self._where, record.project)

    def _sees_run(self, run_id: str) -> bool:
        return self.get(Run, run_id) is not None

    def _check_run(self, run_id: str) -> None:
        if not self._sees_run(run_id):
            raise NotFoundError(f"there is no run {run_id}")

    def _sees_subject(self, subject: str) -> bool:
        kind, _, id = subject.partition(":")
        record_type = _SUBJECTS.get(kind)
        if kind == "project":
            return includes(self._where, id)
        if record_type is None:
            return False
        return self.get(record_type, id.partition("@")[0]) is not None

    def _narrowed(self, where: Mapping[str, Any] | None) -> dict[str, Any]:
        given = dict(where or {})
        asked = given.get("project")
        named = asked if isinstance(asked, list) else [asked] if asked is not None else None
        given["project"] = sorted(one for one in self._where if named is None or one in named)
        return given


class ScopedTransaction:
    """Implements `core.ports.Transaction` for some projects."""

    def __init__(self, transaction: Transaction, scope: ScopedRecords) -> None:
        self._transaction, self._scope = transaction, scope

    def get(self, record_type: type[R], id: str) -> R | None:
        """The record, if it may be seen."""
        return self._scope.seen(self._transaction.get(record_type, id))

    def find(self, record_type: type[R], where: Mapping[str, Any] | None = None) -> list[R]:
        """Those that may be seen. Projects are all there: a new one needs a number and a name that none has."""
        found = self._transaction.find(record_type, where)
        return found if record_type is Project else [one for one in found if self._scope.seen(one) is not None]

    def put(self, record: R, expect_version: int | None = None) -> R:
        """Insert or replace.

        Raises:
            DeniedError: It belongs to another project, or stands where a record of another project stands.
        """
        self._scope.check_write(record, self._transaction.get(type(record), record.id))
        return self._transaction.put(record, expect_version)

    def delete(self, record_type: type[Record], id: str) -> bool:
        """Remove; False when there was none that may be seen."""
        return self.get(record_type, id) is not None and self._transaction.delete(record_type, id)

    def append(self, event: Event) -> None:
        """Add an event."""
        self._transaction.append(event)

    def log(self, run_id: str, **values: Any) -> None:
        """Record points, parameters and tags of a run that may be written."""
        if self.get(Run, run_id) is None:
            raise NotFoundError(f"there is no run {run_id}")
        self._transaction.log(run_id, **values)
