"""What a run leaves beside its spec: the report."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from millrace.control.services import Services
from millrace.core import extras
from millrace.core.ids import new_id
from millrace.core.states import STEP_DONE_STATES
from millrace.core.types import Run, Step
from millrace.formats.cpu import cpu_flags

REPORT_NAME = "report.html"
PACKAGES = ("millrace-ai", "torch", "scikit-learn", "lightgbm", "onnx", "onnxruntime", "polars", "numpy")


def write_report(services: Services, run: Run) -> Path | None:
    """Write report.html beside the spec, whole or not at all; None when there is nothing to show."""
    steps = services.records.find(Step, {"run_id": run.id})
    facts = {step.name: step.facts for step in steps if step.facts}
    path = Path(run.spec_path).parent / REPORT_NAME
    if not facts:
        return None
    if path.is_file() and steps and all(step.state == "cached" for step in steps):
        return path
    text = extras.load("millrace.control.report:render_report")(
        facts=facts,
        name=run.name,
        state=run.state,
        error=run.error,
        spec_text=run.spec_text,
        overrides=run.overrides,
        steps={step.name: (step.state, (step.ended_at or 0.0) - (step.started_at or 0.0)) for step in steps},
        digests={
            f"{step.name}.{name}": artifact.digest
            for step in steps
            if step.state in STEP_DONE_STATES
            for name, artifact in step.outputs.items()
        },
        environment=environment(),
    )
    part = path.with_name(f".{REPORT_NAME}.{new_id()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def environment() -> dict[str, str]:
    """What the figures depend on: versions and processor flags."""
    found = {name: extras.version_of(name) for name in PACKAGES}
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "processor flags": " ".join(cpu_flags()),
        **{name: version for name, version in found.items() if version != "absent"},
    }
