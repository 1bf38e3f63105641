"""Tokens, and works for workers of other machines."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from millrace.store.columns import INTEGER, JSON_TEXT, REAL, TEXT

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES: dict[str, list[sa.Column]] = {
    "tokens": [
        sa.Column("name", TEXT, nullable=False),
        sa.Column("work_id", TEXT, nullable=True),
    ],
    "work_items": [
        sa.Column("run_id", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
    ],
    "work_frames": [
        sa.Column("work_id", TEXT, nullable=False),
        sa.Column("number", INTEGER, nullable=False),
    ],
}
INDEXES = (
    ("tokens", ("work_id",)),
    ("work_items", ("state", "created_at")),
    ("work_items", ("run_id",)),
    ("work_frames", ("work_id", "number")),
)


def upgrade() -> None:
    """Add the tables."""
    for name, columns in TABLES.items():
        op.create_table(
            name,
            sa.Column("id", TEXT, primary_key=True, nullable=False),
            sa.Column("project", TEXT, nullable=False),
            sa.Column("created_at", REAL, nullable=False),
            sa.Column("version", INTEGER, nullable=False),
            *columns,
            sa.Column("body", JSON_TEXT, nullable=False),
        )
    for table, names in INDEXES:
        op.create_index(f"ix_{table}_{'_'.join(names)}", table, list(names))


def downgrade() -> None:
    """Drop them."""
    for name in TABLES:
        op.drop_table(name)
