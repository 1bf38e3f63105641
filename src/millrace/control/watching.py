"""What a served model's telemetry means: windows, judged against the reference, become alerts."""

from __future__ import annotations

import time
from typing import Any

from millrace.control.services import Services
from millrace.core.ids import new_id
from millrace.core.operations.live import ServeEvent
from millrace.core.spec import Monitor
from millrace.core.types import Alert, ModelVersion
from millrace.monitor.alerts import DRIFT, decide_alert
from millrace.monitor.signals import window_of
from millrace.monitor.windows import WindowBuilder
from millrace.serve.telemetry import TelemetryFrame
from millrace.stats.histogram import Histograms


class Watch:
    """Watches one endpoint. Not thread-safe.

    Args:
        services: Where alerts are written.
        endpoint: Its name.
        version: What it serves.
        reference: The bundle's profile; an empty one watches nothing.
        monitor: False alarms and window size.
    """

    def __init__(
        self, services: Services, endpoint: str, version: ModelVersion, reference: dict[str, Any], monitor: Monitor
    ) -> None:
        self._services, self._endpoint, self._version = services, endpoint, version
        self._reference, self._monitor = reference, monitor
        self._windows = WindowBuilder(reference, monitor.window_rows, services.clock)
        self._quiet = 0

    def take(self, frame: TelemetryFrame) -> list[ServeEvent]:
        """Add a frame; what its window, if it filled one, says."""
        if frame.histograms is None or not self._reference or not self._monitor.enabled:
            return []
        window = self._windows.add(frame.histograms)
        return [] if window is None else self._judge(window)

    def tick(self) -> list[ServeEvent]:
        """What a window that waited long enough says."""
        window = self._windows.tick()
        return [] if window is None else self._judge(window)

    def _judge(self, window: Histograms) -> list[ServeEvent]:
        at = time.strftime("%H:%M:%S", time.localtime(self._services.clock.now()))
        judged = window_of(at, self._reference, window, float(self._monitor.false_alarms))
        self._quiet = 0 if judged.is_alert else self._quiet + 1
        fresh = Alert(
            id=new_id(), project=self._version.project, created_at=self._services.clock.now(), endpoint=self._endpoint,
            model=self._version.name,
            number=self._version.number, signal=DRIFT, score=0.0, threshold=0.0,
        )  # fmt: skip
        with self._services.records.transaction() as transaction:
            found = transaction.find(Alert, {"endpoint": self._endpoint, "state": "open"})
            old = next((alert for alert in found if alert.signal == DRIFT), None)
            changed = decide_alert(judged, old, fresh, self._quiet)
            if changed is not None:
                transaction.put(changed)
        if changed is None or (old is not None and changed.state == old.state):
            return []
        text = f"{changed.title} ({changed.score:.2f} > {changed.threshold:.2f}, {judged.rows} rows)"
        if changed.state == "resolved":
            text = f"{changed.endpoint}: quiet again"
        return [ServeEvent(kind="alert", text=text, facts={"alert": changed.id, "state": changed.state})]
