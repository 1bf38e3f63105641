"""Smaller and faster variants of a model, each under a statistical guarantee of what it loses."""

from millrace.core.ports import StageDescriptor

COMPRESS = StageDescriptor(
    name="compress",
    implementation="millrace.compress.stage:compress",
    version="1",
    sections=("compress", "evaluate.metrics", "serve.threads"),
    inputs=("data.dataset", "export.onnx"),
    outputs=("variants", "measurements"),
    distributions=("onnxruntime", "onnx"),
    extras=(("onnx", "data"), ("scipy", "data")),
    timed=True,
)
