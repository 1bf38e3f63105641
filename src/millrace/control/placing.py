"""What Kubernetes is told of an endpoint or a model."""

from __future__ import annotations

from millrace.control.dispatch import handles
from millrace.control.endpoints import sections_of, wanted_number
from millrace.control.models import open_version, resolve_model
from millrace.control.services import Services
from millrace.core.extras import version_of
from millrace.core.operations import live as ops
from millrace.core.types import Endpoint
from millrace.formats.bundle import open_bundle
from millrace.serve.manifests import Placement, manifests
from millrace.serve.server import DISTRIBUTION


@handles(ops.WRITE_MANIFESTS)
def write_manifests(services: Services, body: ops.ManifestsRequest) -> ops.Manifests:
    """Of what an endpoint serves; where there is none of that name, of a model."""
    endpoint = services.records.get(Endpoint, body.name) if services.is_used else None
    text = body.name if endpoint is None else f"{endpoint.model}@{wanted_number(services, endpoint)}"
    version = resolve_model(services, text)
    serve, _ = sections_of(services.home)
    asked = endpoint.variant if endpoint is not None else ""
    variant = asked or (version.chosen_variant if serve.variant == "chosen" else serve.variant)
    bundle = open_bundle(
        open_version(services, version), signature=None, verifier=None, expected_digest=version.bundle.digest
    )
    name = version.name if endpoint is None else endpoint.name
    placed = Placement(
        name=name, version=str(version.number), variant=variant, digest=version.bundle.digest,
        size_bytes=bundle.model_path(variant).stat().st_size, image=body.image or f"{name}:{version.number}",
        package_version=version_of(DISTRIBUTION), namespace=body.namespace,
        threads=max(1, endpoint.threads if endpoint is not None else serve.threads), max_batch=serve.max_batch,
        queue=serve.queue, min_replicas=body.min_replicas, max_replicas=body.max_replicas,
    )  # fmt: skip
    model = f"{version.name}@{version.number}"
    return ops.Manifests(model=model, files=manifests(placed, is_kserve=body.kserve))
