"""Answers for a file of rows, one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from millrace.batch.output import disk_faults, open_writer
from millrace.batch.rows import Chunk, read_chunks, whole
from millrace.core.errors import InputError
from millrace.formats.bundle import Bundle
from millrace.formats.rows import decode_answers
from millrace.formats.session import open_session


def predict_file(bundle: Bundle, variant: str, path: Path, threads: int = 1) -> Iterator[dict[str, Any]]:
    """Answers for the rows of a file, in their order, chunk by chunk.

    Args:
        bundle: Verified.
        variant: Which of its graphs.
        path: `.csv`, `.tsv`, `.jsonl` or `.parquet`; columns that the model does not read are dropped.
        threads: Of one call.

    Yields:
        `{"label": …, "probabilities": {…}}` or `{"value": …}` per row.

    Raises:
        InputError: The file cannot be read, lacks a column, or has a bad cell: names file and row.
    """
    for _, outputs in _outputs(bundle, variant, path, threads):
        yield from decode_answers(bundle.signature, outputs)


def write_file(bundle: Bundle, variant: str, path: Path, output: Path, kind: str) -> int:
    """Write the answers for the rows of a file into one file, which is there whole or not at all.

    Args:
        bundle: Verified.
        variant: Which of its graphs.
        path: As for `predict_file`.
        output: Where; what is there is replaced.
        kind: `parquet`, `csv` or `jsonl`.

    Returns:
        How many answers there are.

    Raises:
        InputError: As for `predict_file`.
        DiskFullError: No room for the answers.
    """
    new = output.with_name(f".{output.name}.{os.getpid()}")
    count = 0
    with disk_faults(output):
        try:
            with open_writer(kind, new, bundle.signature, has_numbers=False) as writer:
                for chunk, outputs in _outputs(bundle, variant, path):
                    writer.write(chunk.numbers, outputs)
                    count += len(chunk.numbers)
            os.replace(new, output)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise
    return count


def _outputs(
    bundle: Bundle, variant: str, path: Path, threads: int = 1
) -> Iterator[tuple[Chunk, dict[str, np.ndarray]]]:
    session = open_session(bundle.model(variant), threads=threads)
    is_empty = True
    for chunk in read_chunks(bundle.signature, whole(path)):
        yield chunk, session.run(chunk.tensors)
        is_empty = False
    if is_empty:
        raise InputError(f"{path.name}: has no rows")
