"""The data step: from the spec's files to an immutable dataset tree, with the facts of what it found."""

from __future__ import annotations

import shutil
from typing import Any

import msgspec
import numpy as np
import polars as pl

from millrace.core.errors import DataError
from millrace.core.ports import Context
from millrace.core.spec import Data, Spec
from millrace.data.assemble import make_facts, write_dataset
from millrace.data.checks import check_classes, check_expectations, count_leaks
from millrace.data.clean import Cleaner
from millrace.data.giveaways import giveaways
from millrace.data.naming import short
from millrace.data.roles import Clean, Label, assign_roles, make_plan, settle_label
from millrace.data.row_hash import mix, row_hash
from millrace.data.rules import match_columns
from millrace.data.sources import FILE, ROW, SPLIT, Table, read_source
from millrace.data.split import NAMES, assign, by_group, by_source, by_time, sizes


def prepare(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Run the data step: read, clean, check, split, write the tree `dataset`.

    The same files and the same spec give the same bytes.

    Args:
        spec: The whole spec; only `data` is used.
        ctx: The step's context; output `dataset` is stored.

    Returns:
        `DataFacts` as plain data.

    Raises:
        DataError: A file cannot be read, the data breaks an expectation, or nothing can be learnt.
    """
    if spec.data is None:
        raise DataError("the spec has no data section: want data.source and data.label")
    ctx.progress(0, 4, "reading")
    table = read_source(spec.data, ctx.project_dir)
    ctx.progress(1, 4, f"cleaning {table.frame.height} rows")
    clean = clean_table(table, spec.data)
    ctx.progress(2, 4, "splitting")
    places, split_warnings = split_table(clean, table, spec.data)
    ctx.progress(3, 4, "writing")
    folder = ctx.scratch / "dataset"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
    manifest, kept = write_dataset(folder, clean, places, table)
    ctx.output("dataset", folder)
    facts = make_facts(table, clean, manifest, kept, split_warnings)
    ctx.progress(4, 4, f"{facts.rows_in} in, {facts.rejected} rejected")
    return msgspec.to_builtins(facts)


def clean_table(table: Table, data: Data) -> Clean:
    """Apply types, rules and expectations; decide roles and the task.

    Raises:
        DataError: See `prepare`.
    """
    plan = make_plan(table, data)
    cleaner = Cleaner(table, data, plan.given)
    cleaner.run(plan.ignored, plan.required)
    counts = cleaner.counts()
    if cleaner.frame.height == 0:
        told = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(
            f"no row of {', '.join(table.files[:3])} is left: {table.frame.height} in, all rejected ({told})",
            details={"file": table.files[0], "rejected": counts},
        )
    frame, label = settle_label(cleaner.frame, data)
    roles, warnings = assign_roles(frame, cleaner.types, plan, data)
    classes = len(label.classes) if label.task == "classification" else None
    broken = check_expectations(data.expect, frame, list(roles), classes, table.frame.height)
    warnings = [*table.warnings, *warnings, *(f"expectation not met: {text}" for text in broken)]
    rejected = cleaner.rejected_frame()
    return Clean(frame, cleaner.types, roles, label, plan, cleaner.fills, rejected, counts, warnings)


def split_table(clean: Clean, table: Table, data: Data) -> tuple[np.ndarray, list[str]]:
    """A place for every kept row, and warnings about it.

    Returns:
        int8 [rows] of 0 train, 1 validation, 2 test.

    Raises:
        DataError: The sizes cannot be met, or a class is missing in training or test.
    """
    frame, split = clean.frame, data.split
    want = sizes(split, frame.height)
    codes = _class_codes(frame, data.label, clean.label)
    hashes, key_warnings = _row_keys(clean, data)
    if split.time is not None:
        places = by_time(_times(frame[split.time], split.time), want)
    elif split.group is not None:
        groups = frame[split.group].rank("dense").to_numpy().astype(np.int64)
        places = by_group(row_hash(frame, [split.group], split.seed), groups, want)
    elif SPLIT in frame.columns and split.test is None:
        places = by_source(frame[SPLIT], hashes, codes, split)
    else:
        places = assign(want, hashes, codes, split.stratify)
    warnings = [*key_warnings, *_split_warnings(clean, table, codes, places), *giveaways(clean, places)]
    return places, warnings


def _split_warnings(clean: Clean, table: Table, codes: np.ndarray, places: np.ndarray) -> list[str]:
    files, rows = clean.frame[FILE], clean.frame[ROW]
    for place, name in enumerate(NAMES):
        if not (places == place).any():
            raise DataError(f"the {name} split has no rows", hint="set data.split, or add rows")
    warnings = []
    if clean.label.task == "classification":
        warnings += check_classes(places, codes, clean.label.classes, lambda row: table.place(files[row], rows[row]))
    leaks = count_leaks(row_hash(clean.frame, clean.features), places)
    if leaks:
        warnings.append(f"{leaks} test or validation rows have the same features as a training row")
    return warnings


def _class_codes(frame: pl.DataFrame, label: str, settled: Label) -> np.ndarray:
    if settled.task == "regression":
        return np.zeros(frame.height, dtype=np.int64)
    order = {name: index for index, name in enumerate(settled.classes)}
    return frame[label].cast(pl.String).replace_strict(order, return_dtype=pl.Int64).to_numpy()


def _row_keys(clean: Clean, data: Data) -> tuple[np.ndarray, list[str]]:
    """By key; else by features, so that equal rows stay together; else by content and occurrence."""
    frame, seed = clean.frame, data.split.seed
    if data.split.key is not None:
        return row_hash(frame, match_columns(data.split.key, clean.columns, "data.split.key"), seed), []
    hashes = row_hash(frame, clean.features, seed)
    if len(np.unique(hashes)) * 2 >= len(hashes):
        return hashes, []
    # Few distinct rows: together they would fall into one split, so the n-th equal row has its own place.
    content = row_hash(frame, clean.columns, seed)
    nth = pl.int_range(pl.len(), dtype=pl.UInt64).over("h")
    occurrence = pl.DataFrame({"h": content}).select(nth).to_series().to_numpy()
    return mix(content + mix(occurrence + np.uint64(1))), []


def _times(values: pl.Series, name: str) -> np.ndarray:
    if values.dtype == pl.String or values.dtype == pl.Boolean:
        raise DataError(
            f"data.split.time wants dates or numbers, {name!r} holds {short(values[0])}",
            hint="add a rule: clean: [{date: {columns: NAME, formats: ['%d.%m.%Y']}}]",
        )
    return values.to_physical().to_numpy()
