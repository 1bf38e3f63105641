"""Verbs on bytes: how files reach a server from another machine, and come back."""

from __future__ import annotations

from millrace.core.operations import Operation, Request
from millrace.core.types import Artifact, Struct, TreeEntry


class BlobPut(Request, frozen=True, kw_only=True):
    """A local file; over HTTP the request's body instead."""

    path: str


class BlobGet(Request, frozen=True, kw_only=True):
    """A blob by digest."""

    digest: str


class TreePut(Request, frozen=True, kw_only=True):
    """Files that are stored already, each with its place in a folder."""

    entries: list[TreeEntry]


class PresignRequest(Request, frozen=True, kw_only=True):
    """What is to be uploaded."""

    digest: str
    size_bytes: int


class PresignedUpload(Struct, frozen=True, kw_only=True):
    """Where to send the bytes, past the server; they count once confirmed. A secret until it expires."""

    method: str
    url: str
    headers: dict[str, str]
    expires_at: float


PUT_BLOB = Operation(
    name="blob.put", summary="Store bytes; equal bytes are stored once.", request=BlobPut, response=Artifact,
    method="POST", path="/blobs", is_write=True, is_audited=False, is_raw=True, subject_kind="blob",
    example={"path": "weights.safetensors"},
)  # fmt: skip
GET_BLOB = Operation(
    name="blob.get", summary="A blob's bytes, verified.", request=BlobGet, response=bytes, method="GET",
    path="/blobs/{digest}", is_stream=True, is_raw=True, subject_kind="blob", subject_field="digest",
    example={"digest": "sha256:" + "0" * 64},
)  # fmt: skip
PRESIGN_BLOB = Operation(
    name="blob.presign", summary="Where to send a blob's bytes past the server; null where they must pass through it.",
    request=PresignRequest, response=PresignedUpload | None, method="POST", path="/blobs/presign", is_write=True,
    is_audited=False, subject_kind="blob", subject_field="digest",
    example={"digest": "sha256:" + "0" * 64, "size_bytes": 1 << 30},
)  # fmt: skip
CONFIRM_BLOB = Operation(
    name="blob.confirm", summary="Verify what was sent to a presigned address and make it a blob.",
    request=PresignRequest, response=Artifact, method="POST", path="/blobs/confirm", is_write=True, is_audited=False,
    subject_kind="blob", subject_field="digest", example={"digest": "sha256:" + "0" * 64, "size_bytes": 1 << 30},
)  # fmt: skip
PUT_TREE = Operation(
    name="tree.put", summary="Store a folder's listing.", request=TreePut, response=Artifact, method="POST",
    path="/trees", is_write=True, is_audited=False, subject_kind="blob", example={"entries": []},
)  # fmt: skip
GET_TREE = Operation(
    name="tree.get", summary="A folder's listing.", request=BlobGet, response=list[TreeEntry], method="GET",
    path="/trees/{digest}", subject_kind="blob", subject_field="digest", example={"digest": "sha256:" + "0" * 64},
)  # fmt: skip
OPERATIONS = (PUT_BLOB, GET_BLOB, PRESIGN_BLOB, CONFIRM_BLOB, PUT_TREE, GET_TREE)
