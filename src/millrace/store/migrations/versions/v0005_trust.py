"""Who may do what, secrets and keys, heads of the audit tree."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from millrace.store.columns import INTEGER, JSON_TEXT, REAL, TEXT

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES: dict[str, list[sa.Column]] = {
    "users": [sa.Column("name", TEXT, nullable=False), sa.Column("external", TEXT, nullable=False)],
    "sessions": [sa.Column("user_name", TEXT, nullable=False), sa.Column("expires_at", REAL, nullable=False)],
    "roles": [],
    "role_bindings": [sa.Column("principal", TEXT, nullable=False), sa.Column("role", TEXT, nullable=False)],
    "quotas": [],
    "approval_rules": [],
    "approvals": [sa.Column("model", TEXT, nullable=False), sa.Column("state", TEXT, nullable=False)],
    "secrets": [sa.Column("name", TEXT, nullable=False)],
    "data_keys": [
        sa.Column("stored", TEXT, nullable=False),
        sa.Column("kek", TEXT, nullable=False),
        sa.Column("data_subject", TEXT, nullable=False),
    ],
    "audit_heads": [sa.Column("size", INTEGER, nullable=False)],
}
INDEXES = (
    ("users", ("external",)),
    ("sessions", ("user_name",)),
    ("sessions", ("expires_at",)),
    ("role_bindings", ("principal",)),
    ("approvals", ("state", "created_at")),
    ("approvals", ("model",)),
    ("secrets", ("project", "name")),
    ("data_keys", ("stored",)),
    ("data_keys", ("kek",)),
    ("data_keys", ("data_subject",)),
    ("audit_heads", ("size",)),
)
OF_EVENTS = (("subject", "seq"), ("at", "id"), ("actor", "at", "id"), ("verb", "at", "id"))


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
    op.drop_index("ix_events_subject_seq", "events")
    sealed = sa.text("seq IS NOT NULL")
    for names in OF_EVENTS:
        name = f"ix_events_{'_'.join(names)}"
        op.create_index(name, "events", list(names), sqlite_where=sealed, postgresql_where=sealed)


def downgrade() -> None:
    """Drop them."""
    for names in OF_EVENTS:
        op.drop_index(f"ix_events_{'_'.join(names)}", "events")
    op.create_index("ix_events_subject_seq", "events", ["subject", "seq"])
    for name in TABLES:
        op.drop_table(name)
