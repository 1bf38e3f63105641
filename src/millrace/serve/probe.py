"""The stage `serve`: a real server, real requests over real sockets, and telemetry of two windows."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson

from millrace.core.errors import CancelledError, StageError
from millrace.core.facts import ServeFacts
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.bundle import Bundle, open_bundle
from millrace.formats.dataset import DatasetReader, Manifest, open_dataset
from millrace.formats.rows import decode_answers
from millrace.formats.session import open_session
from millrace.formats.signature import Signature
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.telemetry import TelemetryFrame
from millrace.stats.histogram import Histograms, layout_from_reference

MAX_ROWS = 600
MIN_CLEAN_ROWS = 50
TOLERANCE = 1e-4  # between a server's and the offline probabilities, both decimals of float32
TELEMETRY_WAIT_S = 10.0
Tensors = dict[str, np.ndarray]


def probe(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Serve the bundle's chosen variant for a moment and compare its answers with offline ones.

    The test rows are sent and compared. Then come two windows: validation rows as they are, which the reference
    has not seen, and damaged test rows (images inverted, numbers shifted by one standard deviation). Output
    `telemetry` holds the histograms of both.

    Returns:
        `ServeFacts`.

    Raises:
        StageError: The server did not answer.
    """
    reader = open_dataset(ctx.input("data.dataset"))
    bundle = open_bundle(ctx.input("register.bundle"), signature=None, verifier=None, expected_digest=None)
    variant = chosen_variant(spec, ctx, bundle)
    rows = reader.manifest.rows.get("test", 0)
    picked = sample_rows(rows)
    tensors = {name: values[picked] for name, values in reader.arrays("test").items()}
    windows = Windows(bundle.reference)
    config = ChildConfig(
        bundle_dir=str(bundle.folder),
        digest=bundle.digest,
        threads=spec.serve.threads or 1,
        server=ServerConfig(
            name=spec.register.model or spec.project, version="probe", variant=variant, port=0,
            max_batch=spec.serve.max_batch, queue=spec.serve.queue, telemetry_interval_s=0.05,
        ),
    )  # fmt: skip
    started_s = time.perf_counter()
    server = ServerProcess(config, windows.add)
    try:
        port = server.wait_ready()
        ready_s = time.perf_counter() - started_s
        client = RowClient(port, f"/v1/models/{config.server.name}:predict")
        took_s, answers = send_rows(client, bundle.signature, tensors, ctx, "test")
        windows.close("test", len(picked))
        windows.closed.clear()  # the reference is made of these rows: they could not alarm
        clean = unseen_rows(reader, tensors)
        send_rows(client, bundle.signature, clean, ctx, "clean")
        windows.close("clean", len(next(iter(clean.values()))))
        label, damaged = damage(bundle.signature, reader.manifest, tensors)
        send_rows(client, bundle.signature, damaged, ctx, label)
        windows.close(label, len(picked))
        client.close()
    finally:
        code = server.stop()
    if code != 0:
        raise StageError(f"the server ended with code {code} after the probe", hint="its log is above")
    folder = ctx.scratch / "telemetry"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "telemetry.json").write_bytes(msgspec.json.encode({"windows": windows.closed}))
    ctx.output("telemetry", folder)
    expected = offline_answers(bundle, variant, tensors, spec.serve.threads or 1)
    return msgspec.to_builtins(
        ServeFacts(
            requests=len(picked),
            answered=sum(answer is not None for answer in answers),
            wrong=sum(
                answer is not None and not agrees(answer, want) for answer, want in zip(answers, expected, strict=True)
            ),
            p50_s=float(np.quantile(took_s, 0.5)),
            p99_s=float(np.quantile(took_s, 0.99)),
            requests_per_s=len(took_s) / float(np.sum(took_s)),
            variant=variant,
            ready_s=ready_s,
        )
    )


def unseen_rows(reader: DatasetReader, test: Tensors) -> Tensors:
    """Rows that are neither trained on nor in the reference; the test rows where there are too few."""
    picked = sample_rows(reader.manifest.rows.get("validation", 0))
    if len(picked) < MIN_CLEAN_ROWS:
        return test
    return {name: values[picked] for name, values in reader.arrays("validation").items()}


def sample_rows(rows: int) -> np.ndarray:
    """At most MAX_ROWS row numbers, drawn with a fixed seed: the first rows of a sorted file are no fair sample.

    Example:
        >>> sample_rows(3).tolist(), len(sample_rows(10_000))
        ([0, 1, 2], 600)
    """
    drawn = np.random.default_rng(0).permutation(rows)[:MAX_ROWS]
    return np.sort(drawn)


def chosen_variant(spec: Spec, ctx: Context, bundle: Bundle) -> str:
    """The variant to serve: the spec's, else the measured choice, else the base."""
    wanted = spec.serve.variant
    if wanted == "chosen":
        path = ctx.input("compress.measurements") if ctx.has_input("compress.measurements") else None
        wanted = _read_chosen(path) if path is not None else "fp32"
        return wanted if wanted in bundle.variants else "fp32"
    bundle.model_path(wanted)  # names the variants there are
    return wanted


def _read_chosen(folder: Path) -> str:
    path = folder / "measurements.json" if folder.is_dir() else folder
    return str(msgspec.json.decode(path.read_bytes()).get("chosen", "fp32"))


class Windows:
    """Adds up telemetry frames until a window's rows are complete.

    Args:
        reference: The bundle's profile.
    """

    def __init__(self, reference: dict[str, Any]) -> None:
        self._layout = layout_from_reference(reference)
        self._sum = Histograms(self._layout)
        self.closed: list[dict[str, Any]] = []

    def add(self, frame: TelemetryFrame) -> None:
        """From the telemetry thread."""
        if frame.histograms is not None:
            self._sum.merge(Histograms.from_dict(frame.histograms))

    def close(self, label: str, rows: int) -> None:
        """Wait for the rows of a window and keep it.

        Raises:
            StageError: They did not arrive.
        """
        deadline_s = time.monotonic() + TELEMETRY_WAIT_S
        while self._sum.rows < rows:
            if time.monotonic() > deadline_s:
                raise StageError(f"the server reported {self._sum.rows} of {rows} rows of the window {label!r}")
            time.sleep(0.005)
        full, self._sum = self._sum, Histograms(self._layout)
        self.closed.append({"label": label, "rows": full.rows, "histograms": full.to_dict()})


class RowClient:
    """A keep-alive HTTP client for one row per request, lean enough to time the server and not itself.

    Args:
        port: On loopback.
        path: Where to post.
    """

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n".encode()

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of one answer.

        Raises:
            StageError: The server closed the connection.
        """
        self._socket.sendall(b"%sContent-Length: %d\r\n\r\n%s" % (self._head, len(body), body))
        data = self._receive()
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        wanted = int(length.partition(b":")[2])
        while len(rest) < wanted:
            rest += self._receive()
        return int(head[9:12]), rest

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise StageError("the server closed the connection before its answer was complete")
        return data

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def send_rows(
    client: RowClient, signature: Signature, tensors: Tensors, ctx: Context, label: str
) -> tuple[list[float], list[dict[str, Any] | None]]:
    """Send rows one per request; seconds and answers in their order (None: refused)."""
    bodies = [orjson.dumps({"instances": [instance]}) for instance in as_instances(signature, tensors)]
    took_s: list[float] = []
    answers: list[dict[str, Any] | None] = []
    for index, body in enumerate(bodies):
        start = time.perf_counter()
        status, answer = client.post(body)
        took_s.append(time.perf_counter() - start)
        answers.append(orjson.loads(answer)["predictions"][0] if status == 200 else None)
        if index % 50 == 0:
            ctx.progress(index, len(bodies), f"{label} rows")
            if ctx.cancelled:
                raise CancelledError("the probe was cancelled")
    return took_s, answers


def as_instances(signature: Signature, tensors: Tensors) -> list[dict[str, Any]]:
    """Rows as a client sends them: an image as its tensor, a table by column, null where missing.

    Example:
        >>> from millrace.formats.signature import TensorSpec
        >>> spec = TensorSpec(name="numbers", dtype="float32", shape=[-1, 2], columns=["a", "b"])
        >>> model = Signature(task="regression", inputs=[spec], outputs=[], label="y")
        >>> as_instances(model, {"numbers": np.array([[1.0, np.nan]], dtype=np.float32)})
        [{'a': 1.0, 'b': None}]
    """
    rows = len(next(iter(tensors.values())))
    instances: list[dict[str, Any]] = [{} for _ in range(rows)]
    for spec in signature.inputs:
        values = tensors[spec.name].tolist()
        for instance, row in zip(instances, values, strict=True):
            if spec.semantic == "image" or not spec.columns:
                instance[spec.name] = row
            else:
                instance.update(zip(spec.columns, [_or_null(value) for value in row], strict=True))
    return instances


def _or_null(value: Any) -> Any:
    return None if value == "" or value != value else value


def damage(signature: Signature, manifest: Manifest, tensors: Tensors) -> tuple[str, Tensors]:
    """The second window: images inverted between their least and largest value, numbers one sd up.

    Args:
        signature: Which tensors are images.
        manifest: Standard deviations of the training rows.
        tensors: Rows.

    Returns:
        The window's label and its rows.
    """
    deviations = {column.name: column.sd or 0.0 for column in manifest.columns}
    damaged: Tensors = {}
    label = "shifted"
    for spec in signature.inputs:
        values = tensors[spec.name]
        if spec.semantic == "image":
            label = "inverted"
            damaged[spec.name] = values.max() + values.min() - values
        elif spec.dtype == "float32":
            own = np.nanstd(values, axis=0)
            shift = [deviations.get(name) or float(own[k]) for k, name in enumerate(spec.columns)]
            damaged[spec.name] = values + np.array(shift, dtype=np.float32)
        else:
            damaged[spec.name] = values
    return label, damaged


def offline_answers(bundle: Bundle, variant: str, tensors: Tensors, threads: int) -> list[dict[str, Any]]:
    """What the file itself answers, row by row as they were sent (a quantised call may depend on its rows)."""
    session = open_session(bundle.model(variant), threads=threads)
    rows = len(next(iter(tensors.values())))
    answers: list[dict[str, Any]] = []
    for row in range(rows):
        outputs = session.run({name: values[row : row + 1] for name, values in tensors.items()})
        answers += decode_answers(bundle.signature, outputs)
    return answers


def agrees(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a served answer is the offline one.

    Example:
        >>> agrees({"value": 1.0}, {"value": 1.00001}), agrees({"value": 1.0}, {"value": 1.1})
        (True, False)
    """
    if "value" in expected:
        return abs(answer["value"] - expected["value"]) <= TOLERANCE * (1.0 + abs(expected["value"]))
    shares = expected["probabilities"]
    close = all(abs(answer["probabilities"][name] - share) <= TOLERANCE for name, share in shares.items())
    return close and answer["label"] == expected["label"]
