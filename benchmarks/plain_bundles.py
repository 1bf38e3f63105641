"""A graph in a bundle without a reference: no telemetry is counted for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from millrace.formats.bundle import BundleContents, write_bundle
from millrace.formats.session import open_session
from millrace.formats.signature import Signature


def saved(graph: onnx.GraphProto, path: Path) -> Path:
    """The graph as a file that every onnxruntime of ours reads."""
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def plain_bundle(folder: Path, model: Path, signature: Signature, tensors: dict[str, np.ndarray]) -> Path:
    """A bundle whose golden rows are these; it becomes the folder."""
    golden = {"inputs": tensors, "outputs": open_session(model).run(tensors)}
    contents = BundleContents(
        model=model, variants={}, signature=signature, metrics=[], lineage={}, guarantees={}, reference={},
        golden=golden,
    )  # fmt: skip
    write_bundle(folder, contents)
    return folder
