"""Verbs on bytes: how files reach a server from another machine, and come back."""

from __future__ import annotations

from millrace.core.operations import Operation, Request
from millrace.core.types import Artifact, TreeEntry


class BlobPut(Request, frozen=True, kw_only=True):
    """A local file; over HTTP the request's body instead."""

    path: str


class BlobGet(Request, frozen=True, kw_only=True):
    """A blob by digest."""

    digest: str


class TreePut(Request, frozen=True, kw_only=True):
    """Files that are stored already, each with its place in a folder."""

    entries: list[TreeEntry]


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
PUT_TREE = Operation(
    name="tree.put", summary="Store a folder's listing.", request=TreePut, response=Artifact, method="POST",
    path="/trees", is_write=True, is_audited=False, subject_kind="blob", example={"entries": []},
)  # fmt: skip
GET_TREE = Operation(
    name="tree.get", summary="A folder's listing.", request=BlobGet, response=list[TreeEntry], method="GET",
    path="/trees/{digest}", subject_kind="blob", subject_field="digest", example={"digest": "sha256:" + "0" * 64},
)  # fmt: skip
OPERATIONS = (PUT_BLOB, GET_BLOB, PUT_TREE, GET_TREE)
