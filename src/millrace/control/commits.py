"""What control adds around a stage: inputs that only records know, and records that its outputs become.

A stage only returns artifacts and facts; here they become dataset versions, model versions and endpoints,
in the same transaction as the step's success.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from millrace.control.approvals import ask
from millrace.control.moves import move_alias
from millrace.control.numbering import next_number, project_of_model
from millrace.control.services import Services
from millrace.core.errors import ConflictError, UntrustedError
from millrace.core.facts import RegisterFacts
from millrace.core.ids import new_id
from millrace.core.ports import Transaction
from millrace.core.spec import Spec
from millrace.core.types import Alias, Artifact, DatasetVersion, Endpoint, ModelVersion, Run, Step, Struct


class Preparation(Struct, frozen=True, kw_only=True):
    """More inputs, parameters and key parts for a step; `reuse` is an earlier step that still holds."""

    inputs: dict[str, Artifact] = {}
    params: dict[str, Any] = {}
    parts: dict[str, str] = {}
    reuse: Step | None = None


def model_name(spec: Spec) -> str:
    """The name under which a spec registers: `register.model`, else the project."""
    return spec.register.model or spec.project


def find_version(services: Services, model: str, number: int) -> ModelVersion | None:
    """One model version."""
    found = services.records.find(ModelVersion, {"name": model, "number": number}, limit=1)
    return found[0] if found else None


def prepare_register(
    services: Services, spec: Spec, parts: Mapping[str, str], steps: Mapping[str, Step]
) -> Preparation:
    """The champion joins the inputs; a step that made the present champion is not repeated against itself.

    Raises:
        UntrustedError: No key that counts has signed the champion.
    """
    model, alias_name = model_name(spec), spec.register.alias
    alias = services.records.get(Alias, f"{model}/{alias_name}")
    champion = find_version(services, model, alias.number) if alias else None
    own = {"model": model, **parts}
    digest = champion.bundle.digest if champion else "none"
    for earlier in services.records.find(
        Step, {"stage": "register", "state": "succeeded"}, order="-created_at", limit=50
    ):
        base = {name: value for name, value in earlier.key_parts.items() if name != "champion"}
        made = earlier.outputs.get("bundle")
        if base != own or made is None or (made.digest != digest and earlier.key_parts.get("champion") != digest):
            continue
        if _refusal(services, made, earlier.outputs.get("signature")) is None:  # else it is made and signed anew
            return Preparation(reuse=earlier)
    refusal = _refusal(services, champion.bundle, champion.signature) if champion else None
    if refusal is not None:  # the step would open and run it
        raise UntrustedError(
            refusal.message,
            hint=f"register beside it, uncompared: `millrace run --set register.alias=next`, then `millrace models "
            f"promote {model}@next`",
        )
    inputs = {"champion.bundle": champion.bundle} if champion else {}
    lineage = {
        "dataset": steps["data"].outputs["dataset"].digest,
        "code": {
            name.removeprefix("code "): value for name, value in steps["train"].key_parts.items() if "code " in name
        },
        "spec": {name: value for name, value in steps["train"].key_parts.items() if " " not in name},
    }
    params = {
        "model": model,
        "champion": f"{model} v{champion.number}" if champion else None,
        "looks": _looks(services, steps["data"].outputs["dataset"].digest) + 1,
        "lineage": lineage,
        "evaluate": steps["evaluate"].facts,
        "compress": steps["compress"].facts,
        "train": {key: value for key, value in steps["train"].facts.items() if key != "epochs"},
        "data": {key: steps["data"].facts.get(key) for key in ("rows_kept", "split", "task", "label", "image")},
    }
    return Preparation(inputs=inputs, params=params, parts={"model": model, "champion": digest})


def _refusal(services: Services, bundle: Artifact, signature: Artifact | None) -> UntrustedError | None:
    """Why no key that counts has signed a bundle; None where one has."""
    try:
        services.signer.verify(bundle.digest, services.blobs.read(signature.digest) if signature else b"")
    except UntrustedError as error:
        return error
    return None


def _looks(services: Services, dataset: str) -> int:
    """How often the frozen test rows of a dataset have judged a challenger."""
    steps = services.records.find(Step, {"stage": "register", "state": "succeeded"})
    return sum(step.key_parts.get("input data.dataset") == dataset for step in steps)


def commit_dataset(services: Services, transaction: Transaction, run: Run, spec: Spec, step: Step) -> Step:
    """The dataset becomes a version, unless these bytes are one already."""
    artifact = step.outputs["dataset"]
    versions = transaction.find(DatasetVersion, {"name": spec.project})
    if not any(version.artifact.digest == artifact.digest for version in versions):
        number = max((version.number for version in versions), default=0) + 1
        version = DatasetVersion(
            id=new_id(), project=run.project, created_at=services.clock.now(), name=spec.project, number=number,
            artifact=artifact, run_id=run.id, facts=step.facts,
        )  # fmt: skip
        transaction.put(version, expect_version=0)
    return step


def commit_model(services: Services, transaction: Transaction, run: Run, spec: Spec, step: Step) -> Step:
    """The bundle is signed and becomes a version; the gate's verdict moves the alias."""
    facts = msgspec.convert(step.facts, RegisterFacts)
    bundle = step.outputs["bundle"]
    owner = project_of_model(transaction, facts.model, run.project)
    if owner != run.project:  # who may run in one project must not change what another one serves
        raise ConflictError(
            f"the model {facts.model!r} belongs to the project {owner!r}, this run to {run.project!r}",
            hint="set register.model to a name of its own",
        )
    versions = transaction.find(ModelVersion, {"name": facts.model})
    version = next((one for one in versions if one.bundle.digest == bundle.digest), None)
    verdict = facts.gate.verdict
    if version is None:
        number = next_number(transaction, facts.model, services.clock.now(), run.project)
        version = _new_version(services, run, step, facts, number)
        transaction.put(version, expect_version=0)
    else:
        verdict = "same" if verdict in ("promoted", "kept", "undecided") else verdict
        if _refusal(services, bundle, version.signature) is not None:  # this run has made the same bytes
            version = transaction.put(
                msgspec.structs.replace(version, signature=_sign(services, bundle)), version.version
            )
    assert version.signature is not None
    gate = msgspec.structs.replace(facts.gate, verdict=verdict)
    promoted = verdict in ("first", "promoted")
    if promoted:
        alias, now, reason = spec.register.alias, services.clock.now(), gate.explanation or verdict
        asked_by = run.created_by or f"run:{run.id}"
        if ask(transaction, version, alias, asked_by=asked_by, reason=reason, now=now) is None:
            move_alias(transaction, facts.model, alias, version.number, at=now, reason=reason)
        else:
            promoted = False
            gate = msgspec.structs.replace(gate, verdict="waiting", explanation=f"{reason}; waits for approval")
    key_id = services.signer.verify(bundle.digest, services.blobs.read(version.signature.digest))
    facts = msgspec.structs.replace(
        facts, gate=gate, bundle_digest=bundle.digest, number=version.number, alias=spec.register.alias,
        promoted=promoted, signed_by=key_id,
    )  # fmt: skip
    outputs = {**step.outputs, "signature": version.signature}
    return msgspec.structs.replace(step, outputs=outputs, facts=msgspec.to_builtins(facts))


def _new_version(services: Services, run: Run, step: Step, facts: RegisterFacts, number: int) -> ModelVersion:
    bundle = step.outputs["bundle"]
    return ModelVersion(
        id=new_id(), project=run.project, created_at=services.clock.now(), name=facts.model, number=number,
        bundle=bundle, signature=_sign(services, bundle),
        measurements=step.outputs.get("measurements"), card=step.outputs.get("card"),
        chosen_variant=facts.variant, run_id=run.id, facts=step.facts,
    )  # fmt: skip


def _sign(services: Services, bundle: Artifact) -> Artifact:
    return services.blobs.put(services.signer.sign(bundle.digest), media_type="application/json")


def commit_endpoint(services: Services, transaction: Transaction, run: Run, spec: Spec, step: Step) -> Step:
    """`serve` in a run writes the endpoint that is wanted; `millrace serve` starts it."""
    model = model_name(spec)
    alias = transaction.get(Alias, f"{model}/{spec.register.alias}")
    if alias is not None:
        endpoint = transaction.get(Endpoint, model)
        if endpoint is not None and endpoint.is_managed:  # deployed: what it serves follows its alias
            transaction.put(msgspec.structs.replace(endpoint, facts=step.facts), expect_version=endpoint.version)
            return step
        wanted = Endpoint(
            id=model, project=run.project, created_at=endpoint.created_at if endpoint else services.clock.now(),
            version=endpoint.version if endpoint else 0, name=model, model=model, alias=spec.register.alias,
            number=alias.number, variant=step.facts.get("variant", "fp32"),
            state=endpoint.state if endpoint else "desired", url=endpoint.url if endpoint else None,
            pid=endpoint.pid if endpoint else None, facts=step.facts,
            text=endpoint.text if endpoint else f"not served yet: `millrace serve {model}`",
        )  # fmt: skip
        transaction.put(wanted)
    return step


def store_signature(services: Services, outputs: Mapping[str, Artifact]) -> None:
    """Before the transaction: encrypted blobs write a record of their own. In it, the same bytes are there already."""
    services.blobs.put(services.signer.sign(outputs["bundle"].digest), media_type="application/json")


Prepare = Callable[[Services, Spec, Mapping[str, str], Mapping[str, Step]], Preparation]
Commit = Callable[[Services, Transaction, Run, Spec, Step], Step]
PREPARATIONS: dict[str, Prepare] = {"register": prepare_register}
BEFORE_COMMITS: dict[str, Callable[[Services, Mapping[str, Artifact]], None]] = {"register": store_signature}
COMMITS: dict[str, Commit] = {"data": commit_dataset, "register": commit_model, "serve": commit_endpoint}
