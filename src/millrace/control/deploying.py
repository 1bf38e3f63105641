"""What is wanted of deployed endpoints: written by people; `control.deployments` makes what is served match it."""

from __future__ import annotations

import msgspec

from millrace.control.dispatch import handles
from millrace.control.models import open_version, resolve_model
from millrace.control.seen import seen
from millrace.control.services import Services
from millrace.core.errors import ConflictError, InputError, NotFoundError
from millrace.core.operations import live as ops
from millrace.core.refs import Ref
from millrace.core.types import Endpoint
from millrace.formats.bundle import open_bundle

WANTED, READY = "wanted", "ready"


@handles(ops.DEPLOY_ENDPOINT)
def deploy_endpoint(services: Services, body: ops.DeployRequest) -> Endpoint:
    """Write what is wanted; a server's loop serves it within a second."""
    ref = Ref.parse(body.model, kind="model")
    Ref.parse(body.endpoint, kind="endpoint")
    most = max(body.min_replicas, 1) if body.max_replicas is None else body.max_replicas
    if most < body.min_replicas:
        raise InputError(
            f"replicas of {body.endpoint!r}: want the least not above the most, got {body.min_replicas}..{most}",
            hint="such as 2, or 0..4",
        )
    version = resolve_model(services, body.model)
    if version.format != "bundle":
        raise InputError(
            f"{version.name} v{version.number} is kept as it was logged and is never loaded",
            hint="register an ONNX file: `millrace models register model.onnx`",
        )
    variant = body.variant or version.chosen_variant
    bundle = open_bundle(
        open_version(services, version), signature=None, verifier=None, expected_digest=version.bundle.digest
    )
    bundle.model_path(variant)
    alias = ref.at if ref.number is None else None
    with services.records.transaction() as transaction:
        old = transaction.get(Endpoint, body.endpoint)
        if old is not None and not old.is_managed and seen(services, old).state == READY:
            raise ConflictError(
                f"the endpoint {body.endpoint!r} is served by process {old.pid}",
                hint="stop that `millrace serve`, or choose another name",
            )
        ended = old.rollout if old is not None else None
        if ended is not None and ended.is_active:
            ended = msgspec.structs.replace(
                ended, state="aborted", reason="the endpoint was deployed anew", ended_at=services.clock.now()
            )
        return transaction.put(
            Endpoint(
                id=body.endpoint, project=version.project, name=body.endpoint, model=version.name,
                created_at=old.created_at if old else 0.0,
                alias=alias or (None if ref.number is not None else "champion"), number=version.number,
                variant=body.variant or "", state=WANTED, is_managed=True,
                is_isolated=body.isolate or (body.min_replicas, most) != (1, 1),
                min_replicas=body.min_replicas, max_replicas=most,
                threads=body.threads, slo_p99_ms=body.slo_p99_ms,
                facts=old.facts if old else {}, url=old.url if old and old.is_managed else None,
                rollout=ended,
            )
        )  # fmt: skip


@handles(ops.DELETE_ENDPOINT)
def delete_endpoint(services: Services, body: ops.NameRequest) -> Endpoint:
    """Forget it; the loop stops serving it."""
    with services.records.transaction() as transaction:
        endpoint = transaction.get(Endpoint, body.name)
        if endpoint is None:
            raise NotFoundError(f"there is no endpoint {body.name!r} in {services.home}", hint="`millrace endpoints`")
        if not endpoint.is_managed and seen(services, endpoint).state == READY:
            raise ConflictError(f"the endpoint {body.name!r} is served by process {endpoint.pid}", hint="stop that one")
        transaction.delete(Endpoint, body.name)
    return endpoint
