"""The software bill of materials of a run: CycloneDX 1.6 of what its steps recorded of their surroundings."""

# The decorators of cyclonedx hide the signatures of its classes from pyright; the tests validate what is made.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

import millrace
from millrace.control.services import Services
from millrace.core.environment import Environment
from millrace.core.errors import NotFoundError
from millrace.core.types import Run, Step

_Found = dict[tuple[ComponentType, str, str], list[str]]  # kind, name, version → the steps that had it


def environments(services: Services, run: Run) -> dict[str, tuple[str, Environment]]:
    """By step: the digest and what it was made with. A step that was taken from an earlier run has the one of then."""
    found = {}
    for step in services.records.find(Step, {"run_id": run.id}):
        if step.environment is not None and services.blobs.exists(step.environment.digest):
            content = services.blobs.read(step.environment.digest)
            found[step.name] = (step.environment.digest, msgspec.json.decode(content, type=Environment))
    return found


def make_sbom(services: Services, run: Run) -> dict[str, Any]:
    """The document, the same for the same run.

    Raises:
        NotFoundError: No step of the run recorded its environment.
    """
    known = environments(services, run)
    if not known:
        raise NotFoundError(
            f"run {run.id} has no record of its environment",
            hint="steps that succeed record it; runs of clients and of releases before this one have none",
        )
    return _document(run, known)


def _document(run: Run, known: Mapping[str, tuple[str, Environment]]) -> dict[str, Any]:
    steps_of: _Found = {}
    for step, (_, environment) in known.items():
        for component in _components(environment):
            steps_of.setdefault(component, []).append(step)
    components = [_component(*key, steps if len(steps) < len(known) else []) for key, steps in steps_of.items()]
    subject = Component(
        type=ComponentType.APPLICATION, name=run.name or run.id, version=run.id, bom_ref=f"run:{run.id}",
        properties=[Property(name=f"millrace:environment:{step}", value=digest) for step, (digest, _) in known.items()],
    )  # fmt: skip
    tool = Component(type=ComponentType.APPLICATION, name="millrace-ai", version=millrace.__version__)
    at = datetime.datetime.fromtimestamp(run.ended_at or run.started_at or run.created_at, datetime.UTC)
    metadata = BomMetaData(component=subject, timestamp=at)
    metadata.tools.components.add(tool)
    identity = " ".join([run.id, *sorted({digest for digest, _ in known.values()})])
    bom = Bom(components=components, metadata=metadata, serial_number=uuid.uuid5(uuid.NAMESPACE_OID, identity))
    bom.register_dependency(subject, components)
    return msgspec.json.decode(JsonV1Dot6(bom).output_as_string(indent=None))


def _components(environment: Environment) -> list[tuple[ComponentType, str, str]]:
    return [
        (ComponentType.OPERATING_SYSTEM, environment.system, f"{environment.release} {environment.machine}"),
        (ComponentType.PLATFORM, environment.implementation, environment.python),
        *((ComponentType.LIBRARY, name, version) for name, version in environment.packages.items()),
    ]


def _component(kind: ComponentType, name: str, version: str, steps: list[str]) -> Component:
    purl = PackageURL(type="pypi", name=name, version=version) if kind is ComponentType.LIBRARY else None
    return Component(
        type=kind, name=name, version=version, purl=purl, bom_ref=str(purl or f"{kind.value}:{name}@{version}"),
        properties=[Property(name="millrace:steps", value=" ".join(sorted(steps)))] if steps else None,
    )  # fmt: skip
