"""Verbs on keys of keys, and on the data of somebody."""

from __future__ import annotations

from millrace.core.operations import Operation, Page, Request
from millrace.core.operations.live import NameRequest
from millrace.core.types import Struct


class KeyView(Struct, frozen=True, kw_only=True):
    """A key of keys, without its bytes: what it is called, and how much it still opens."""

    id: str
    is_current: bool
    created_at: float
    blobs: int
    secrets: int
    source: str  # "home", "file", "env" or "command"


class RotateRequest(Request, frozen=True, kw_only=True):
    """Wrap everything anew. `keep_key`: by the current key, without making another one first."""

    keep_key: bool = False


class Rotated(Struct, frozen=True, kw_only=True):
    """Which key is current, and what it has been wrapped around."""

    current: str
    is_new: bool
    blobs: int
    secrets: int


class EraseRequest(Request, frozen=True, kw_only=True):
    """Whose data: what was given as `data_subject` when it was kept."""

    subject: str = ""


class Erased(Struct, frozen=True, kw_only=True):
    """How many blobs can be read by nobody any more, and what they were of plain bytes."""

    blobs: int
    size_bytes: int
    folders: int  # plain working copies


LIST_KEYS = Operation(
    name="key.list", summary="Keys of keys, and how much each still opens.", request=Page, response=list[KeyView],
    method="GET", path="/keys",
)  # fmt: skip
ROTATE_KEYS = Operation(
    name="key.rotate", summary="Make a new key of keys and wrap everything with it; no blob is written again.",
    request=RotateRequest, response=Rotated, method="POST", path="/keys/rotate", is_write=True, subject_kind="key",
)  # fmt: skip
DROP_KEY = Operation(
    name="key.drop", summary="Forget an old key of keys; refused while something needs it.", request=NameRequest,
    response=KeyView, method="POST", path="/keys/{name}/drop", is_write=True, subject_kind="key",
    subject_field="name", example={"name": "kek-71ffd5a19398"},
)  # fmt: skip
ERASE_DATA = Operation(
    name="key.erase", summary="Throw away the keys of everything that is kept as somebody's data.",
    request=EraseRequest, response=Erased, method="POST", path="/keys/erase", is_write=True, subject_kind="key",
    hidden_fields=("subject",), example={"subject": "patient-4711"},
)  # fmt: skip
OPERATIONS = (LIST_KEYS, ROTATE_KEYS, DROP_KEY, ERASE_DATA)
