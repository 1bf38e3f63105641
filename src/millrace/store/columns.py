"""Column types that mean the same on SQLite and on Postgres. Frozen: migrations use them too."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Float, Integer, LargeBinary, Text

# Ordered by code points everywhere, as Python and SQLite order; a database's own collation does not.
TEXT = Text().with_variant(Text(collation="C"), "postgresql")
INTEGER = Integer().with_variant(BigInteger(), "postgresql")  # SQLite's has 64 bits
REAL = Float()  # 64 bits; no NaN: SQLite makes NULL of it
BYTES = LargeBinary()
JSON_TEXT = JSON()  # `json`, never `jsonb`: the text is kept byte for byte, with its order of keys
