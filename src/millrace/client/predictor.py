"""Answers for rows in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from millrace.formats.bundle import open_bundle
from millrace.formats.rows import decode_answers, encode_rows
from millrace.formats.session import open_session


class Predictor:
    """A verified bundle with an open session."""

    def __init__(self, folder: Path, digest: str, variant: str) -> None:
        self._bundle = open_bundle(folder, signature=None, verifier=None, expected_digest=digest)
        self._session = open_session(self._bundle.model(variant))

    def predict(self, rows: Any) -> list[dict[str, Any]]:
        """Answers in the order of the rows."""
        signature = self._bundle.signature
        return decode_answers(signature, self._session.run(encode_rows(signature, as_instances(rows))))


def as_instances(rows: Any) -> list[Any]:
    """Rows of any kind as a list of instances.

    Example:
        >>> as_instances([{"a": 1}])
        [{'a': 1}]
    """
    if hasattr(rows, "to_dicts"):
        return rows.to_dicts()
    if hasattr(rows, "to_dict"):
        return rows.to_dict("records")
    if hasattr(rows, "tolist"):
        return rows.tolist()
    return list(rows)
