"""The child process: `python -m millrace.serve.child --config FILE` serves a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec

from millrace.core import extras
from millrace.core.errors import InputError, MillraceError
from millrace.core.ports import Verifier
from millrace.core.types import Struct
from millrace.formats.bundle import BASE
from millrace.serve.explaining import explain
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.server import ServerConfig, run_server

SEVERAL = "millrace.serve.several:serve_models"
GROUP = "millrace.serve.processes:serve_group"


class ServedModel(Struct, frozen=True, kw_only=True):
    """A version of an endpoint. Plain data: it crosses a process border as JSON.

    `source`: a bundle at `path`; code at `path` (`attribute`: the class; without one a folder with weights);
    an ensemble, with the `document` that says how its `parts` are put together. `weight` as of a revision.
    """

    name: str
    version: str = "1"
    source: Literal["bundle", "code", "ensemble"] = "bundle"
    path: str = ""
    attribute: str = ""
    digest: str | None = None
    variant: str = BASE
    threads: int = 0
    max_batch: int = 64
    queue: int = 1024
    reference: dict[str, Any] | None = None
    weight: float = 1.0
    document: dict[str, Any] = {}
    parts: dict[str, ServedModel] = {}


class ChildConfig(Struct, frozen=True, kw_only=True):
    """A bundle and how to serve it; or, in its place, `models`.

    `server.reference` is taken from the bundle when it is absent; `digest` is the tree's digest. Of the models
    those named in `preload` are loaded before the server is ready, as far as the budget goes. With
    `wants_explanation` nothing is served: how the bundle is best called goes to stdout, as JSON. `processes`: so
    many share the port, as of `serve.processes`.
    """

    bundle_dir: str = ""
    digest: str | None = None
    threads: int = 0
    telemetry_fd: int | None = None
    models: list[ServedModel] = []
    preload: list[str] = []
    memory_budget_bytes: int | None = None
    wants_explanation: bool = False
    processes: int = 1
    server: ServerConfig


def serve_bundle(config: ChildConfig, signature: bytes | None = None, verifier: Verifier | None = None) -> int:
    """Verify a bundle, load its variant and serve it until SIGTERM; blocks.

    Args:
        config: See `ChildConfig`.
        signature: The signature document over the bundle's digest.
        verifier: Decides whether a trusted key made it. None: the caller has verified already, and
            only the digests are checked here.

    Returns:
        The exit code of `run_server`.

    Raises:
        CorruptError: A file is not what the bundle's manifest says, or the self-test failed.
        UntrustedError: No trusted key signed it.
        InputError: No such variant, or the host is not loopback.
        UnavailableError: The port is busy.
    """
    runtime = OnnxRuntime(
        Path(config.bundle_dir), config.server.variant, threads=config.threads, signature=signature,
        verifier=verifier, expected_digest=config.digest,
    )  # fmt: skip
    runtime.load()
    server = config.server
    if config.wants_explanation:
        found = explain(
            runtime, runtime.bundle.signature, server.max_batch, server.calibrations, server.slo_p99_ms
        )  # fmt: skip
        print(msgspec.json.encode(found).decode(), flush=True)
        return 0
    if server.reference is None:
        server = msgspec.structs.replace(server, reference=runtime.bundle.reference)
    return run_server(server, runtime, runtime.bundle.signature, config.telemetry_fd)


def report_failure(error: MillraceError) -> None:
    """Tell the parent on stdout, in the place of the ready line."""
    print(json.dumps({"ready": False, "error": error.to_dict()}), flush=True)


def read_config(argument: str) -> ChildConfig:
    """A configuration from a file, or from stdin for `-`.

    Raises:
        InputError: It cannot be read, or is not one.
    """
    try:
        data = sys.stdin.buffer.read() if argument == "-" else Path(argument).read_bytes()
        return msgspec.json.decode(data, type=ChildConfig)
    except (OSError, msgspec.MsgspecError) as error:
        raise InputError(f"the server's configuration {argument} cannot be read: {error}") from error


def main(arguments: list[str]) -> int:
    """The command; 1 on a failure, which is reported on stdout."""
    if len(arguments) != 2 or arguments[0] != "--config":
        print("usage: python -m millrace.serve.child --config FILE (- for stdin)", file=sys.stderr)
        return 2
    try:
        config = read_config(arguments[1])
        if config.processes > 1:
            return extras.load(GROUP)(config)
        return extras.load(SEVERAL)(config) if config.models else serve_bundle(config)
    except MillraceError as error:
        report_failure(error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
