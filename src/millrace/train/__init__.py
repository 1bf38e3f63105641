"""From a dataset version to a verified ONNX model."""
