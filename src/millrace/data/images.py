"""Image sources (.npz arrays, IDX pairs, image folders) as frames with one column of raw pixel bytes."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError

from millrace.core.errors import DataError
from millrace.core.spec import Data
from millrace.data.source_files import labels_path
from millrace.data.tables import most_unpacked, read_bytes

PIXELS = "pixels"
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_NPZ_PAIRS = (("", "x", "y"), ("", "images", "labels"), ("", "X", "y"), ("", "data", "target"))
_NPZ_SPLIT_PAIRS = (
    ("train", "train_images", "train_labels"),
    ("validation", "val_images", "val_labels"),
    ("test", "test_images", "test_labels"),
    ("train", "x_train", "y_train"),
    ("validation", "x_val", "y_val"),
    ("test", "x_test", "y_test"),
)
_BROKEN_NPZ = (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, NotImplementedError)
_MAX_SIDE = 64
_MAX_COLUMNS = 10_000


class Arrays(NamedTuple):
    """Rows of one part of a source: `values` [N, …], `labels` [N] and the split it was given, if any."""

    values: np.ndarray
    labels: np.ndarray
    split: str


class ImageRows(NamedTuple):
    """A frame and, for images, the shape [H, W] or [H, W, C] of every row's pixels and their dtype."""

    frame: pl.DataFrame
    shape: list[int] | None
    dtype: str | None


def read_idx_array(path: Path, name: str) -> np.ndarray:
    """One IDX file, `.gz` too.

    Raises:
        DataError: It is not an IDX file, or shorter or longer than its header says.

    Example:
        >>> read_idx_array(Path("/dev/null"), "null")
        Traceback (most recent call last):
        millrace.core.errors.DataError: null is not an IDX file: it has 0 bytes
    """
    raw = read_bytes(path, name)
    if len(raw) < 8 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{name} is not an IDX file: it has {len(raw)} bytes", details={"file": name})
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    dtype = np.dtype(_IDX_DTYPES[raw[2]])
    want = math.prod(shape) * dtype.itemsize
    if len(raw) - 4 - 4 * raw[3] != want:
        raise DataError(
            f"{name} is cut off or has too much: its header {list(shape)} wants {want} bytes, "
            f"got {len(raw) - 4 - 4 * raw[3]}",
            details={"file": name},
        )
    return np.frombuffer(raw, dtype=dtype, offset=4 + 4 * raw[3]).reshape(shape)


def read_idx(files: list[Path], names: list[str], data: Data) -> list[Arrays]:
    """Pairs of images and labels; `train-…` and `t10k-…` or `test-…` names give the split.

    Raises:
        DataError: A pair is incomplete or its counts differ.
    """
    by_path = dict(zip(files, names, strict=True))
    parts = []
    for path in files:
        if "images" not in path.name:
            continue
        labels = labels_path(path)
        values, answers = read_idx_array(path, by_path[path]), read_idx_array(labels, by_path.get(labels, labels.name))
        _check_counts(values, answers, by_path[path])
        parts.append(Arrays(values, answers, _split_of(path.name)))
    if not parts:
        raise DataError(
            f"{names[0]} is an IDX labels file: want the images file", hint="name the …-images-idx3-ubyte file"
        )
    return parts


def _split_of(text: str) -> str:
    lowered = text.lower()
    if lowered.startswith("train"):
        return "train"
    return "test" if lowered.startswith(("t10k", "test")) else "validation" if lowered.startswith("val") else ""


def _check_counts(values: np.ndarray, labels: np.ndarray, name: str) -> None:
    if values.ndim < 2 or len(values) != labels.size:
        raise DataError(
            f"{name} has values {list(values.shape)} and labels {list(labels.shape)}: want as many labels as rows",
            details={"file": name},
        )
    if len(values) == 0:
        raise DataError(f"{name} has no rows", details={"file": name})


def read_npz(path: Path, name: str) -> list[Arrays]:
    """Arrays x and y, or MedMNIST's train_images, train_labels and so on. Pickled arrays are refused.

    Raises:
        DataError: It is not an .npz file, holds other arrays, needs pickle, or is a bomb.

    Example:
        >>> read_npz(Path("/dev/null"), "null.npz")
        Traceback (most recent call last):
        millrace.core.errors.DataError: null.npz is not an .npz file
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > most_unpacked(path.stat().st_size):
            raise DataError(f"{name} unpacks to {size} bytes", hint="unpack it yourself if you trust it")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (*_BROKEN_NPZ, zlib.error, MemoryError, OverflowError) as error:
        raise DataError(f"{name} is not an .npz file", hint=str(error)[:160], details={"file": name}) from error
    pairs = [pair for pair in _NPZ_SPLIT_PAIRS if pair[1] in arrays and pair[2] in arrays]
    pairs = pairs or [pair for pair in _NPZ_PAIRS if pair[1] in arrays and pair[2] in arrays][:1]
    if not pairs:
        raise DataError(
            f"{name} holds {', '.join(sorted(arrays)) or 'no arrays'}: want x and y, or train_images and train_labels",
            details={"file": name},
        )
    parts = [Arrays(arrays[x], arrays[y], split) for split, x, y in pairs]
    for values, labels, _ in parts:
        _check_counts(values, labels, name)
    return parts


def read_folders(files: list[Path], names: list[str], data: Data) -> list[Arrays]:
    """Images whose folder is their label: `<label>/x.png`, or `train/<label>/x.png` with the split given.

    Raises:
        DataError: A file is not an image, or has no folder to be its label.
    """
    shape = list(data.image.shape) if data.image else _folder_shape(files[0], names[0])
    pixels, labels, splits = [], [], []
    for path, name in zip(files, names, strict=True):
        pixels.append(_decode(path, name, shape))
        labels.append(path.parent.name)
        splits.append(_split_of(path.parent.parent.name) if path.parent.parent.name in _SPLIT_FOLDERS else "")
    if len(set(splits)) > 1 and "" in splits:
        splits = [""] * len(splits)
    values, answers = np.stack(pixels), np.array(labels)
    order = np.array(splits)
    return [Arrays(values[order == split], answers[order == split], split) for split in dict.fromkeys(splits)]


_SPLIT_FOLDERS = ("train", "training", "val", "validation", "test", "testing")


def _open_image(path: Path, name: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not an image that can be read: {error}", details={"file": name}) from error


def _folder_shape(path: Path, name: str) -> list[int]:
    image = _open_image(path, name)
    height, width = min(image.height, _MAX_SIDE), min(image.width, _MAX_SIDE)
    return [height, width] if image.mode in ("1", "L", "I", "I;16", "F", "LA") else [height, width, 3]


def _decode(path: Path, name: str, shape: list[int]) -> np.ndarray:
    image = _open_image(path, name).convert("RGB" if len(shape) == 3 and shape[2] == 3 else "L")
    if image.size != (shape[1], shape[0]):
        image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(shape)


def image_rows(parts: list[Arrays], name: str, data: Data, split_column: str) -> ImageRows:
    """Arrays of parts, stacked, as a frame: images as bytes in `pixels`, tables as x0, x1, …

    Raises:
        DataError: Shapes differ between parts, or are not the ones the spec wants.
    """
    if len({part.values.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(list(part.values.shape)) for part in parts)
        raise DataError(f"{name} has parts of different shapes: {shapes}", details={"file": name})
    values = np.concatenate([part.values for part in parts])
    labels = np.concatenate([part.labels.reshape(-1) for part in parts])
    splits = [part.split for part in parts for _ in range(len(part.labels))]
    frame = pl.DataFrame([_label_series(data.label, labels, name)])
    if any(splits):
        frame = frame.with_columns(pl.Series(split_column, splits))
    if values.ndim == 2 and data.image is None:
        return ImageRows(_number_columns(values, name).hstack(frame), None, None)
    return _pixel_column(values, frame, name, data)


def _label_series(label: str, labels: np.ndarray, name: str) -> pl.Series:
    if labels.dtype.kind in "iu":
        return pl.Series(label, labels.astype(np.int64))
    if labels.dtype.kind == "f":
        return pl.Series(label, labels.astype(np.float64))
    if labels.dtype.kind == "b":
        return pl.Series(label, labels)
    if labels.dtype.kind == "U":
        return pl.Series(label, labels.tolist(), dtype=pl.String)
    raise DataError(f"{name} has labels of type {labels.dtype}: want numbers or text", details={"file": name})


def _number_columns(values: np.ndarray, name: str) -> pl.DataFrame:
    if values.dtype.kind not in "iufb" or values.shape[1] > _MAX_COLUMNS:
        raise DataError(
            f"{name} has x of type {values.dtype} with {values.shape[1]} columns: want at most {_MAX_COLUMNS} numbers",
            details={"file": name},
        )
    kind = np.int64 if values.dtype.kind in "iub" else np.float64
    return pl.DataFrame({f"x{index}": values[:, index].astype(kind) for index in range(values.shape[1])})


def _pixel_column(values: np.ndarray, frame: pl.DataFrame, name: str, data: Data) -> ImageRows:
    if values.dtype.kind not in "iufb" or values.ndim > 4:
        raise DataError(
            f"{name} has images {list(values.shape)} of {values.dtype}: want [N, H, W] or [N, H, W, C] numbers"
        )
    shape = list(data.image.shape) if data.image else list(values.shape[1:])
    size = math.prod(values.shape[1:])
    if math.prod(shape) != size:
        raise DataError(
            f"{name} has images of {list(values.shape[1:])} = {size} values: data.image.shape wants {shape}",
            details={"file": name},
        )
    dtype = np.dtype("uint8") if values.dtype.kind in "ub" and values.dtype.itemsize == 1 else np.dtype("<f4")
    flat = np.ascontiguousarray(values.reshape(len(values), size).astype(dtype))
    if not np.isfinite(flat).all():
        row = int(np.flatnonzero(~np.isfinite(flat).all(axis=1))[0]) + 1
        raise DataError(f"{name} row {row} has a pixel that is not a finite number", details={"file": name, "row": row})
    pixels = pl.Series(PIXELS, [row.tobytes() for row in flat], dtype=pl.Binary)
    return ImageRows(pl.DataFrame([pixels]).hstack(frame), shape, dtype.name)
