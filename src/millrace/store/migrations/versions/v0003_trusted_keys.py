"""Public keys of the homes that share these records."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from millrace.store.columns import INTEGER, JSON_TEXT, REAL, TEXT

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "trusted_keys",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("project", TEXT, nullable=False),
        sa.Column("created_at", REAL, nullable=False),
        sa.Column("version", INTEGER, nullable=False),
        sa.Column("body", JSON_TEXT, nullable=False),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("trusted_keys")
