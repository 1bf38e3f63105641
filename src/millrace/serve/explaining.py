"""`millrace serve MODEL --explain`: measures a model as a server would while nobody asks, and says what came out."""

from __future__ import annotations

from pathlib import Path

import msgspec

from millrace.core.types import Struct
from millrace.formats.signature import Signature
from millrace.serve.calibrate import calibrate
from millrace.serve.dataplane import CheckedInfer, sample_of
from millrace.serve.layouts import Layout, cores, layouts_of
from millrace.serve.racing import Calibration, Race
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.trials import Trial
from millrace.serve.tuning import Calibrations, processor, rows_of


class Explanation(Struct, frozen=True, kw_only=True):
    """How a model is called on this machine. `rows`: of a call at most, within the objective where there is one."""

    processor: str
    cores: int
    is_inline: bool
    rows: int
    slo_p99_ms: float | None = None
    calibration: Calibration


def explain(
    runtime: OnnxRuntime, signature: Signature, max_batch: int, folder: str = "", slo_p99_ms: float | None = None
) -> Explanation:
    """The stored calibration of a loaded runtime, or one that is measured now, and kept.

    Args:
        runtime: Loaded.
        signature: What it reads.
        max_batch: Rows of a call at most.
        folder: Where calibrations are kept; empty keeps nothing.
        slo_p99_ms: 99 of 100 requests are to be answered within that.

    Raises:
        MillraceError: The model failed.
    """
    max_rows = 1 if runtime.mixes_rows else max_batch
    sample = sample_of(signature, runtime.sample())
    kept = Calibrations(Path(folder) if folder else None)
    if runtime.is_fixed:
        cost = calibrate(CheckedInfer(runtime, signature), sample, max_rows)
        layout = Layout(threads=runtime.threads)
        found = Calibration(shallow=layout, deep=layout, shallow_cost=cost, deep_cost=cost, source="fixed")
    else:
        stored = kept.get(runtime, max_rows)
        found = stored if stored is not None else _measure(runtime, signature, max_rows, kept)
    slo_s = None if slo_p99_ms is None else slo_p99_ms / 1e3
    single = found.cost_of(Layout()) or found.shallow_cost
    return Explanation(
        processor=processor(), cores=cores(), is_inline=single.is_inline,
        rows=rows_of(found.deep_cost, max_rows, slo_s), slo_p99_ms=slo_p99_ms, calibration=found,
    )  # fmt: skip


def _measure(runtime: OnnxRuntime, signature: Signature, max_rows: int, kept: Calibrations) -> Calibration:
    sample = sample_of(signature, runtime.sample())
    is_inline = calibrate(CheckedInfer(runtime, signature), sample, 1).is_inline
    race = Race([Layout()] if is_inline else layouts_of(cores()), max_rows)
    Trial(runtime, signature, sample).run(race)
    found = race.result()
    kept.put(runtime, max_rows, found)
    return msgspec.structs.replace(found, source="measured")
