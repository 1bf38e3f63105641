"""The stage that lives in this room: `register` builds the bundle and judges it against the champion."""

from __future__ import annotations

from millrace.core.ports import StageDescriptor

REGISTER = StageDescriptor(
    name="register",
    implementation="millrace.control.registration:register",
    version="2",
    sections=("register", "evaluate"),  # the gate's confidence; the card shows metrics and slices
    inputs=("data.dataset", "export.onnx", "evaluate.predictions", "compress.variants", "compress.measurements"),
    outputs=("bundle", "measurements", "card", "signature"),
    extras=(("scipy", "data"),),
    stays_home=True,
)
