"""The tables, in SQLAlchemy Core: the one definition that new homes are created from.

The hot path does not go through SQLAlchemy (0.2 s of imports, 10 times the time of a prepared
statement); `tests/store/test_migrations.py` proves that migrations lead to exactly these tables.
"""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, Index, Integer, LargeBinary, MetaData, Table, Text, text

from millrace.store import layout

METADATA = MetaData()
_TYPES = {"text": Text, "integer": Integer, "real": Float}


def _record_table(kind: str) -> Table:
    """The table of one kind of record, from its layout."""
    described = layout.TABLES[kind]
    columns = [
        Column(one.name, _TYPES[one.type], primary_key=one.name == "id", nullable=one.nullable)
        for one in (*layout.SHARED, *described.columns)
    ]
    indexes = [Index(f"ix_{described.name}_{'_'.join(names)}", *names) for names in described.indexes]
    return Table(described.name, METADATA, *columns, Column("body", JSON, nullable=False), *indexes)


RECORD_TABLES = {kind: _record_table(kind) for kind in layout.TABLES}

EVENTS = Table(
    "events",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("seq", Integer, unique=True),  # NULL: not yet sealed
    Column("at", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("verb", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("commitment", Text, nullable=False),
    Column("chain", Text),
    Index("ix_events_subject_seq", "subject", "seq"),
    Index("ix_events_unsealed", "id", sqlite_where=text("seq IS NULL"), postgresql_where=text("seq IS NULL")),
    sqlite_autoincrement=True,  # an id is never used twice, so order of id is order of commit
)

EVENT_DETAILS = Table(  # apart, so that a detail can be erased and the chain still verifies
    "event_details",
    METADATA,
    Column("event_id", Integer, primary_key=True, autoincrement=False),
    Column("salt", LargeBinary, nullable=False),
    Column("detail", JSON, nullable=False),
)

METRICS = Table(
    "metrics",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("value", Float),  # NULL is NaN: SQLite has none
    Column("at", Float, nullable=False),
    Index("ix_metrics_run_id", "run_id"),
)

META = Table(
    "meta",
    METADATA,
    Column("key", Text, primary_key=True, nullable=False),
    Column("value", Text, nullable=False),
)
