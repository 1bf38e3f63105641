"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from millrace.store.columns import BYTES, INTEGER, JSON_TEXT, REAL, TEXT

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _columns(*names: str) -> list[sa.Column]:
    """Own columns: a trailing `#` means integer, a trailing `?` nullable."""
    return [
        sa.Column(name.rstrip("#?"), INTEGER if "#" in name else TEXT, nullable=name.endswith("?")) for name in names
    ]


def _record_table(table: str, columns: list[sa.Column], indexes: tuple[tuple[str, ...], ...] = ()) -> None:
    op.create_table(
        table,
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("project", TEXT, nullable=False),
        sa.Column("created_at", REAL, nullable=False),
        sa.Column("version", INTEGER, nullable=False),
        *columns,
        sa.Column("body", JSON_TEXT, nullable=False),
    )
    for names in indexes:
        op.create_index(f"ix_{table}_{'_'.join(names)}", table, list(names))


def upgrade() -> None:
    """Create every table."""
    _record_table("runs", _columns("name", "state", "spec_path"), (("created_at",), ("spec_path",)))
    _record_table(
        "steps",
        _columns("run_id", "name", "stage", "state", "cache_key"),
        (("run_id",), ("cache_key",), ("stage", "state"), ("name", "created_at")),
    )
    _record_table("dataset_versions", _columns("name", "number#", "run_id?"), (("name", "number"),))
    _record_table("model_versions", _columns("name", "number#", "run_id?"), (("name", "number"),))
    _record_table("aliases", _columns("model", "name", "number#"), (("model",),))
    _record_table("endpoints", _columns("name", "model", "state"), (("name",),))
    _record_table("alerts", _columns("endpoint", "model", "state"), (("created_at",), ("endpoint", "state")))
    _record_table("leases", [])
    _events()
    op.create_table(
        "metrics",
        sa.Column("id", INTEGER, primary_key=True),
        sa.Column("run_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("value", REAL),
        sa.Column("at", REAL, nullable=False),
    )
    op.create_index("ix_metrics_run_id", "metrics", ["run_id", "id"])
    op.create_table(
        "meta",
        sa.Column("key", TEXT, primary_key=True, nullable=False),
        sa.Column("value", TEXT, nullable=False),
    )


def _events() -> None:
    unsealed = sa.text("seq IS NULL")
    op.create_table(
        "events",
        sa.Column("id", INTEGER, primary_key=True),
        sa.Column("seq", INTEGER, unique=True),
        sa.Column("at", REAL, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("verb", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("commitment", TEXT, nullable=False),
        sa.Column("chain", TEXT),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_subject_seq", "events", ["subject", "seq"])
    op.create_index("ix_events_unsealed", "events", ["id"], sqlite_where=unsealed, postgresql_where=unsealed)
    op.create_table(
        "event_details",
        sa.Column("event_id", INTEGER, primary_key=True, autoincrement=False),
        sa.Column("salt", BYTES, nullable=False),
        sa.Column("detail", JSON_TEXT, nullable=False),
    )


def downgrade() -> None:
    """Drop every table."""
    for table in (
        "meta", "metrics", "event_details", "events", "leases", "alerts", "endpoints", "aliases",
        "model_versions", "dataset_versions", "steps", "runs",
    ):  # fmt: skip
        op.drop_table(table)
