"""Which fields of a record stand in columns of their own. Light: opening a home needs no SQLAlchemy.

`schema` builds the tables from this, `queries` the prepared statements: they cannot disagree.
"""

from __future__ import annotations

from typing import NamedTuple

from millrace.core.types import RECORD_TYPES

HEAD = "0005"  # the newest revision under migrations/versions; a test compares


class Column(NamedTuple):
    """A column that mirrors one field of the record, so that `find` can use SQL."""

    name: str
    type: str = "text"  # text, integer or real
    nullable: bool = False


class TableLayout(NamedTuple):
    """One table per kind of record: id, the shared columns, its own columns, and the whole record as JSON."""

    name: str
    columns: tuple[Column, ...]
    indexes: tuple[tuple[str, ...], ...]


SHARED = (Column("id"), Column("project"), Column("created_at", "real"), Column("version", "integer"))
_NAME, _STATE, _NUMBER = Column("name"), Column("state"), Column("number", "integer")
_RUN = Column("run_id", nullable=True)
_DELETED = Column("deleted_at", "real", nullable=True)

TABLES: dict[str, TableLayout] = {
    "project": TableLayout("projects", (_NAME, _DELETED), (("name",),)),
    "run": TableLayout(
        "runs",
        (
            _NAME,
            _STATE,
            Column("spec_path"),
            Column("created_by"),
            Column("started_at", "real", nullable=True),
            Column("ended_at", "real", nullable=True),
            _DELETED,
        ),
        (("created_at",), ("spec_path",), ("project", "started_at"), ("started_at",)),
    ),
    "step": TableLayout(
        "steps",
        (Column("run_id"), _NAME, Column("stage"), _STATE, Column("cache_key")),
        (("run_id",), ("cache_key",), ("stage", "state"), ("name", "created_at")),
    ),
    "dataset_version": TableLayout("dataset_versions", (_NAME, _NUMBER, _RUN), (("name", "number"),)),
    "model_version": TableLayout("model_versions", (_NAME, _NUMBER, _RUN), (("name", "number"),)),
    "model": TableLayout("models", (_NAME,), ()),
    "logged_model": TableLayout(
        "logged_models", (_NAME, _RUN, _STATE, _DELETED), (("project", "created_at"), ("run_id",))
    ),
    "run_link": TableLayout(
        "run_links",
        (Column("run_id"), Column("direction"), Column("target"), _NAME, Column("digest")),
        (("run_id",), ("name",)),
    ),
    "artifact_file": TableLayout("artifact_files", (Column("owner"), Column("path")), (("owner", "path"),)),
    "alias": TableLayout("aliases", (Column("model"), _NAME, _NUMBER), (("model",),)),
    "endpoint": TableLayout("endpoints", (_NAME, Column("model"), _STATE), (("name",),)),
    "alert": TableLayout(
        "alerts", (Column("endpoint"), Column("model"), _STATE), (("created_at",), ("endpoint", "state"))
    ),
    "lease": TableLayout("leases", (), ()),
    "trusted_key": TableLayout("trusted_keys", (), ()),
    "token": TableLayout("tokens", (_NAME, Column("work_id", nullable=True)), (("work_id",),)),
    "work_item": TableLayout("work_items", (Column("run_id"), _STATE), (("state", "created_at"), ("run_id",))),
    "work_frame": TableLayout("work_frames", (Column("work_id"), _NUMBER), (("work_id", "number"),)),
    "user": TableLayout("users", (_NAME, Column("external")), (("external",),)),
    "session": TableLayout(
        "sessions", (Column("user_name"), Column("expires_at", "real")), (("user_name",), ("expires_at",))
    ),
    "role": TableLayout("roles", (), ()),
    "role_binding": TableLayout("role_bindings", (Column("principal"), Column("role")), (("principal",),)),
    "quota": TableLayout("quotas", (), ()),
    "approval_rule": TableLayout("approval_rules", (), ()),
    "approval": TableLayout("approvals", (Column("model"), _STATE), (("state", "created_at"), ("model",))),
    "secret": TableLayout("secrets", (_NAME,), (("project", "name"),)),
    "data_key": TableLayout(
        "data_keys",
        (Column("stored"), Column("kek"), Column("data_subject")),
        (("stored",), ("kek",), ("data_subject",)),
    ),
    "audit_head": TableLayout("audit_heads", (Column("size", "integer"),), (("size",),)),
}
assert set(TABLES) == set(RECORD_TYPES)
