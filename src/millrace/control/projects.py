"""Projects: what runs belong to. The key never changes; the name may, and a deleted project keeps it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from millrace.control.dispatch import handles
from millrace.control.services import Services
from millrace.core.errors import ConflictError, InputError, NotFoundError
from millrace.core.operations import projects as ops
from millrace.core.ports import Transaction
from millrace.core.search import Lifecycle
from millrace.core.types import Project, Run

DEFAULT_ID = "0"
DEFAULT_KEY = "default"
DEFAULT_NAME = "Default"  # MLflow clients look for this name
NEWEST = 100  # runs looked at for projects that have no record yet
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def ensure_project(transaction: Transaction, key: str, now_s: float) -> Project:
    """The record of the project that runs carry as `key`; made when there is none.

    Args:
        transaction: Where it is looked for and put.
        key: What runs carry.
        now_s: For `created_at`.
    """
    found = transaction.find(Project, {"project": key})
    if found:
        return found[0]
    if key == DEFAULT_KEY:
        default = Project(id=DEFAULT_ID, project=key, created_at=now_s, updated_at=now_s, name=DEFAULT_NAME)
        return transaction.put(default, expect_version=0)
    id = _next_id(transaction)
    name = f"{key}-{id}" if transaction.find(Project, {"name": key}) else key
    return transaction.put(Project(id=id, project=key, created_at=now_s, updated_at=now_s, name=name), expect_version=0)


def create_project(services: Services, name: str, tags: Mapping[str, str] | None = None) -> Project:
    """A new project.

    Raises:
        ConflictError: The name is taken, maybe by a deleted project; `details["taken"]` is the name.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        ensure_project(transaction, DEFAULT_KEY, now - 0.001)  # so that it is always the oldest
        _refuse_taken(transaction, name)
        id = _next_id(transaction)
        key = name if _KEY.fullmatch(name) and not transaction.find(Project, {"project": name}) else f"p{id}"
        project = Project(id=id, project=key, created_at=now, updated_at=now, name=name, tags=dict(tags or {}))
        return transaction.put(project, expect_version=0)


def change_project(
    services: Services,
    id: str,
    *,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    removed_tags: Sequence[str] = (),
) -> Project:
    """Rename a project, set and remove tags of it.

    Raises:
        NotFoundError: There is no such project, or it has no such tag.
        InputError: It is deleted.
        ConflictError: The name is taken.
    """
    with services.records.transaction() as transaction:
        project = get_project(transaction, id)
        if project.deleted_at is not None:
            raise InputError(f"project {project.name!r} is deleted and cannot be changed", hint="restore it first")
        if name is not None and name != project.name:
            _refuse_taken(transaction, name)
        absent = [tag for tag in removed_tags if tag not in project.tags]
        if absent:
            raise NotFoundError(f"project {project.name!r} has no tag {absent[0]!r}", hint="tags are spelled exactly")
        kept = {tag: value for tag, value in project.tags.items() if tag not in removed_tags}
        changed = msgspec.structs.replace(
            project, name=project.name if name is None else name, tags={**kept, **(tags or {})},
            updated_at=services.clock.now(),
        )  # fmt: skip
        return transaction.put(changed, expect_version=project.version)


def mark_project(services: Services, id: str, *, deleted: bool) -> Project:
    """Delete a project with its runs, or restore both.

    Raises:
        NotFoundError: There is no such project in the other state.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        project = get_project(transaction, id)
        if (project.deleted_at is not None) == deleted:
            state = "deleted already" if deleted else "not deleted"
            raise NotFoundError(f"project {project.name!r} is {state}", hint="`millrace projects` lists what there is")
        at = now if deleted else None
        for run in transaction.find(Run, {"project": project.project}):
            if (run.deleted_at is not None) != deleted:
                transaction.put(msgspec.structs.replace(run, deleted_at=at), expect_version=run.version)
        changed = msgspec.structs.replace(project, deleted_at=at, updated_at=now)
        return transaction.put(changed, expect_version=project.version)


def get_project(transaction: Transaction, id: str) -> Project:
    """A project by id, inside a transaction; `0` is made when it is asked for first.

    Raises:
        NotFoundError: There is none.
    """
    project = transaction.get(Project, id)
    if project is None and id == DEFAULT_ID:
        return ensure_project(transaction, DEFAULT_KEY, 0.0)  # 0 becomes now
    if project is None:
        raise NotFoundError(f"there is no project with the id {id!r}", hint="`millrace projects` lists them")
    return project


def _refuse_taken(transaction: Transaction, name: str) -> None:
    for other in transaction.find(Project, {"name": name}):
        state = " by a deleted project" if other.deleted_at is not None else ""
        raise ConflictError(
            f"the project name {name!r} is taken{state}", hint="choose another name", details={"taken": name}
        )


def _next_id(transaction: Transaction) -> str:
    """Above every id there is: ids only grow, since projects are never removed."""
    return str(max((int(project.id) for project in transaction.find(Project)), default=0) + 1)


class ProjectDirectory:
    """Projects by key and by id. What never changes is kept; the rest is read. Thread-safe.

    Args:
        services: The home.
        seen: What of it whoever is asking may see; all of it by default.
    """

    def __init__(self, services: Services, seen: Callable[[], Services] | None = None) -> None:
        self._services = services
        self._seen = seen or (lambda: services)
        self._by_key: dict[str, Project] = {}
        self._scanned = False
        self._lock = threading.Lock()

    def of_key(self, key: str) -> Project:
        """The project that runs carry as `key`; its name and tags may be of some time ago."""
        known = self._by_key.get(key)
        if known is None:
            known = self._by_key[key] = self._ensure(key)
        return known

    def of_id(self, id: str) -> Project:
        """The project as it is now.

        Raises:
            NotFoundError: There is none.
        """
        project = self._seen().records.get(Project, id)
        if project is None and id == DEFAULT_ID and self._services.records.get(Project, id) is None:
            self._ensure(DEFAULT_KEY)
            project = self._seen().records.get(Project, id)
        if project is None:
            raise NotFoundError(f"there is no project with the id {id!r}", hint="`millrace projects` lists them")
        self._by_key.setdefault(project.project, project)
        return project

    def named(self, name: str) -> Project | None:
        """The project with this name, deleted ones too."""
        found = self._seen().records.find(Project, {"name": name}, limit=1)
        if not found:
            self.sight()
            found = self._seen().records.find(Project, {"name": name}, limit=1)
        return found[0] if found else None

    def all(self) -> list[Project]:
        """Every project, deleted ones too, oldest first."""
        self.sight()
        return self._seen().records.find(Project)

    def sight(self) -> None:
        """Make the records of projects that runs carry and that have none yet (homes of before)."""
        self.of_key(DEFAULT_KEY)
        with self._lock:
            step = NEWEST if self._scanned else 1000
            offset = 0
            while True:
                runs = self._services.records.find(Run, order="-created_at", limit=step, offset=offset)
                for key in {run.project for run in runs}:
                    self.of_key(key)
                if self._scanned or len(runs) < step:
                    break
                offset += step
            self._scanned = True

    def _ensure(self, key: str) -> Project:
        found = self._services.records.find(Project, {"project": key}, limit=1)
        if found:
            return found[0]
        with self._services.records.transaction() as transaction:
            return ensure_project(transaction, key, self._services.clock.now())


# --------------------------------------------------------------------------- verbs


def find_project(services: Services, text: str) -> Project:
    """A project by name, key or id.

    Raises:
        NotFoundError: There is none.
    """
    for where in ({"name": text}, {"project": text}, {"id": text}):
        found = services.records.find(Project, where, limit=1) if services.is_used else []
        if found:
            return found[0]
    raise NotFoundError(f"there is no project {text!r} in {services.home}", hint="`millrace projects` lists them")


@handles(ops.LIST_PROJECTS)
def list_projects(services: Services, body: ops.ProjectList) -> list[Project]:
    """Projects, newest first."""
    if not services.is_used:
        return []
    if services.where is None:
        ProjectDirectory(services).sight()
    found = [one for one in services.records.find(Project, order="-created_at") if fits(one.deleted_at, body.lifecycle)]
    return found[body.offset : body.offset + body.limit]


def fits(deleted_at: float | None, lifecycle: Lifecycle) -> bool:
    """Whether something deleted then, or not, is in a part of the life cycle.

    Example:
        >>> fits(None, "active"), fits(1.0, "active"), fits(1.0, "all")
        (True, False, True)
    """
    return lifecycle == "all" or (deleted_at is not None) == (lifecycle == "deleted")


@handles(ops.CREATE_PROJECT)
def make_project(services: Services, body: ops.ProjectCreate) -> Project:
    """A new project."""
    return create_project(services, body.name, body.tags)


@handles(ops.UPDATE_PROJECT)
def update_project(services: Services, body: ops.ProjectUpdate) -> Project:
    """Rename it, set and remove tags."""
    project = find_project(services, body.project)
    return change_project(services, project.id, name=body.name, tags=body.tags, removed_tags=body.removed_tags)


@handles(ops.DELETE_PROJECT)
def delete_project(services: Services, body: ops.ProjectRequest) -> Project:
    """Mark it and its runs as deleted."""
    return mark_project(services, find_project(services, body.project).id, deleted=True)


@handles(ops.RESTORE_PROJECT)
def restore_project(services: Services, body: ops.ProjectRequest) -> Project:
    """Undo a deletion."""
    return mark_project(services, find_project(services, body.project).id, deleted=False)
