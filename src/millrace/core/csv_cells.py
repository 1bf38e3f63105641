"""Cells of CSV files that a spreadsheet does not run."""

from __future__ import annotations

_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def safe_cell(value: object) -> str:
    """A value as the text of a cell; one that a spreadsheet would take for a formula begins with an apostrophe.

    Example:
        >>> safe_cell("=1+1"), safe_cell(-2), safe_cell(None), safe_cell("a=b")
        ("'=1+1", '-2', '', 'a=b')
    """
    if value is None:
        return ""
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(_STARTS) else text
