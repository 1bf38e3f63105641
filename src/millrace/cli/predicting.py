"""Answers for a file of rows, and writing them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from millrace.cli.lines import flat
from millrace.core.csv_cells import safe_cell
from millrace.core.operations.registry import OpenModelResponse
from millrace.formats.bundle import open_bundle
from millrace.serve.batch import predict_file as answer_file


def predict_file(opened: OpenModelResponse, path: Path, threads: int = 1) -> list[dict[str, Any]]:
    """Answers in the order of the rows, each a dict with `label` and `probabilities`, or `value`."""
    bundle = open_bundle(Path(opened.folder), signature=None, verifier=None, expected_digest=opened.digest)
    return list(answer_file(bundle, opened.variant, path, threads))


def write_csv(answers: list[dict[str, Any]], path: Path) -> None:
    """One line per answer: `label` and a column per class, or `value`."""
    rows = [flat(answer) for answer in answers]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["label"])
        writer.writerow({key: safe_cell(key) for key in writer.fieldnames})
        writer.writerows({key: safe_cell(value) for key, value in row.items()} for row in rows)
