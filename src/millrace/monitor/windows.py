"""Telemetry arrives in small pieces; windows of enough rows leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.core.clock import Clock
from millrace.stats.histogram import Histograms, Layout, layout_from_reference


class WindowBuilder:
    """Merges pieces into windows of at least `rows` rows, or of what came within `max_age_s`.

    Args:
        reference: The bundle's profile: what is counted.
        rows: Rows of a full window.
        max_age_s: An older window is closed although it is not full.
        min_rows: With fewer rows nothing is judged.
        clock: The time.
    """

    def __init__(
        self, reference: Mapping[str, Any], rows: int, clock: Clock, max_age_s: float = 60.0, min_rows: int = 50
    ) -> None:
        self._layout: Layout = layout_from_reference(reference)
        self._rows, self._max_age_s, self._min_rows, self._clock = rows, max_age_s, min_rows, clock
        self._open: Histograms | None = None
        self._since = 0.0

    def add(self, piece: Mapping[str, Any]) -> Histograms | None:
        """Add a piece (`Histograms.to_dict()`); a window that is full now.

        Raises:
            ValueError: The piece counts other features than the reference.
        """
        histograms = Histograms.from_dict(piece)
        if self._open is None:
            self._open = Histograms(self._layout)
            self._since = self._clock.monotonic()
        self._open.merge(histograms)
        return self._close() if self._open.rows >= self._rows else None

    def tick(self) -> Histograms | None:
        """A window that has grown too old, if it has rows enough."""
        if self._open is None or self._clock.monotonic() - self._since < self._max_age_s:
            return None
        return self._close() if self._open.rows >= self._min_rows else None

    def _close(self) -> Histograms | None:
        window, self._open = self._open, None
        return window
