"""From windows of telemetry to alerts."""

from millrace.core.ports import StageDescriptor

MONITOR = StageDescriptor(
    name="monitor",
    implementation="millrace.monitor.stage:monitor",
    version="2",
    sections=("monitor",),
    inputs=("register.bundle", "serve.telemetry"),
    stays_home=True,
)
