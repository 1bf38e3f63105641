"""Texts of others where a terminal or a log shows them: no character of theirs steers it, or pretends to be a line."""

from __future__ import annotations

import logging
from types import TracebackType

_STEERING = {
    **{code: 0x2400 + code for code in range(0x20)},  # their pictures, as wide as a letter
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}
_IN_TEXT = {code: seen for code, seen in _STEERING.items() if chr(code) not in "\n\t"}


def visible(text: str, *, is_line: bool = False) -> str:
    """A text with control characters, and those that turn the direction of writing, as what can be seen.

    Args:
        text: From anybody.
        is_line: Line feeds and tabs are shown too.

    Example:
        >>> visible("a\\x1b[2Jb\\n"), visible("a\\nINFO b", is_line=True)
        ('a␛[2Jb\\n', 'a␊INFO b')
    """
    return text.translate(_STEERING if is_line else _IN_TEXT)


class LineFormatter(logging.Formatter):
    """One record, one line; a traceback's lines are indented, so that none looks like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line."""
        record.message = visible(record.message, is_line=True)
        return super().formatMessage(record)

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """The traceback."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {visible(line, is_line=True)}" for line in lines)
