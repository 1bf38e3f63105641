"""From windows of telemetry to alerts."""
