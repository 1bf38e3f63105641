"""From a dataset version to a verified ONNX model with its scores: `train`, `export`, `evaluate`."""

from millrace.core.ports import StageDescriptor

TRAIN = StageDescriptor(
    name="train",
    implementation="millrace.train.stage:train",
    version="1",
    sections=("train", "evaluate.metrics"),  # the deciding metric picks the best epoch and the candidate
    inputs=("data.dataset",),
    outputs=("model",),
    distributions=("torch", "scikit-learn", "lightgbm", "skl2onnx", "onnxmltools"),
    uses_code=True,
)

EXPORT = StageDescriptor(
    name="export",
    implementation="millrace.train.export:export",
    version="1",
    sections=("train",),
    inputs=("data.dataset", "train.model"),
    outputs=("onnx",),
    distributions=("torch", "onnx", "onnxruntime"),
    extras=(("onnx", "data"),),
    uses_code=True,
)

EVALUATE = StageDescriptor(
    name="evaluate",
    implementation="millrace.train.evaluate:evaluate",
    version="1",
    sections=("evaluate",),
    inputs=("data.dataset", "export.onnx"),
    outputs=("predictions",),
    distributions=("onnxruntime",),
)
