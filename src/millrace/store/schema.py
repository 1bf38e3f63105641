"""The tables, in SQLAlchemy Core: the one definition that new homes are created from.

The hot path does not go through SQLAlchemy (0.2 s of imports, 10 times the time of a prepared
statement); `tests/store/test_migrations.py` proves that migrations lead to exactly these tables.
"""

from __future__ import annotations

from sqlalchemy import Column, Index, MetaData, Table, text

from millrace.store import layout
from millrace.store.columns import BYTES, INTEGER, JSON_TEXT, REAL, TEXT

METADATA = MetaData()
_TYPES = {"text": TEXT, "integer": INTEGER, "real": REAL}


def _record_table(kind: str) -> Table:
    """The table of one kind of record, from its layout."""
    described = layout.TABLES[kind]
    columns = [
        Column(one.name, _TYPES[one.type], primary_key=one.name == "id", nullable=one.nullable)
        for one in (*layout.SHARED, *described.columns)
    ]
    indexes = [Index(f"ix_{described.name}_{'_'.join(names)}", *names) for names in described.indexes]
    return Table(described.name, METADATA, *columns, Column("body", JSON_TEXT, nullable=False), *indexes)


RECORD_TABLES = {kind: _record_table(kind) for kind in layout.TABLES}


def _of_sealed(name: str, *columns: str) -> Index:
    sealed = text("seq IS NOT NULL")
    return Index(name, *columns, sqlite_where=sealed, postgresql_where=sealed)


EVENTS = Table(
    "events",
    METADATA,
    Column("id", INTEGER, primary_key=True),
    Column("seq", INTEGER, unique=True),  # NULL: not yet sealed
    Column("at", REAL, nullable=False),
    Column("actor", TEXT, nullable=False),
    Column("verb", TEXT, nullable=False),
    Column("subject", TEXT, nullable=False),
    Column("commitment", TEXT, nullable=False),
    Column("chain", TEXT),
    # For readers and searches; filled by the sealer, many at once, so that no write waits for them.
    _of_sealed("ix_events_subject_seq", "subject", "seq"),
    _of_sealed("ix_events_at_id", "at", "id"),
    _of_sealed("ix_events_actor_at_id", "actor", "at", "id"),
    _of_sealed("ix_events_verb_at_id", "verb", "at", "id"),
    Index("ix_events_unsealed", "id", sqlite_where=text("seq IS NULL"), postgresql_where=text("seq IS NULL")),
    sqlite_autoincrement=True,  # an id is never used twice, so order of id is order of commit
)

EVENT_DETAILS = Table(  # apart, so that a detail can be erased and the chain still verifies
    "event_details",
    METADATA,
    Column("event_id", INTEGER, primary_key=True, autoincrement=False),
    Column("salt", BYTES, nullable=False),
    Column("detail", JSON_TEXT, nullable=False),
)

METRICS = Table(
    "metrics",
    METADATA,
    Column("id", INTEGER, primary_key=True),
    Column("run_id", TEXT, nullable=False),
    Column("name", TEXT, nullable=False),
    Column("step", INTEGER, nullable=False),
    Column("value", REAL),  # NULL is NaN: SQLite has none
    Column("at", REAL, nullable=False),
    Index("ix_metrics_run_id", "run_id", "id"),  # in the order of arrival; SQLite has the id in every index
    Index("ix_metrics_run_id_name_at_step", "run_id", "name", "at", "step"),  # a curve
)


def _texts_of_runs(name: str) -> Table:
    """Parameters or tags; SQLite keeps the rows in the primary key itself, so those of a run lie together."""
    return Table(
        name,
        METADATA,
        Column("run_id", TEXT, primary_key=True, nullable=False),
        Column("key", TEXT, primary_key=True, nullable=False),
        Column("value", TEXT, nullable=False),
        sqlite_with_rowid=False,
    )


RUN_PARAMS = _texts_of_runs("run_params")
RUN_TAGS = _texts_of_runs("run_tags")

LATEST_METRICS = Table(  # of each metric of each run the point with the greatest (step, at, value)
    "latest_metrics",
    METADATA,
    Column("run_id", TEXT, primary_key=True, nullable=False),
    Column("key", TEXT, primary_key=True, nullable=False),
    Column("value", REAL),  # NULL is NaN
    Column("step", INTEGER, nullable=False),
    Column("at", REAL, nullable=False),
    Index("ix_latest_metrics_key_value_run_id", "key", "value", "run_id"),  # runs in the order of a metric
    sqlite_with_rowid=False,
)

META = Table(
    "meta",
    METADATA,
    Column("key", TEXT, primary_key=True, nullable=False),
    Column("value", TEXT, nullable=False),
)
