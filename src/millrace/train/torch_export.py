"""From a PyTorch module to an ONNX graph: the classic exporter first, the newer one when that fails."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import onnx
import torch
from torch import nn

from millrace.core.errors import StageError
from millrace.train.graphs import OPSET

DYNAMO_OPSET = 18  # the smallest that it writes
INPUT = "features"
OUTPUT = "output"
_EXAMPLE_ROWS = 2  # 1 would be specialised
_FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, ImportError, KeyError)


def _classic(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    stream = io.BytesIO()
    torch.onnx.export(
        module,
        (example,),
        stream,  # pyright: ignore[reportArgumentType] - the classic exporter writes to streams
        dynamo=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: {0: "rows"}, OUTPUT: {0: "rows"}},
        opset_version=OPSET,
    )
    return onnx.load_from_string(stream.getvalue())


def _dynamo(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        external_data=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("rows")},),
        opset_version=DYNAMO_OPSET,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("the exporter returned nothing")
    return program.model_proto


EXPORTERS: dict[str, Callable[[nn.Module, torch.Tensor], onnx.ModelProto]] = {"classic": _classic, "dynamo": _dynamo}


def core_graph(
    module: nn.Module, shape: list[int], is_good: Callable[[onnx.ModelProto], bool] | None = None
) -> tuple[onnx.ModelProto, str]:
    """The module's graph and which exporter made it.

    Args:
        module: On the CPU.
        shape: Of one row of features.
        is_good: Whether a graph answers as the module does; a graph that does not gives way to the
            next exporter's. Where none is good the first is returned: how it differs says most.

    Raises:
        StageError: No exporter can do it; the cause of each is named.
    """
    module.eval()
    example = torch.zeros(_EXAMPLE_ROWS, *shape)
    causes: list[str] = []
    made: tuple[onnx.ModelProto, str] | None = None
    for name, exporter in EXPORTERS.items():
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", DeprecationWarning)  # classic is called legacy; it is wanted here
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", UserWarning)
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage] - what was traced is verified on real rows
                graph = exporter(module, example)
        except _FAILURES as error:
            causes.append(f"{name}: {str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__}")
            continue
        if is_good is None or is_good(graph):
            return graph, name
        made = made or (graph, name)
    if made is not None:
        return made
    raise StageError(
        f"the model cannot be exported to ONNX ({'; '.join(causes)})",
        hint="use operations that ONNX has; see docs/how-to/own-model.md",
    )
