"""A worker's end of the line: sends in batches, beats, and notices the driver's end or wish."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from millrace.compute.link import Channel
from millrace.core.ports import HeartbeatFrame, MetricsFrame, OutputFrame, ProgressFrame, Work, WorkResult
from millrace.core.types import Artifact, MetricPoint

HEARTBEAT_S = 0.5
FLUSH_S = 0.2
FLUSH_POINTS = 500
PROGRESS_S = 0.1
LAST_MOMENTS_S = 0.4  # between the driver's end and this worker's


class WorkerLink:
    """What a step says to its driver. Thread-safe; frames arrive in the order in which they were said.

    Args:
        channel: The worker's end.
        work: The work, for the run's id.
    """

    def __init__(self, channel: Channel, work: Work) -> None:
        self._channel, self._work = channel, work
        self._lock = threading.Lock()
        self._points: list[MetricPoint] = []
        self._oldest_at = 0.0
        self._progress: ProgressFrame | None = None
        self._progress_at = -1.0
        self._cancelled = threading.Event()
        self._outputs: dict[str, Artifact] = {}
        self.environment: Artifact | None = None  # what the step runs with, once it is stored

    @property
    def cancelled(self) -> bool:
        """True once the driver wants the work to end, or is gone."""
        return self._cancelled.is_set()

    @property
    def outputs(self) -> dict[str, Artifact]:
        """What was stored so far, by name."""
        return dict(self._outputs)

    def start(self) -> None:
        """Begin to beat and to listen, in two threads."""
        threading.Thread(target=self._beat, name="millrace heartbeat", daemon=True).start()
        threading.Thread(target=self._listen, name="millrace driver watch", daemon=True).start()

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """Record one point; sent after 0.2 s, or with 499 others."""
        point = MetricPoint(self._work.run_id, name, step, float(value), time.time())
        with self._lock:
            if not self._points:
                self._oldest_at = time.monotonic()
            self._points.append(point)
            if len(self._points) >= FLUSH_POINTS:
                self._flush_points()

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far the step is: at most ten times a second, the newest wins."""
        frame = ProgressFrame(done=float(done), total=float(total), text=text)
        with self._lock:
            self._progress = frame
            if time.monotonic() - self._progress_at >= PROGRESS_S:
                self._flush()

    def output(self, name: str, artifact: Artifact) -> None:
        """Tell of a stored output."""
        with self._lock:
            self._outputs[name] = artifact
            self._flush()
            self._channel.send(OutputFrame(name=name, artifact=artifact))

    def finish(self, result: WorkResult) -> bool:
        """Send what is held back, then the result; False when the driver is gone."""
        with self._lock:
            self._flush()
            return self._channel.send(result)

    def cancel(self, *_: object) -> None:
        """The driver wants the work to end. Also the handler of SIGTERM: takes no lock."""
        self._cancelled.set()

    def _flush(self) -> None:
        self._flush_points()
        if self._progress is not None:
            self._channel.send(self._progress)
            self._progress, self._progress_at = None, time.monotonic()

    def _flush_points(self) -> None:
        if self._points:
            self._channel.send(MetricsFrame(points=self._points))
            self._points = []

    def _beat(self) -> None:
        beat_at = -HEARTBEAT_S
        while True:
            time.sleep(PROGRESS_S / 2)  # first, so that the work starts without competition
            now = time.monotonic()
            if now - beat_at >= HEARTBEAT_S:
                self._channel.send(HeartbeatFrame(at=time.time(), rss_bytes=resident_bytes()))
                beat_at = now
            with self._lock:
                if now - self._oldest_at >= FLUSH_S:
                    self._flush_points()
                if self._progress is not None and now - self._progress_at >= PROGRESS_S:
                    self._flush()

    def _listen(self) -> None:
        while self._channel.receive() is not None:
            self._cancelled.set()  # the one message that comes after the order
        self._cancelled.set()
        time.sleep(LAST_MOMENTS_S)
        end_session()


def end_session() -> None:
    """SIGKILL this worker and everything that it has started: it leads its own process group."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def resident_bytes() -> int:
    """Memory of this process in RAM now.

    Example:
        >>> resident_bytes() > 1_000_000
        True
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory that this process has had in RAM.

    Example:
        >>> peak_bytes() > 1_000_000
        True
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
