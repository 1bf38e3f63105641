"""Runs a bundle's variant with onnxruntime, after it has proved itself on the golden rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from millrace.core.errors import CapacityError, CorruptError, StageError
from millrace.core.ports import Verifier
from millrace.formats.bundle import BASE, Bundle, open_bundle
from millrace.formats.cpu import has_vnni
from millrace.formats.session import Session, open_session
from millrace.formats.signature import Signature

BASE_TOLERANCE = 1e-3  # between machines; on one machine the bits are equal
CHANGED_SHARE = 0.25  # of the golden rows a variant may answer differently: its guarantee is on many more
_MIXING_OPERATOR = b"DynamicQuantizeLinear"


class OnnxRuntime:
    """A `Runtime` over one variant of a bundle.

    Args:
        folder: The bundle.
        variant: Which of its graphs.
        threads: Threads inside one call; 0: one to begin with, others may be tried.
        signature: The signature document over the bundle's digest.
        verifier: Decides whether a trusted key made it; None: the caller has verified.
        expected_digest: The tree's digest that the caller wants.
    """

    platform = "onnxruntime_onnx"

    def __init__(
        self,
        folder: Path,
        variant: str = BASE,
        threads: int = 0,
        signature: bytes | None = None,
        verifier: Verifier | None = None,
        expected_digest: str | None = None,
    ) -> None:
        self.variant = variant
        self._folder = folder
        self.is_fixed = threads > 0
        self.threads = threads or 1
        self._proof = (signature, verifier, expected_digest)
        self._bundle: Bundle | None = None
        self._session: Session | None = None
        self._mixes_rows = False

    @property
    def bundle(self) -> Bundle:
        """The verified bundle; only after `load`."""
        assert self._bundle is not None, "load() comes first"
        return self._bundle

    @property
    def is_ready(self) -> bool:
        """Loaded, and the golden self-test passed."""
        return self._session is not None

    @property
    def mixes_rows(self) -> bool:
        """Whether the scale of a dynamically quantised call depends on all of its rows."""
        return self._mixes_rows

    def load(self) -> None:
        """Verify, open, self-test.

        Raises:
            CorruptError: A file is not what the manifest says, or the golden answers differ.
            UntrustedError: No trusted key signed the bundle.
            NotFoundError: There is no such variant.
            CapacityError: The variant needs VNNI and this machine has none.
        """
        bundle = open_bundle(self._folder, *self._proof)
        bundle.model_path(self.variant)
        guarantee = bundle.info.guarantees.get(self.variant)
        if isinstance(guarantee, Mapping) and guarantee.get("needs_vnni") and not has_vnni():
            raise CapacityError(
                f"variant {self.variant!r} is certified on machines with VNNI; this one has none, and without it"
                " answers change silently",
                hint=f"serve another variant: {', '.join(name for name in bundle.variants if name != self.variant)}",
            )
        data = bundle.model(self.variant)
        session = open_session(data, threads=self.threads)
        self_test(bundle, session, self.variant)
        self._mixes_rows = _MIXING_OPERATOR in data
        self._bundle, self._session = bundle, session

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            StageError: Not loaded, or the graph failed on these tensors.
        """
        session = self._session
        if session is None:
            raise StageError("the model is not loaded")
        return session.run(tensors)

    def sample(self) -> Mapping[str, np.ndarray]:
        """One golden row, to calibrate with; empty where the bundle has none."""
        golden = self.bundle.golden.inputs
        return {name: values[:1] for name, values in golden.items() if len(values)}

    def examples(self) -> Mapping[str, np.ndarray]:
        """The golden rows."""
        return self.bundle.golden.inputs

    @property
    def layout_key(self) -> str:
        """What a calibration of it is kept by, besides the machine."""
        return f"{self.bundle.digest} {self.variant} onnxruntime {onnxruntime.__version__}"

    @property
    def size_bytes(self) -> int:
        """About what a further session of it takes: its weights, and again as much where they are packed."""
        return 2 * self.bundle.model_path(self.variant).stat().st_size

    def reopened(self, threads: int, is_spinning: bool = False) -> OnnxRuntime:
        """The same model in a session of its own, which has passed the self-test too; to be called after `load`.

        Args:
            threads: Threads inside one call.
            is_spinning: They wait busily between the operators of a call, never between calls.

        Raises:
            CorruptError: With so many threads the golden answers differ.
        """
        other = OnnxRuntime(self._folder, self.variant, threads)
        session = open_session(self.bundle.model(self.variant), threads=threads, spinning=is_spinning)
        self_test(self.bundle, session, self.variant)
        other._bundle, other._session, other._mixes_rows = self._bundle, session, self._mixes_rows
        return other

    def unload(self) -> None:
        """Free the memory; `is_ready` becomes false."""
        self._session = None


def self_test(bundle: Bundle, session: Session, variant: str) -> None:
    """Compare a session's answers on the golden rows with those that were recorded.

    The base must give the same numbers within a tolerance; a variant must give finite ones and mostly
    the same answers.

    Raises:
        CorruptError: It does not.
    """
    golden = bundle.golden
    if not golden.inputs or not len(next(iter(golden.inputs.values()))):
        return  # a model that came without rows
    outputs = session.run(golden.inputs)
    for name, wanted in golden.outputs.items():
        got = outputs.get(name)
        if got is None or got.shape != wanted.shape:
            shape = None if got is None else list(got.shape)
            raise CorruptError(f"self-test of {variant}: output {name!r} has shape {shape}, want {list(wanted.shape)}")
        reason = _difference(bundle.signature, variant, wanted, got)
        if reason:
            raise CorruptError(
                f"self-test of {variant} failed on the golden rows: output {name!r} {reason}",
                hint="the file or this machine's onnxruntime does not compute what was certified: compress again here",
            )


def _difference(signature: Signature, variant: str, wanted: np.ndarray, got: np.ndarray) -> str:
    """What is wrong with an output, or nothing."""
    if wanted.dtype == object:
        return "" if (wanted == got).all() else "differs"
    expected, actual = wanted.astype(np.float64), got.astype(np.float64)
    if not (np.isfinite(actual) | ~np.isfinite(expected)).all():
        return "is not finite"
    if variant == BASE:
        worst = float(np.nanmax(np.abs(actual - expected) / (1.0 + np.abs(expected)), initial=0.0))
        return f"differs by {worst:.2g}, want at most {BASE_TOLERANCE:g}" if worst > BASE_TOLERANCE else ""
    changed = _changed(signature, expected, actual)
    if changed > CHANGED_SHARE * len(expected):
        return f"has {changed} of {len(expected)} other answers than the base"
    return ""


def _changed(signature: Signature, expected: np.ndarray, actual: np.ndarray) -> int:
    if signature.task == "classification" and expected.ndim == 2:
        return int((expected.argmax(axis=1) != actual.argmax(axis=1)).sum())
    spread = float(np.nanstd(expected)) + 1e-9
    return int((np.abs(actual - expected).reshape(len(expected), -1).max(axis=1) > spread).sum())
