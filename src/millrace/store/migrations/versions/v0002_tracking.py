"""Projects, models, logged models, links, artifact files; searchable values of runs."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from millrace.store.columns import INTEGER, JSON_TEXT, REAL, TEXT

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NEW_RECORDS = {
    "projects": (("name", "deleted_at~"), (("name",),)),
    "models": (("name",), ()),
    "logged_models": (("name", "run_id?", "state", "deleted_at~"), (("project", "created_at"), ("run_id",))),
    "run_links": (("run_id", "direction", "target", "name", "digest"), (("run_id",), ("name",))),
    "artifact_files": (("owner", "path"), (("owner", "path"),)),
}
VALUES = ("run_params", "run_tags", "latest_metrics")
RUN_COLUMNS = ("created_by", "started_at~", "ended_at~", "deleted_at~")
RUN_INDEXES = (("project", "started_at"), ("started_at",))
RUN_ORDER = (
    "id", "project", "created_at", "version", "name", "state", "spec_path",
    "created_by", "started_at", "ended_at", "deleted_at", "body",
)  # fmt: skip
OWN_TAGS = ("source", "cancel")  # set by Millrace itself: they stay in the record
LATEST = """
INSERT INTO latest_metrics (run_id, key, value, step, at)
SELECT run_id, name, value, step, at FROM (
    SELECT run_id, name, value, step, at, row_number() OVER (
        PARTITION BY run_id, name
        ORDER BY step DESC, at DESC, CASE WHEN value IS NULL THEN 1 ELSE 0 END, value DESC
    ) AS place
    FROM metrics
) AS points WHERE place = 1
"""


def _column(name: str) -> sa.Column:
    """A trailing `~` means a nullable number, `?` a nullable text."""
    return sa.Column(name.rstrip("~?"), REAL if "~" in name else TEXT, nullable=name.endswith(("~", "?")))


def upgrade() -> None:
    """Add them; columns and values of existing runs are taken from their bodies and points."""
    for table, (columns, indexes) in NEW_RECORDS.items():
        op.create_table(
            table,
            sa.Column("id", TEXT, primary_key=True, nullable=False),
            sa.Column("project", TEXT, nullable=False),
            sa.Column("created_at", REAL, nullable=False),
            sa.Column("version", INTEGER, nullable=False),
            *(_column(name) for name in columns),
            sa.Column("body", JSON_TEXT, nullable=False),
        )
        for names in indexes:
            op.create_index(f"ix_{table}_{'_'.join(names)}", table, list(names))
    _add_run_columns()
    _create_values()
    _fill_from_bodies()
    op.execute(LATEST)


def _add_run_columns() -> None:
    for name in RUN_COLUMNS:
        column = _column(name)
        if not column.nullable:
            column.server_default = sa.DefaultClause("")
        op.add_column("runs", column)
    # SQLite makes a new table of it, with the columns where a new home has them: what stands behind a long
    # body is slow to read.
    with op.batch_alter_table("runs", partial_reordering=[RUN_ORDER]) as batch:
        batch.alter_column("created_by", server_default=None)
    for names in RUN_INDEXES:
        op.create_index(f"ix_runs_{'_'.join(names)}", "runs", list(names))


def _create_values() -> None:
    for table in ("run_params", "run_tags"):
        op.create_table(
            table,
            sa.Column("run_id", TEXT, primary_key=True, nullable=False),
            sa.Column("key", TEXT, primary_key=True, nullable=False),
            sa.Column("value", TEXT, nullable=False),
            sqlite_with_rowid=False,
        )
    op.create_table(
        "latest_metrics",
        sa.Column("run_id", TEXT, primary_key=True, nullable=False),
        sa.Column("key", TEXT, primary_key=True, nullable=False),
        sa.Column("value", REAL),
        sa.Column("step", INTEGER, nullable=False),
        sa.Column("at", REAL, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_latest_metrics_key_value_run_id", "latest_metrics", ["key", "value", "run_id"])
    op.create_index("ix_metrics_run_id_name_at_step", "metrics", ["run_id", "name", "at", "step"])


def _fill_from_bodies() -> None:
    """Times of runs, and the parameters and tags that people gave them."""
    connection = op.get_bind()
    runs = sa.table("runs", sa.column("id"), sa.column("body", sa.Text), sa.column("started_at"), sa.column("ended_at"))
    set_times = runs.update().where(runs.c.id == sa.bindparam("run"))
    set_times = set_times.values(started_at=sa.bindparam("started"), ended_at=sa.bindparam("ended"))
    last = ""
    while rows := connection.execute(
        sa.select(runs.c.id, sa.cast(runs.c.body, sa.Text)).where(runs.c.id > last).order_by(runs.c.id).limit(500)
    ).fetchall():
        last = rows[-1][0]
        bodies = {id: json.loads(body) for id, body in rows}
        times = [{"run": id, "started": it.get("started_at"), "ended": it.get("ended_at")} for id, it in bodies.items()]
        connection.execute(set_times, times)
        _insert_texts("run_params", {id: it.get("facts", {}).get("params", {}) for id, it in bodies.items()})
        _insert_texts("run_tags", {id: _given_tags(it.get("tags", {})) for id, it in bodies.items()})


def _given_tags(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key not in OWN_TAGS}


def _insert_texts(name: str, texts: dict[str, dict[str, Any]]) -> None:
    table = sa.table(name, sa.column("run_id"), sa.column("key"), sa.column("value"))
    rows = [
        {"run_id": id, "key": key, "value": str(value).replace("\0", "")}
        for id, given in texts.items()
        if isinstance(given, dict)
        for key, value in given.items()
        if len(key) <= 250 and "\0" not in key
    ]
    if rows:
        op.get_bind().execute(table.insert(), rows)


def downgrade() -> None:
    """Remove them."""
    op.drop_index("ix_metrics_run_id_name_at_step", "metrics")
    for names in RUN_INDEXES:
        op.drop_index(f"ix_runs_{'_'.join(names)}", "runs")
    with op.batch_alter_table("runs") as batch:
        for name in RUN_COLUMNS:
            batch.drop_column(name.rstrip("~"))
    for table in (*VALUES, *NEW_RECORDS):
        op.drop_table(table)
