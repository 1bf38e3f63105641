"""Serving: a data plane over HTTP and gRPC, and the probe that exercises it inside a run."""

from millrace.core.ports import StageDescriptor

SERVE = StageDescriptor(
    name="serve",
    implementation="millrace.serve.probe:probe",
    version="2",
    sections=("serve",),
    inputs=("data.dataset", "register.bundle", "register.signature", "compress.measurements"),
    outputs=("telemetry",),
    distributions=("onnxruntime", "uvloop", "httptools"),
    timed=True,
)
