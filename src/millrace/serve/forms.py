"""Predictions for people: a CSV with a header, or a picture, as a model's tensors; answers as CSV, or sorted."""

from __future__ import annotations

import csv
import email.policy
import io
import re
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from email.parser import BytesParser
from typing import Any, NamedTuple

import numpy as np

from millrace.core import extras
from millrace.core.csv_cells import safe_cell
from millrace.core.errors import InputError
from millrace.formats.rows import encode_rows, read_cell
from millrace.formats.signature import Signature, TensorSpec

CSV, MULTIPART = "text/csv", "multipart/form-data"
PICTURES = {"image/png": "PNG", "image/jpeg": "JPEG"}
MAX_PICTURE_BYTES = 16 << 20
MAX_FORM_BYTES = 17 << 20
_WHITES = (1.0, 16.0, 255.0, 65535.0)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_CELL = 1 << 20
# what Pillow raises for damaged files; RuntimeWarning where warnings are errors: a picture of very many pixels
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeWarning, struct.error, zlib.error)
_PLACE = re.compile(r"instances\[(\d+)\](?:\.(.*?))?: (.*)", re.DOTALL)


class Form(NamedTuple):
    """How rows came and how their answers are wanted. `is_picture`: the most likely label first."""

    is_picture: bool = False
    wants_csv: bool = False


def kind_of(content_type: bytes) -> str:
    """The media type of a Content-Type that is one of ours; empty for any other, which is taken as JSON.

    Example:
        >>> kind_of(b"Text/CSV; charset=utf-8"), kind_of(b"application/x-www-form-urlencoded")
        ('text/csv', '')
    """
    kind = content_type.partition(b";")[0].strip().lower().decode("latin-1")
    return kind if kind in (CSV, MULTIPART) or kind.startswith("image/") else ""


def read_form(
    signature: Signature, kind: str, content_type: bytes, body: bytes, examples: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Form]:
    """A model's tensors from a body that is not JSON.

    Args:
        signature: What the model wants.
        kind: As `kind_of` says.
        content_type: With its parameters.
        body: Not compressed.
        examples: Rows that the model was tested with: they tell the scale of a picture's values.

    Raises:
        InputError: It is not such a body, or not what the model wants; names row and column.
        ExtraMissingError: Pictures need Pillow.
    """
    if kind == MULTIPART:
        kind, body = _file_of(content_type, body)
    if kind == CSV:
        return _encode(signature, read_csv(signature, body)), Form()
    return read_picture(signature, kind, body, examples), Form(is_picture=True)


def _file_of(content_type: bytes, body: bytes) -> tuple[str, bytes]:
    """The one file of a form, with its media type."""
    if len(body) > MAX_FORM_BYTES:
        raise InputError(f"want a form of at most {MAX_FORM_BYTES} bytes, got {len(body)}: send the file as the body")
    message = BytesParser(policy=email.policy.HTTP).parsebytes(b"Content-Type: " + content_type + b"\r\n\r\n" + body)
    parts = [part for part in message.iter_parts() if part.get_filename()] if message.is_multipart() else []
    if len(parts) != 1:
        raise InputError(f"want a form with one file, got {len(parts)} files")
    kind = kind_of(parts[0].get_content_type().encode())
    if kind not in (CSV, *PICTURES):
        raise InputError(
            f"want a file of type {', '.join((CSV, *PICTURES))}, got {parts[0].get_content_type()[:60]!r}"
        )  # fmt: skip
    data = parts[0].get_payload(decode=True)
    return kind, data if isinstance(data, bytes) else b""


# ---------------------------------------------------------------------- CSV


def read_csv(signature: Signature, body: bytes) -> list[dict[str, Any]]:
    """The rows of a CSV whose first line names the columns; those that the model does not read are dropped.

    Raises:
        InputError: It is no such file, or lacks a column.

    Example:
        >>> age = TensorSpec(name="numbers", dtype="float32", shape=[-1, 1], columns=["age"])
        >>> model = Signature(task="regression", inputs=[age], outputs=[], label="y")
        >>> read_csv(model, b"id,age\\r\\n7,31\\r\\n8,NA\\r\\n")
        [{'age': 31.0}, {'age': None}]
    """
    wanted = {column: spec for spec in signature.inputs for column in spec.columns}
    if not wanted:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise InputError(f"the model's inputs ({names}) have no columns: send JSON")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the CSV is not UTF-8: {error}") from None
    csv.field_size_limit(min(sys.maxsize, _MAX_CELL))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, wanted)
        places = [(header.index(column), column, spec) for column, spec in wanted.items()]
        rows = []
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(header):
                raise InputError(f"row {number} has {len(cells)} cells, the header has {len(header)}")
            rows.append({column: read_cell(cells[place], spec) for place, column, spec in places})
    except csv.Error as error:
        raise InputError(f"the CSV cannot be read in line {reader.line_num}: {error}") from None
    if not rows:
        raise InputError("the CSV has a header but no rows")
    return rows


def _check_header(header: Sequence[str], wanted: Mapping[str, TensorSpec]) -> None:
    if not any(header):
        raise InputError("the CSV is empty: want a first line with the names of the columns")
    missing = [column for column in wanted if column not in header]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise InputError(f"the CSV lacks {len(missing)} of {len(wanted)} columns that the model reads: {shown}")
    twice = next((column for column in wanted if header.count(column) > 1), None)
    if twice is not None:
        raise InputError(f"the CSV has the column {twice!r} twice")


def _encode(signature: Signature, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    try:
        return encode_rows(signature, rows)
    except InputError as error:
        found = _PLACE.fullmatch(error.message)
        if found is None:
            raise
        place = f"row {int(found[1]) + 1}" + (f", column {found[2]!r}" if found[2] else "")
        raise InputError(f"{place}: {found[3]}", hint=error.hint) from None


# ---------------------------------------------------------------------- pictures


def picture_of(signature: Signature) -> TensorSpec | None:
    """The tensor that a picture becomes: the model's only input, where it is an image."""
    only = signature.inputs[0] if len(signature.inputs) == 1 else None
    is_image = only is not None and only.semantic == "image" and only.dtype != "string" and bool(only.image)
    return only if is_image else None


def read_picture(
    signature: Signature, kind: str, body: bytes, examples: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A PNG or JPEG of the model's size as one row of its pixels, scaled as those it was tested with.

    Its size is read from its head: nothing larger than the model wants is ever decoded.

    Raises:
        InputError: No picture, of another size, or the model reads none.
        ExtraMissingError: Pillow is not installed.
    """
    spec = picture_of(signature)
    if spec is None or spec.image is None:
        raise InputError(f"the model reads {', '.join(repr(one.name) for one in signature.inputs)}: want no picture")
    if kind not in PICTURES:
        raise InputError(f"want a picture as {' or '.join(PICTURES)}, got {kind[:60]!r}")
    if len(body) > MAX_PICTURE_BYTES:
        raise InputError(f"want a picture of at most {MAX_PICTURE_BYTES} bytes, got {len(body)}")
    extras.require([("PIL", "data")], "reading a picture")
    height, width, channels = [*spec.image, 1][:3]
    if channels not in _MODES:
        raise InputError(f"the model reads images of {channels} channels: want its values as JSON, no picture")
    values = _pixels(kind, body, (width, height), _MODES[channels])
    white = white_of(examples.get(spec.name))
    return {spec.name: (values.reshape(1, -1) * (white / 255.0)).astype(spec.array_dtype).reshape([1, *spec.shape[1:]])}


def _pixels(kind: str, body: bytes, size: tuple[int, int], mode: str) -> np.ndarray:
    open_image, bomb = extras.load("PIL.Image:open"), extras.load("PIL.Image:DecompressionBombError")
    try:
        with open_image(io.BytesIO(body), formats=[PICTURES[kind]]) as image:
            if image.size == size:
                return np.asarray(image.convert(mode), dtype=np.float64)
            got = image.size
    except (bomb, *_BROKEN) as error:
        raise InputError(f"the body is no {PICTURES[kind]} that can be read: {str(error)[:120]}") from None
    raise InputError(f"want a picture of {size[0]} x {size[1]} pixels, got {got[0]} x {got[1]}: resize it first")


def white_of(examples: np.ndarray | None) -> float:
    """The value of a white pixel, from rows that the model was tested with: 1, 16, 255 or 65535.

    Raises:
        InputError: Their values are no brightness: some are negative.

    Example:
        >>> white_of(np.array([[0, 14.0]])), white_of(np.array([[0, 0.5]])), white_of(None)
        (16.0, 1.0, 255.0)
    """
    if examples is None or not examples.size:
        return 255.0
    if float(examples.min()) < 0:
        raise InputError("the model's pixels are not plain brightness (some are negative): send its values as JSON")
    return next((white for white in _WHITES if float(examples.max()) <= white), _WHITES[-1])


# ---------------------------------------------------------------------- answers


def likely_first(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer with its probabilities from the highest to the lowest.

    Example:
        >>> likely_first({"label": "b", "probabilities": {"a": 0.1, "b": 0.9}})
        {'label': 'b', 'probabilities': {'b': 0.9, 'a': 0.1}}
    """
    shares = answer.get("probabilities")
    if not shares:
        return dict(answer)
    return {**answer, "probabilities": dict(sorted(shares.items(), key=lambda one: -(one[1] or 0.0)))}


def write_csv(answers: Sequence[Mapping[str, Any]]) -> str:
    """Answers as CSV: `label` and a column per class, or `value`.

    Example:
        >>> write_csv([{"label": "b", "probabilities": {"a": 0.1, "b": 0.9}}])
        'label,probability_a,probability_b\\r\\nb,0.1,0.9\\r\\n'
    """
    out = io.StringIO()
    writer = csv.writer(out)
    first = answers[0]
    classes = list(first.get("probabilities", {}))
    names = [name for name in first if name != "probabilities"]
    writer.writerow([safe_cell(name) for name in (*names, *(f"probability_{one}" for one in classes))])
    for answer in answers:
        shares = answer.get("probabilities", {})
        writer.writerow([safe_cell(value) for value in (*(answer[name] for name in names), *shares.values())])
    return out.getvalue()


def wants_csv(accept: bytes) -> bool:
    """Whether an Accept header asks for CSV before JSON.

    Example:
        >>> wants_csv(b"text/csv"), wants_csv(b"application/json, text/csv;q=0.5"), wants_csv(b"*/*")
        (True, False, False)
    """
    kinds = [one.partition(b";")[0].strip().lower() for one in accept.split(b",")]
    if b"text/csv" not in kinds:
        return False
    return b"application/json" not in kinds or kinds.index(b"text/csv") < kinds.index(b"application/json")
