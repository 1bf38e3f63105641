"""ONNX files that were made elsewhere: validated before anything runs them, then like our own."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from millrace.compress.foreign import compress_model
from millrace.control.approvals import ask, person
from millrace.control.models import view_of
from millrace.control.moves import move_alias
from millrace.control.numbering import next_number, project_of_model
from millrace.control.readable import check_path
from millrace.control.services import Services
from millrace.control.uploads import local_path
from millrace.core.errors import DataError, InputError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.operations import registry as ops
from millrace.core.refs import Ref
from millrace.core.spec import Compress
from millrace.core.types import ModelVersion
from millrace.core.units import Share
from millrace.data.tables import read_bytes
from millrace.formats.bundle import BundleContents, write_bundle
from millrace.formats.onnx_file import check_model, read_model, what_else
from millrace.formats.session import Session, open_session
from millrace.formats.signature import Signature, TensorSpec
from millrace.stats.drift import build_reference

GOLDEN_ROWS = 16
TRIAL_S = 60.0  # for a few rows, of a graph that may turn in a loop for ever
WHOLE_S = 600.0  # for all of them: some row may be what it turns for ever on
HEAD_BYTES = 512
UNKNOWN_DIMENSION = 1


def check_onnx(path: Path) -> tuple[Session, bytes]:
    """Open a foreign file safely: read once, checked, then opened by onnxruntime. What is kept are these bytes.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is not one valid, self-contained ONNX graph.
        CorruptError: It cannot be loaded.
    """
    data = read_model(path)
    check_model(data, path.name)
    return open_session(data, name=path.name), data


def read_table(path: Path, label: str) -> tuple[pl.DataFrame, pl.Series]:
    """Rows without the label, and the label.

    Raises:
        NotFoundError: There is no such file.
        DataError: It cannot be read, is packed in a way that is not unpacked here, or has no such column.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", hint="check the path")
    table = _read_rows(path)
    if label not in table.columns:
        raise DataError(f"{path.name} has no column {label!r}", hint="columns: " + ", ".join(table.columns[:12]))
    table = table.drop_nulls(label)
    return table.drop(label), table[label]


def _read_rows(path: Path) -> pl.DataFrame:
    """The whole table. Polars would unpack whatever is packed, to any size: only `.gz` is, up to a bound."""
    source = io.BytesIO(read_bytes(path, path.name)) if path.suffix == ".gz" else path
    with path.open("rb") if isinstance(source, Path) else io.BytesIO(source.getvalue()[:HEAD_BYTES]) as file:
        other = what_else(file.read(HEAD_BYTES))
    if other is not None:
        raise DataError(f"{path.name} is {other}; want a table", hint="give a .csv, .csv.gz, .jsonl or .parquet file")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(source)
        if path.suffix in (".jsonl", ".ndjson"):
            return pl.read_ndjson(source)
        return pl.read_csv(source, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read as a table: {str(error).splitlines()[0]}") from None


def tensors_of(session: Session, rows: pl.DataFrame, name: str) -> tuple[dict[str, np.ndarray], list[TensorSpec]]:
    """The model's input tensors from a table: one matrix of all columns, or one input per column.

    Raises:
        DataError: The columns do not fit the inputs.
    """
    if len(session.inputs) == 1 and session.inputs[0].dtype != "string":
        spec = session.inputs[0]
        width = int(np.prod([size for size in spec.shape[1:] if size > 0])) if len(spec.shape) > 1 else 1
        if len(spec.shape) == 2 and spec.shape[1] < 0:
            width = rows.width
        if width != rows.width:
            raise DataError(
                f"{name} has {rows.width} columns besides the label; input {spec.name!r} wants {width}",
                hint="keep exactly the model's columns, in its order, and the label",
            )
        matrix = _matrix(rows, name).astype(spec.dtype)
        shape = [len(matrix), *(size if size > 0 else width for size in spec.shape[1:])]
        return {spec.name: matrix.reshape(shape)}, [_with_columns(spec, rows.columns)]
    missing = [spec.name for spec in session.inputs if spec.name not in rows.columns]
    if missing:
        raise DataError(
            f"{name} has no columns for the inputs {', '.join(missing)}", hint="name columns like the inputs"
        )
    tensors, specs = {}, []
    for spec in session.inputs:
        values = rows[spec.name].to_numpy()
        tensors[spec.name] = values.astype(object if spec.dtype == "string" else spec.dtype).reshape(-1, 1)
        specs.append(_with_columns(spec, [spec.name]))
    return tensors, specs


def _matrix(rows: pl.DataFrame, name: str) -> np.ndarray:
    try:
        return rows.cast(pl.Float32).to_numpy()
    except pl.exceptions.PolarsError:
        text = [column for column in rows.columns if not rows[column].dtype.is_numeric()]
        raise DataError(f"{name}: want numbers, but the columns {', '.join(text[:8])} are not") from None


def _with_columns(spec: TensorSpec, columns: list[str]) -> TensorSpec:
    semantic = "category" if spec.dtype == "string" else "number"
    return msgspec.structs.replace(spec, columns=columns, semantic=semantic)


def _signature(session: Session, inputs: list[TensorSpec], label: str, classes: list[str]) -> Signature:
    scores = next((spec for spec in session.outputs if len(spec.shape) == 2 and spec.shape[1] > 1), None)
    chosen = scores or session.outputs[0]
    is_classes = scores is not None
    if is_classes and len(classes) != chosen.shape[1]:
        classes = [str(index) for index in range(chosen.shape[1])]
    semantic = "probabilities" if is_classes else "value"
    return Signature(
        task="classification" if is_classes else "regression", inputs=inputs,
        outputs=[msgspec.structs.replace(chosen, semantic=semantic)], label=label,
        classes=classes if is_classes else [],
    )  # fmt: skip


def _seeded(session: Session) -> tuple[dict[str, np.ndarray], list[TensorSpec]]:
    """Inputs for the self-test when no rows were given: the same numbers everywhere."""
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for spec in session.inputs:
        shape = [GOLDEN_ROWS, *(size if size > 0 else UNKNOWN_DIMENSION for size in spec.shape[1:])]
        if spec.dtype == "string":
            tensors[spec.name] = np.full(shape, "a", dtype=object)
        else:
            tensors[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
    return tensors, list(session.inputs)


def register_foreign(services: Services, body: ops.RegisterRequest) -> ops.ModelView:
    """A signed version from a foreign file; with labelled rows it gets a reference profile too.

    Raises:
        InputError: Not a valid model, or a name that cannot be one.
    """
    path = local_path(services, body.path)
    session, data = check_onnx(path)
    name = Ref.parse((body.name or path.stem).lower().replace("_", "-"), kind="model").name
    reference: dict[str, Any] = {}
    if body.data is not None:
        if body.label is None:
            raise InputError("--data needs --label: the column with the right answers")
        rows, labels = read_table(local_path(services, body.data), body.label)
        tensors, inputs = tensors_of(session, rows, Path(body.data).name)
        signature = _signature(session, inputs, body.label, sorted({str(value) for value in labels.to_list()}))
    else:
        tensors, inputs = _seeded(session)
        signature = _signature(session, inputs, "label", [])
    golden = {key: value[:GOLDEN_ROWS] for key, value in tensors.items()}
    answers = session.run(golden, limit_s=TRIAL_S)
    if body.data is not None:
        reference = build_reference(tensors, session.run(tensors, limit_s=WHOLE_S), signature)
    services.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=services.home) as folder:
        model = Path(folder) / "model.onnx"
        model.write_bytes(data)
        contents = BundleContents(
            model=model, variants={}, signature=signature, metrics=[], lineage={"file": path.name}, guarantees={},
            reference=reference, golden={"inputs": golden, "outputs": answers},
        )  # fmt: skip
        write_bundle(Path(folder) / "bundle", contents)
        bundle = services.blobs.put_tree(Path(folder) / "bundle")
    signed = services.blobs.put(services.signer.sign(bundle.digest), media_type="application/json")
    with services.records.transaction() as transaction:
        versions = transaction.find(ModelVersion, {"name": name})
        version = next((one for one in versions if one.bundle.digest == bundle.digest), None)
        if version is None:
            number = next_number(transaction, name, services.clock.now(), services.own_project)
            version = ModelVersion(
                id=new_id(), project=project_of_model(transaction, name), created_at=services.clock.now(), name=name,
                bundle=bundle, signature=signed, number=number, source="onnx",
            )  # fmt: skip
            transaction.put(version, expect_version=0)
            now, reason = services.clock.now(), "registered by hand"
            if body.alias and not ask(transaction, version, body.alias, asked_by=person(), reason=reason, now=now):
                move_alias(transaction, name, body.alias, version.number, at=now, reason=reason)
    return view_of(services, version)


def compress_foreign(services: Services, body: ops.CompressRequest) -> ops.CompressResponse:
    """Variants of a foreign file beside it, with their guarantee on the given rows."""
    check_path(body.path)
    path = Path(body.path).absolute()
    session, data = check_onnx(path)
    rows, labels = read_table(Path(body.data), body.label)
    tensors, inputs = tensors_of(session, rows, Path(body.data).name)
    signature = _signature(
        session, inputs, body.label, sorted({str(value) for value in labels.to_list()}, key=_natural)
    )
    if signature.task == "classification":
        expected = np.array(
            [_index(value, signature.classes, body.label) for value in labels.to_list()], dtype=np.int64
        )
    else:
        expected = labels.cast(pl.Float32).to_numpy()
    options = Compress(
        max_drop=Share.parse(body.max_drop) if body.max_drop else None,
        max_changed=Share.parse(body.max_changed) if body.max_changed else Share(0.05),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / path.name
        model.write_bytes(data)
        facts, made = compress_model(model, tensors, expected, options, body.threads)
    target = Path(body.to).absolute() if body.to else path.with_name(f"{path.stem}-variants")
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(made).iterdir()):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    shutil.rmtree(made)
    return ops.CompressResponse(facts=msgspec.to_builtins(facts), folder=str(target))


def _natural(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), value)
    except ValueError:
        return (1, 0.0, value)


def _index(value: Any, classes: list[str], label: str) -> int:
    try:
        return classes.index(str(value))
    except ValueError:
        raise DataError(f"column {label!r} has the value {value!r}, which is none of the model's classes") from None
