"""The bundle: what a model is, everywhere. A folder whose every byte is covered by one signed digest.

`model.onnx`, `variants/*.onnx`, `bundle.json`, `reference.json`, `golden.json`, `manifest.json`. Only functions of
data, spec, code and seed are inside; times, run ids and latencies are not.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from millrace.core.errors import CorruptError, InputError, NotFoundError, UntrustedError
from millrace.core.ids import canonical_json, digest_bytes
from millrace.core.ports import Verifier
from millrace.core.types import TreeEntry
from millrace.formats.plain_file import read_plain
from millrace.formats.signature import Dtype, Signature

FORMAT = 1
BASE = "fp32"
_SUFFIXES = {".onnx", ".json"}
_REQUIRED = ("model.onnx", "bundle.json", "reference.json", "golden.json")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


class BundleContents(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is made of.

    `model` and `variants` are ONNX files; `golden` has `inputs` and `outputs`: arrays by tensor name;
    `reference` is the drift profile of held-out rows; `guarantees` are by variant.
    """

    model: Path
    variants: dict[str, Path]
    signature: Signature
    metrics: list[dict[str, Any]]
    lineage: dict[str, Any]
    guarantees: dict[str, Any]
    reference: dict[str, Any]
    golden: dict[str, dict[str, np.ndarray]]


class BundleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`bundle.json`."""

    format: int
    signature: Signature
    metrics: list[dict[str, Any]] = []
    lineage: dict[str, Any] = {}
    guarantees: dict[str, Any] = {}
    variants: list[str] = []


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out rows and the base's answers, for the self-test."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class _Array(msgspec.Struct, frozen=True, kw_only=True):
    """An array as JSON."""

    dtype: Dtype | Literal["float16", "int16", "uint16", "uint32", "uint64"]
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    values: list[Any]


class _Golden(msgspec.Struct, frozen=True, kw_only=True):
    """`golden.json`."""

    inputs: dict[str, _Array]
    outputs: dict[str, _Array]


class Bundle:
    """An opened bundle: every file has been compared with the manifest.

    Its folder may be changed afterwards: whatever is read of it through here is compared once more.
    """

    def __init__(
        self, folder: Path, info: BundleInfo, digest: str, signed_by: str | None, entries: list[TreeEntry]
    ) -> None:
        self.folder = folder
        self.info = info
        self.digest = digest
        self.signed_by = signed_by
        self._entries = {entry.path: entry for entry in entries}

    @property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return self.info.signature

    @property
    def variants(self) -> list[str]:
        """Names of what can be run: `fp32` first."""
        return [BASE, *self.info.variants]

    def model_path(self, variant: str = BASE) -> Path:
        """The ONNX file of a variant.

        Raises:
            NotFoundError: The bundle has no such variant.
        """
        if variant == BASE:
            return self.folder / "model.onnx"
        if variant not in self.info.variants:
            raise NotFoundError(f"there is no variant {variant!r}", hint=f"variants: {', '.join(self.variants)}")
        return self.folder / "variants" / f"{variant}.onnx"

    def model(self, variant: str = BASE) -> bytes:
        """The ONNX graph of a variant: the bytes that were verified, whatever lies in the folder by now.

        Raises:
            NotFoundError: The bundle has no such variant.
            CorruptError: The file was changed after the bundle was opened.
        """
        return _verified(self.folder, self._entries[self.model_path(variant).relative_to(self.folder).as_posix()])

    @property
    def reference(self) -> dict[str, Any]:
        """The drift profile; empty when the model came without rows."""
        return _decode(self.folder, self._entries["reference.json"], dict[str, Any])

    @property
    def golden(self) -> Golden:
        """Rows and answers of the self-test, with the signature's dtypes."""
        value = _decode(self.folder, self._entries["golden.json"], _Golden)
        return Golden(inputs=_arrays(value.inputs), outputs=_arrays(value.outputs))


def write_bundle(folder: Path, contents: BundleContents) -> str:
    """Write a bundle into a new folder; the same contents give the same bytes.

    Args:
        folder: It must not exist.
        contents: What goes in.

    Returns:
        The digest of the tree.

    Raises:
        InputError: The folder exists, or a variant's name is not a file name.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; a bundle is written into a new folder")
    (folder / "variants").mkdir(parents=True)
    shutil.copyfile(contents.model, folder / "model.onnx")
    for name, path in contents.variants.items():
        if not _is_variant_name(name):
            raise InputError(f"a variant cannot be named {name!r}", hint="use letters, digits, '-' and '_'")
        shutil.copyfile(path, folder / "variants" / f"{name}.onnx")
    info = BundleInfo(
        format=FORMAT,
        signature=contents.signature,
        metrics=contents.metrics,
        lineage=contents.lineage,
        guarantees={name: contents.guarantees[name] for name in contents.guarantees if name in contents.variants},
        variants=sorted(contents.variants),
    )
    (folder / "bundle.json").write_bytes(canonical_json(info))
    (folder / "reference.json").write_bytes(canonical_json(contents.reference))
    golden = {
        part: {name: _plain(array) for name, array in contents.golden[part].items()} for part in ("inputs", "outputs")
    }
    (folder / "golden.json").write_bytes(canonical_json(golden))
    (folder / "manifest.json").write_bytes(canonical_json(_list_files(folder)))
    return tree_digest(folder)


def open_bundle(
    folder: Path, signature: bytes | None = None, verifier: Verifier | None = None, expected_digest: str | None = None
) -> Bundle:
    """Verify every file, then open.

    Args:
        folder: The bundle's folder.
        signature: A signature document over the tree's digest.
        verifier: Decides whose signatures are trusted; without one the signature is not looked at.
        expected_digest: The digest that the tree must have.

    Raises:
        NotFoundError: There is no bundle.
        CorruptError: A file is missing, additional, or has other bytes than the manifest says.
        UntrustedError: It is unsigned, or no trusted key signed it.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise NotFoundError(f"there is no bundle in {folder}", hint="want a folder with manifest.json")
    entries = _list_files(folder)
    by_path = {entry.path: entry for entry in entries}
    if "manifest.json" not in by_path:
        raise CorruptError(f"the manifest of the bundle in {folder} is gone")
    _compare(entries, _decode(folder, by_path["manifest.json"], list[TreeEntry]))
    digest = digest_bytes(canonical_json(entries))
    if expected_digest is not None and digest != expected_digest:
        raise CorruptError(f"the bundle in {folder} has the digest {digest}; want {expected_digest}")
    signed_by = None
    if verifier is not None:
        if signature is None:
            raise UntrustedError(f"the bundle {digest} is not signed")
        signed_by = verifier.verify(digest, signature)
    info = _decode(folder, by_path["bundle.json"], BundleInfo)
    if info.format > FORMAT:
        raise CorruptError(f"the bundle has format {info.format}; this Millrace reads up to {FORMAT}")
    _check_variants(info, {entry.path for entry in entries})
    return Bundle(folder, info, digest, signed_by, entries)


def tree_digest(folder: Path) -> str:
    """The digest of a folder as a tree, the same that a blob store gives its listing."""
    return digest_bytes(canonical_json(_list_files(folder)))


def _list_files(folder: Path) -> list[TreeEntry]:
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CorruptError(f"{path.name} is not a plain file")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            data = _read(folder, name)
            entries.append(TreeEntry(path=name, digest=digest_bytes(data), size_bytes=len(data)))
    return sorted(entries, key=lambda entry: entry.path)


def _compare(entries: list[TreeEntry], wanted: list[TreeEntry]) -> None:
    found = {entry.path: entry for entry in entries if entry.path != "manifest.json"}
    for entry in wanted:
        if Path(entry.path).suffix not in _SUFFIXES or ".." in Path(entry.path).parts or entry.path.startswith("/"):
            raise CorruptError(
                f"the manifest names {entry.path!r}; a bundle holds only .onnx and .json files inside it"
            )
        actual = found.pop(entry.path, None)
        if actual is None:
            raise CorruptError(f"the file {entry.path} of the bundle is missing")
        if actual.digest != entry.digest or actual.size_bytes != entry.size_bytes:
            raise CorruptError(
                f"the file {entry.path} of the bundle has the digest {actual.digest}; want {entry.digest}"
            )
    if found:
        raise CorruptError(f"the file {sorted(found)[0]} is not part of the bundle: its manifest does not name it")
    for name in sorted(set(_REQUIRED) - {entry.path for entry in wanted}):
        raise CorruptError(f"the file {name} of the bundle is missing: its manifest does not name it")


def _is_variant_name(name: str) -> bool:
    return name != BASE and _VARIANT.fullmatch(name) is not None


def _check_variants(info: BundleInfo, paths: set[str]) -> None:
    """A variant's name becomes a path: only one that the manifest covers may be asked for."""
    for name in info.variants:
        if not _is_variant_name(name) or f"variants/{name}.onnx" not in paths:
            raise CorruptError(f"bundle.json names the variant {name!r}; the bundle holds no such file")


def _read(folder: Path, name: str) -> bytes:
    try:
        return read_plain(folder / name, follow=False)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CorruptError(f"the file {name} of the bundle cannot be read: {reason}") from error


def _verified(folder: Path, entry: TreeEntry) -> bytes:
    """A file's bytes, which must be those of its entry: it may have been swapped since it was looked at."""
    data = _read(folder, entry.path)
    if digest_bytes(data) != entry.digest:
        raise CorruptError(f"the file {entry.path} of the bundle was changed after it was verified")
    return data


def _decode(folder: Path, entry: TreeEntry, kind: Any) -> Any:
    try:
        return msgspec.json.decode(_verified(folder, entry), type=kind)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"{entry.path} of the bundle cannot be read: {error}") from error


def _plain(array: np.ndarray) -> dict[str, Any]:
    dtype = "string" if array.dtype.kind in "OUS" else str(array.dtype)
    values = array.tolist()
    return {"dtype": dtype, "shape": list(array.shape), "values": _no_nan(values)}


def _no_nan(value: Any) -> Any:
    """JSON has no NaN and no infinities: they are written as text."""
    if isinstance(value, list):
        return [_no_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _arrays(value: Mapping[str, _Array]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, item in value.items():
        dtype = object if item.dtype == "string" else item.dtype
        try:
            arrays[name] = np.array(item.values, dtype=object).reshape(item.shape).astype(dtype)
        except (ValueError, TypeError) as error:
            raise CorruptError(f"golden.json of the bundle: the tensor {name!r} is not an array: {error}") from error
    return arrays
