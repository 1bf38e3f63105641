"""What training reads: a split's tensors as memory-mapped arrays, made once from the Parquet parts."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from millrace.core.errors import CorruptError
from millrace.core.ids import digest_json
from millrace.formats.dataset import DatasetReader, open_dataset

_FORMAT = 1
_WORDS = "words.json"


class Feed(NamedTuple):
    """A split: `arrays` by tensor name and `labels`, read-only; `rows` counts them.

    Numbers and pixels are memory-mapped float32; categories are an object array of str.
    """

    arrays: dict[str, np.ndarray]
    labels: np.ndarray
    rows: int


def open_feed(folder: Path, split: str, cache_dir: Path) -> Feed:
    """A split's tensors, from the cache or written there first.

    Safe for several processes: a cache appears whole, by a rename, under a name made of the
    dataset's content and the format.

    Args:
        folder: A materialised dataset tree.
        split: train, validation or test.
        cache_dir: Where caches are kept; made when absent.

    Raises:
        CorruptError: The dataset is not what its manifest says.

    Example:
        >>> open_feed(Path("/nowhere"), "train", Path("/tmp"))
        Traceback (most recent call last):
        millrace.core.errors.CorruptError: dataset /nowhere has no manifest.json
    """
    reader = open_dataset(folder)
    key = digest_json([_FORMAT, split, msgspec.to_builtins(reader.manifest)]).removeprefix("sha256:")
    place = cache_dir / f"feed-{split}-{key[:32]}"
    if not place.is_dir():
        _write(reader, split, place)
    return _open(reader, place)


def _write(reader: DatasetReader, split: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".feed-", dir=place.parent) as temporary:
        made = Path(temporary) / "feed"
        made.mkdir()
        words: list[str] = []
        for name, values in reader.arrays(split).items():
            if values.dtype == object:
                words = sorted(set(values.flat))
                code = {word: index for index, word in enumerate(words)}
                codes = np.fromiter((code[word] for word in values.flat), dtype=np.int32, count=values.size)
                values = codes.reshape(values.shape)
            np.save(made / f"{name}.npy", values, allow_pickle=False)
        np.save(made / "labels.npy", reader.labels(split), allow_pickle=False)
        (made / _WORDS).write_bytes(msgspec.json.encode(words))
        try:
            os.rename(made, place)
        except OSError:
            if not place.is_dir():  # another process was first: its cache has the same bytes
                raise
            shutil.rmtree(made)


def _open(reader: DatasetReader, place: Path) -> Feed:
    try:
        labels = np.load(place / "labels.npy", mmap_mode="r", allow_pickle=False)
        words = np.array(msgspec.json.decode((place / _WORDS).read_bytes(), type=list[str]), dtype=object)
        arrays = {}
        for spec in reader.signature_inputs():
            stored = np.load(place / f"{spec.name}.npy", mmap_mode="r", allow_pickle=False)
            arrays[spec.name] = words[stored] if spec.dtype == "string" else stored
    except (OSError, ValueError, EOFError, msgspec.MsgspecError) as error:
        raise CorruptError(
            f"training cache {place.name} cannot be read: {error}", hint=f"delete {place} and run again"
        ) from error
    if any(len(values) != len(labels) for values in arrays.values()):
        raise CorruptError(f"training cache {place.name} has tensors of different lengths", hint=f"delete {place}")
    return Feed(arrays, labels, len(labels))
