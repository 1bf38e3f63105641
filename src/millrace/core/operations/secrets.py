"""Verbs on secrets: values that only steps see which name them."""

from __future__ import annotations

from millrace.core.operations import Operation, Page, Request
from millrace.core.types import Struct


class SecretView(Struct, frozen=True, kw_only=True):
    """A secret without its value. `number` goes up with every change."""

    name: str
    project: str
    number: int
    changed_at: float


class SecretList(Page, frozen=True, kw_only=True):
    """Secrets of one project, or of all that may be seen."""

    in_project: str | None = None


class SecretSet(Request, frozen=True, kw_only=True):
    """A value under a name: letters, digits and `_`, as in an environment variable."""

    name: str
    value: str
    in_project: str = "default"

    def __repr__(self) -> str:
        """Without the value."""
        return f"SecretSet({self.name!r}, in_project={self.in_project!r})"


class SecretName(Request, frozen=True, kw_only=True):
    """One secret of a project."""

    name: str
    in_project: str = "default"


LIST_SECRETS = Operation(
    name="secret.list", summary="Secrets by name; values are never shown.", request=SecretList,
    response=list[SecretView], method="GET", path="/secrets",
)  # fmt: skip
SET_SECRET = Operation(
    name="secret.set", summary="Keep a value that only steps see which name it.", request=SecretSet,
    response=SecretView, method="POST", path="/secrets", is_write=True, subject_kind="secret", subject_field="name",
    hidden_fields=("value",), example={"name": "DB_PASSWORD", "value": "…", "in_project": "digits"},
)  # fmt: skip
ROTATE_SECRET = Operation(
    name="secret.rotate", summary="Give a secret another value; steps that name it run again.", request=SecretSet,
    response=SecretView, method="POST", path="/secrets/rotate", is_write=True, subject_kind="secret",
    subject_field="name", hidden_fields=("value",),
    example={"name": "DB_PASSWORD", "value": "…", "in_project": "digits"},
)  # fmt: skip
DELETE_SECRET = Operation(
    name="secret.delete", summary="Forget a secret.", request=SecretName, response=SecretView, method="POST",
    path="/secrets/{name}/delete", is_write=True, subject_kind="secret", subject_field="name",
    example={"name": "DB_PASSWORD", "in_project": "digits"},
)  # fmt: skip
OPERATIONS = (LIST_SECRETS, SET_SECRET, ROTATE_SECRET, DELETE_SECRET)
