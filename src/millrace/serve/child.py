"""The child process: `python -m millrace.serve.child --config FILE` serves a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from millrace.core.errors import InputError, MillraceError
from millrace.core.ports import Verifier
from millrace.core.types import Struct
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.server import ServerConfig, run_server


class ChildConfig(Struct, frozen=True, kw_only=True):
    """A bundle and how to serve it.

    `server.reference` is taken from the bundle when it is absent; `digest` is the tree's digest.
    """

    bundle_dir: str
    digest: str | None = None
    threads: int = 1
    telemetry_fd: int | None = None
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
        return serve_bundle(read_config(arguments[1]))
    except MillraceError as error:
        report_failure(error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
