"""What a data plane has counted, told to the parent."""

from __future__ import annotations

from millrace.serve.dataplane import DataPlane
from millrace.serve.telemetry import TelemetryFrame, TelemetryWriter, difference


class TelemetryPump:
    """Sends what is new to the parent.

    Args:
        plane: Whose counters and histograms.
        writer: Where to; several pumps may share it.
    """

    def __init__(self, plane: DataPlane, writer: TelemetryWriter) -> None:
        self._plane = plane
        self._writer = writer
        self._sent: dict[str, float] = {}
        self._was_busy = False

    def send(self) -> bool:
        """Send a frame if something is new; False when nobody reads any more."""
        try:
            self._writer.advance()
            if self._writer.has_room:
                self._send_new()
        except BrokenPipeError:
            return False
        return not self._writer.is_orphaned

    def _send_new(self) -> None:
        counters = self._plane.metrics.counters()
        waiting, busy = len(self._plane.batcher), self._plane.admission.waiting
        if counters == self._sent and not busy and not self._was_busy:
            return
        taken = self._plane.collector.take() if self._plane.collector is not None else None
        rows = taken.rows if taken is not None else 0
        frame = TelemetryFrame(
            endpoint=self._plane.info.name,
            version=self._plane.info.version,
            rows=rows,
            histograms=taken.to_dict() if taken is not None and rows else None,
            counters=difference(counters, self._sent),
            latencies=self._plane.metrics.take_bins(),
            waiting=min(waiting, busy),
            running=max(0, busy - waiting),
            row_s=self._plane.admission.seconds_per_row,
        )
        self._sent, self._was_busy = counters, busy > 0
        self._writer.send(frame)

    def finish(self) -> None:
        """Send the last frame and wait until it is out."""
        if self._writer.flush() and self.send():
            self._writer.flush()
