"""Cells of CSV files that a spreadsheet does not run."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[-+][0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def safe_cell(value: object) -> str:
    """A value as the text of a cell; one that a spreadsheet would take for a formula begins with an apostrophe.

    Example:
        >>> safe_cell("=1+1"), safe_cell(-2), safe_cell("-2.5"), safe_cell(None), safe_cell("a=b")
        ("'=1+1", '-2', '-2.5', '', 'a=b')
    """
    if value is None:
        return ""
    text = str(value)
    is_formula = isinstance(value, str) and text.startswith(_STARTS) and not _NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text
