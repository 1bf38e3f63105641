"""Puts the dossier of a model version together, from records, facts and blobs that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from millrace.control.dossier_headings import headings
from millrace.control.planning import flatten, section_value
from millrace.control.report import decode_facts
from millrace.control.services import Services
from millrace.core import dossier as parts
from millrace.core.environment import Environment
from millrace.core.errors import CorruptError, MillraceError, NotFoundError, UntrustedError
from millrace.core.facts import CompressFacts, DataFacts, EvaluateFacts, GateFacts, MonitorFacts, TrainFacts
from millrace.core.ports import Struct
from millrace.core.spec import Spec
from millrace.core.spec_errors import parse_spec
from millrace.core.types import Alert, Alias, Approval, DatasetVersion, Endpoint, Model, ModelVersion, Run, Step
from millrace.formats.bundle import BundleInfo
from millrace.formats.signature import TensorSpec

_BUNDLE_FILE = "bundle.json"
_KINDS = {"code": "code", "file": "data", "package": "package"}  # of key parts, by their first word
_CONSEQUENCES = frozenset({"input", "champion", "model", "stage"})  # of other changes, or of the release


class _Made(Struct, frozen=True, kw_only=True):
    """A version with what is left of the run that made it: after `system gc` there may be nothing."""

    version: ModelVersion
    run: Run | None
    steps: dict[str, Step]
    facts: dict[str, Any]
    spec: Spec | None
    info: BundleInfo | None


def build_dossier(services: Services, version: ModelVersion) -> parts.Dossier:
    """Everything that is recorded of a version.

    Args:
        services: The home, as far as whoever asks may see it.
        version: Of it.
    """
    found = _made(services, version)
    versions = services.records.find(ModelVersion, {"name": version.name})
    earlier = [one for one in versions if one.number < version.number]
    previous = max(earlier, key=lambda one: one.number) if earlier else None
    described = services.records.get(Model, version.name)
    dossier = parts.Dossier(
        written_at=services.clock.now(),
        model=_model(services, found, previous, described),
        data=_data(services, found),
        training=_training(services, found),
        performance=_performance(found),
        guarantee=_guarantee(services, found),
        promotion=_promotion(services, found),
        changes=_changes(services, found, previous),
        monitoring=_monitoring(services, found),
        signature=_signature(services, version),
    )
    tags = {**(described.tags if described else {}), **version.tags}
    return msgspec.structs.replace(dossier, headings=headings(dossier, tags))


def _made(services: Services, version: ModelVersion) -> _Made:
    run = services.records.get(Run, version.run_id) if version.run_id else None
    steps = {step.name: step for step in services.records.find(Step, {"run_id": run.id})} if run else {}
    facts, _ = decode_facts({step.stage: step.facts for step in steps.values() if step.facts})
    return _Made(
        version=version, run=run, steps=steps, facts=facts, spec=_spec(run), info=_bundle_info(services, version)
    )


def _spec(run: Run | None) -> Spec | None:
    if run is None or not run.spec_text:
        return None
    try:
        return parse_spec(run.spec_text, Path(run.spec_path).name, run.overrides)
    except MillraceError:  # written for another release
        return None


def _bundle_info(services: Services, version: ModelVersion) -> BundleInfo | None:
    """What the bundle says of itself; None of an opaque one, and of one whose files are gone."""
    if version.format != "bundle":
        return None
    try:
        for entry in services.blobs.tree(version.bundle.digest):
            if entry.path == _BUNDLE_FILE:
                return msgspec.json.decode(services.blobs.read(entry.digest), type=BundleInfo)
    except (NotFoundError, CorruptError, msgspec.MsgspecError):
        return None
    return None


def _facts(found: _Made, stage: str, kind: type[Any]) -> Any:
    return msgspec.convert(found.facts[stage], kind) if stage in found.facts else None


# --------------------------------------------------------------------------- what it is, what it was made of


def _model(
    services: Services, found: _Made, previous: ModelVersion | None, described: Model | None
) -> parts.DossierModel:
    version, signature = found.version, found.info.signature if found.info else None
    aliases = services.records.find(Alias, {"model": version.name})
    return parts.DossierModel(
        name=version.name, version=version.number, project=version.project, created_at=version.created_at,
        created_by=version.created_by or (found.run.created_by if found.run else ""), source=version.source,
        format=version.format, digest=version.bundle.digest, size_bytes=_size(services, version),
        variant=version.chosen_variant,
        aliases=sorted(one.name for one in aliases if one.number == version.number),
        previous=previous.number if previous else None,
        description=version.description or (described.description if described else ""),
        task=signature.task if signature else "", label=signature.label if signature else "",
        classes=signature.classes if signature else [],
        inputs=[_tensor(one) for one in signature.inputs] if signature else [],
        outputs=[_tensor(one) for one in signature.outputs] if signature else [],
    )  # fmt: skip


def _size(services: Services, version: ModelVersion) -> int:
    """The bytes of its files; of the listing alone when that is gone."""
    try:
        return sum(entry.size_bytes for entry in services.blobs.tree(version.bundle.digest))
    except (NotFoundError, CorruptError):
        return version.bundle.size_bytes


def _tensor(tensor: TensorSpec) -> str:
    shape = "×".join("rows" if size == -1 else str(size) for size in tensor.shape)
    columns = f": {', '.join(tensor.columns)}" if tensor.columns else ""
    return f"{tensor.name} ({tensor.dtype}, {shape}, {tensor.semantic}){columns}"


def _data(services: Services, found: _Made) -> parts.DossierData | None:
    step = next((one for one in found.steps.values() if one.stage == "data" and "dataset" in one.outputs), None)
    facts: DataFacts | None = _facts(found, "data", DataFacts)
    digest = step.outputs["dataset"].digest if step else (found.info.lineage.get("dataset") if found.info else None)
    known = services.records.find(DatasetVersion, order="-created_at") if digest else []
    same = [one for one in known if one.artifact.digest == digest]
    dataset = next((one for one in same if found.run and one.run_id == found.run.id), same[0] if same else None)
    if facts is None and dataset is not None:
        readable, _ = decode_facts({"data": dataset.facts})
        facts = msgspec.convert(readable["data"], DataFacts) if readable else None
    if facts is None or not isinstance(digest, str):
        return None
    rules = flatten(section_value(found.spec.data), "data") if found.spec and found.spec.data else {}
    return parts.DossierData(
        name=dataset.name if dataset else "", number=dataset.number if dataset else None, digest=digest,
        content_digest=facts.content_digest, files=_parts_of(step, "file"), rules=_set(rules), rows_in=facts.rows_in,
        rows_kept=facts.rows_kept, rejected_by_reason=facts.rejected_by_reason, split=facts.split, task=facts.task,
        label=facts.label, classes=facts.classes, columns=facts.columns, warnings=facts.warnings,
    )  # fmt: skip


def _parts_of(step: Step | None, kind: str) -> dict[str, str]:
    """The key parts of a step that begin with a word, without it."""
    given = step.key_parts if step else {}
    return {name.removeprefix(f"{kind} "): value for name, value in given.items() if name.startswith(f"{kind} ")}


def _set(settings: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if value not in ("null", "{}", "[]")}


def _training(services: Services, found: _Made) -> parts.DossierTraining | None:
    facts: TrainFacts | None = _facts(found, "train", TrainFacts)
    step = next((one for one in found.steps.values() if one.stage == "train"), None)
    if facts is None or step is None or found.run is None:
        return None
    settings = flatten(section_value(found.spec.train), "train") if found.spec else {}
    return parts.DossierTraining(
        run=found.run.id, started_at=found.run.started_at, ended_at=found.run.ended_at,
        created_by=found.run.created_by, framework=facts.framework, model=facts.model, metric=facts.metric,
        best_score=facts.best_score, parameters=facts.parameters, duration_s=facts.duration_s, device=facts.device,
        precision=facts.precision, code=_parts_of(step, "code"), settings=_set(settings),
        spec_text=found.run.spec_text, overrides=found.run.overrides, environment=_environment(services, step),
    )  # fmt: skip


def _environment(services: Services, step: Step | None) -> Environment | None:
    if step is None or step.environment is None or not services.blobs.exists(step.environment.digest):
        return None
    return msgspec.json.decode(services.blobs.read(step.environment.digest), type=Environment)


# --------------------------------------------------------------------------- how well it does


def _performance(found: _Made) -> parts.DossierPerformance | None:
    facts: EvaluateFacts | None = _facts(found, "evaluate", EvaluateFacts)
    if facts is not None:
        return parts.DossierPerformance(
            rows=facts.rows, confidence=facts.confidence, baseline=facts.baseline, metrics=facts.metrics,
            slices=facts.slices, classes=facts.classes, confusion=facts.confusion,
        )  # fmt: skip
    metrics = found.info.metrics if found.info else []
    if not metrics:
        return None
    try:
        values = msgspec.convert(metrics, list[parts.MetricValue])
    except msgspec.ValidationError:
        return None
    return parts.DossierPerformance(rows=0, confidence=None, baseline=None, metrics=values)


def _guarantee(services: Services, found: _Made) -> parts.DossierGuarantee | None:
    facts: CompressFacts | None = _facts(found, "compress", CompressFacts)
    measured = found.version.measurements
    if facts is None and measured is not None:
        try:
            facts = msgspec.json.decode(services.blobs.read(measured.digest), type=CompressFacts)
        except (NotFoundError, CorruptError, msgspec.MsgspecError):
            return None
    if facts is None:
        return None
    return parts.DossierGuarantee(
        chosen=found.version.chosen_variant, why=facts.why, rows=facts.rows, max_drop=facts.max_drop,
        max_changed=facts.max_changed, confidence=facts.confidence, variants=facts.variants,
    )  # fmt: skip


# --------------------------------------------------------------------------- what became of it


def _promotion(services: Services, found: _Made) -> parts.DossierPromotion:
    name, number = found.version.name, found.version.number
    asked = services.records.find(Approval, {"model": name})
    approvals = [
        parts.DossierApproval(
            alias=one.alias,
            state=one.state,
            asked_at=one.created_at,
            asked_by=one.asked_by,
            approved_by=one.approved_by,
            reason=one.reason,
        )
        for one in asked
        if one.number == number
    ]
    moves = [
        parts.DossierMove(
            alias=alias.name,
            at=float(move.get("at") or 0.0),
            from_version=move.get("from"),
            to_version=move["to"],
            reason=str(move.get("reason", "")),
        )
        for alias in services.records.find(Alias, {"model": name})
        for move in alias.history
        if number in (move.get("from"), move.get("to"))
    ]
    return parts.DossierPromotion(gate=_gate(found), approvals=approvals, moves=sorted(moves, key=lambda one: one.at))


def _gate(found: _Made) -> GateFacts | None:
    given = found.facts.get("register", found.version.facts).get("gate")
    try:
        return msgspec.convert(given, GateFacts) if given else None
    except msgspec.ValidationError:  # of an older release
        return None


def _changes(services: Services, found: _Made, previous: ModelVersion | None) -> parts.DossierChanges:
    if previous is None:
        return parts.DossierChanges(note="this is the first version that is kept")
    before = _made(services, previous)
    if not before.steps or not found.steps:
        which = found.version if not found.steps else previous
        note = f"nothing is recorded of how version {which.number} was made"
        return parts.DossierChanges(since=previous.number, note=note)
    old, new = dict(_compared(services, before)), dict(_compared(services, found))
    changes = [
        parts.DossierChange(kind=kind, name=name, before=old.get((kind, name)), after=new.get((kind, name)))
        for kind, name in sorted({*old, *new})
        if old.get((kind, name)) != new.get((kind, name))
    ]
    return parts.DossierChanges(since=previous.number, changes=changes)


def _compared(services: Services, found: _Made) -> Iterator[tuple[tuple[str, str], str]]:
    """What a version was made from and what it scored, by (kind, name)."""
    for step in found.steps.values():
        for part, value in step.key_parts.items():
            word, _, rest = part.partition(" ")
            if word not in _CONSEQUENCES:
                yield (_KINDS.get(word, "setting"), rest or part), value
        if step.stage == "data" and "dataset" in step.outputs:
            yield ("data", "the dataset"), step.outputs["dataset"].digest
        if step.stage == "train":
            environment = _environment(services, step)
            for name, version in (environment.packages if environment else {}).items():
                yield ("package", name), version
    performance = _performance(found)
    for metric in performance.metrics if performance else []:
        yield ("metric", metric.name), f"{metric.value:.6g} ({metric.low:.6g} to {metric.high:.6g})"


def _monitoring(services: Services, found: _Made) -> parts.DossierMonitoring:
    version = found.version
    facts: MonitorFacts | None = _facts(found, "monitor", MonitorFacts)
    served = services.records.find(Endpoint, {"model": version.name})
    alerts = services.records.find(Alert, {"model": version.name, "number": version.number})
    return parts.DossierMonitoring(
        reference_rows=facts.reference_rows if facts else 0, window_rows=facts.window_rows if facts else 0,
        false_alarms=facts.false_alarms if facts else None,
        measured_false_alarms=facts.measured_false_alarms if facts else None,
        windows=facts.windows if facts else [],
        endpoints=[one.name for one in served if one.number == version.number],
        alerts=[
            parts.DossierAlert(
                endpoint=one.endpoint, at=one.created_at, signal=one.signal, score=one.score, threshold=one.threshold,
                state=one.state,
            )
            for one in alerts
        ],
    )  # fmt: skip


def _signature(services: Services, version: ModelVersion) -> parts.DossierSignature | None:
    if version.signature is None:
        return None
    try:
        document = services.blobs.read(version.signature.digest)
        said = msgspec.json.decode(document, type=dict[str, Any])
    except (NotFoundError, CorruptError, msgspec.MsgspecError):
        return None
    note = ""
    try:
        services.signer.verify(version.bundle.digest, document)
    except UntrustedError as error:
        note = error.message
    return parts.DossierSignature(
        digest=version.bundle.digest, algorithm=str(said.get("algorithm", "")), key=str(said.get("key_id", "")),
        is_trusted=not note, note=note,
    )  # fmt: skip
