"""Verbs on projects."""

from __future__ import annotations

from millrace.core.operations import Operation, Page, Request
from millrace.core.search import Lifecycle
from millrace.core.types import Project


class ProjectList(Page, frozen=True, kw_only=True):
    """Projects, newest first; `lifecycle` chooses active ones, deleted ones or all."""

    lifecycle: Lifecycle = "active"


class ProjectRequest(Request, frozen=True, kw_only=True):
    """One project, by name, key or id."""

    project: str


class ProjectCreate(Request, frozen=True, kw_only=True):
    """A new project."""

    name: str
    tags: dict[str, str] = {}


class ProjectUpdate(ProjectRequest, frozen=True, kw_only=True):
    """A new name, tags to set, tags to remove."""

    name: str | None = None
    tags: dict[str, str] = {}
    removed_tags: list[str] = []


_PROJECT = {"project": "digits"}
LIST_PROJECTS = Operation(
    name="project.list", summary="Projects, newest first.", request=ProjectList, response=list[Project],
    method="GET", path="/projects",
)  # fmt: skip
CREATE_PROJECT = Operation(
    name="project.create", summary="Make a project.", request=ProjectCreate, response=Project, method="POST",
    path="/projects", is_write=True, subject_kind="project", subject_field="name", example={"name": "digits"},
)  # fmt: skip
UPDATE_PROJECT = Operation(
    name="project.update", summary="Rename a project or change its tags.", request=ProjectUpdate, response=Project,
    method="PATCH", path="/projects/{project}", is_write=True, subject_kind="project", subject_field="project",
    example={**_PROJECT, "name": "numbers"},
)  # fmt: skip
DELETE_PROJECT = Operation(
    name="project.delete", summary="Delete a project with its runs; it can be restored.", request=ProjectRequest,
    response=Project, method="DELETE", path="/projects/{project}", is_write=True, subject_kind="project",
    subject_field="project", example=_PROJECT,
)  # fmt: skip
RESTORE_PROJECT = Operation(
    name="project.restore", summary="Bring a deleted project and its runs back.", request=ProjectRequest,
    response=Project, method="POST", path="/projects/{project}/restore", is_write=True, subject_kind="project",
    subject_field="project", example=_PROJECT,
)  # fmt: skip
OPERATIONS = (LIST_PROJECTS, CREATE_PROJECT, UPDATE_PROJECT, DELETE_PROJECT, RESTORE_PROJECT)
