"""A model's runtime, loaded: a graph, a user's code, or an ensemble."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from millrace.core.errors import InputError, MillraceError
from millrace.core.ports import Runtime
from millrace.formats.bundle import BASE
from millrace.formats.signature import Signature
from millrace.serve.child import ServedModel
from millrace.serve.dataplane import DataPlane
from millrace.serve.ensembles import Part, open_ensemble
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.runtimes.python import PythonRuntime
from millrace.serve.runtimes.worker import Order
from millrace.serve.server import ServerConfig, build_plane


class Opened(NamedTuple):
    """A loaded runtime and what it says of itself."""

    runtime: Runtime
    signature: Signature
    reference: dict[str, Any] | None = None
    max_batch: int | None = None  # rows of one call at most


def open_model(model: ServedModel) -> Opened:
    """Load a model and let it prove itself.

    Raises:
        MillraceError: It cannot be loaded.
    """
    if model.source == "ensemble":
        return _open_ensemble(model)
    if model.source == "code":
        runtime = PythonRuntime(
            model.name, Order(path=model.path, attribute=model.attribute, threads=model.threads or 1)
        )  # fmt: skip
        runtime.load()
        return Opened(runtime, runtime.signature, max_batch=runtime.declared.max_batch)
    graph = OnnxRuntime(Path(model.path), model.variant, threads=model.threads, expected_digest=model.digest)
    graph.load()
    return Opened(graph, graph.bundle.signature, graph.bundle.reference or None)


def _open_ensemble(model: ServedModel) -> Opened:
    parts: dict[str, Part] = {}
    try:
        for name, part in model.parts.items():
            opened = open_model(msgspec.structs.replace(part, name=f"{model.name}.{part.name}"))  # for its log
            parts[name] = Part(opened.runtime, opened.signature, opened.max_batch or part.max_batch)
        runtime = open_ensemble(model.document, parts)
    except BaseException:
        for part in parts.values():
            part.runtime.unload()
        raise
    return Opened(runtime, runtime.signature)


def open_plane(model: ServedModel, server: ServerConfig, loop: asyncio.AbstractEventLoop) -> DataPlane:
    """The data plane of a model, loaded, self-tested and calibrated: ready for its first request. From any thread.

    Args:
        model: What to load.
        server: What is the same for all models of the process.
        loop: Where requests are answered.

    Raises:
        MillraceError: It cannot be loaded, or does not answer its example.
    """
    opened = open_model(model)
    try:
        return build_plane(config_of(model, server, opened), opened.runtime, opened.signature, loop)
    except MillraceError as error:
        opened.runtime.unload()
        if model.source == "bundle" or opened.runtime.sample():  # type: ignore[attr-defined]
            raise
        text = f"{model.name}: it fails on a row of zeros: {error.message}"
        raise InputError(text, hint="say an `example` of its inputs, to try it with") from error
    except BaseException:
        opened.runtime.unload()
        raise


def config_of(model: ServedModel, server: ServerConfig, opened: Opened) -> ServerConfig:
    """A process's configuration with what is a model's own."""
    return msgspec.structs.replace(
        server, name=model.name, version=model.version, variant=model.variant,
        max_batch=min(model.max_batch, opened.max_batch or model.max_batch), queue=model.queue,
        reference=model.reference if model.reference is not None else opened.reference,
    )  # fmt: skip


def size_on_disk(model: ServedModel) -> int:
    """Bytes of the files that a model is loaded from."""
    path = Path(model.path)
    if model.source == "ensemble":
        return sum(size_on_disk(part) for part in model.parts.values())
    if model.source == "bundle":
        graph = path / "model.onnx" if model.variant == BASE else path / "variants" / f"{model.variant}.onnx"
        return graph.stat().st_size if graph.is_file() else 0
    weights = path / "model.safetensors"
    return weights.stat().st_size if weights.is_file() else 0
