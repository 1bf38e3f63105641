"""Runtimes for servers under test: the real data plane around a model that can be slow or broken.

`python runtimes.py CONFIG` serves one: CONFIG is a `ServerConfig` as JSON with the keys of `Fake` beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import msgspec
import numpy as np

from millrace.core.errors import CorruptError, MillraceError
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.child import report_failure
from millrace.serve.server import ServerConfig, run_server

SIGNATURE = Signature(
    task="regression",
    inputs=[TensorSpec(name="x", dtype="float32", shape=[-1, 1], columns=["x"])],
    outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])],
    label="y",
)


class Fake(msgspec.Struct, kw_only=True):
    """`delay_s` per call; `fails_test`: the self-test does not pass."""

    server: ServerConfig
    delay_s: float = 0.0
    fails_test: bool = False


class SlowRuntime:
    """x + 1, after a while."""

    def __init__(self, fake: Fake) -> None:
        self._fake = fake
        self.is_ready = False

    def load(self) -> None:
        if self._fake.fails_test:
            raise CorruptError("self-test failed on the golden rows")
        self.is_ready = True

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self._fake.delay_s)
        return {"value": tensors["x"] + 1}

    def unload(self) -> None:
        self.is_ready = False


if __name__ == "__main__":
    fake = msgspec.json.decode(sys.argv[1], type=Fake)
    try:
        sys.exit(run_server(fake.server, SlowRuntime(fake), SIGNATURE))
    except MillraceError as error:
        report_failure(error)
        sys.exit(1)
