"""Manifests: valid for Kubernetes, field by field as kept in `manifests/`; and what the pod is told really serves.

KServe's own schemas are not part of `kubernetes-validate`: the fields used here are compared with a small schema,
written from KServe's API reference (v1alpha1 ServingRuntime, v1beta1 InferenceService).
"""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubernetes_validate
import msgspec
import pytest
import trustme
import yaml

from millrace.core.errors import InputError
from millrace.serve.child import ChildConfig
from millrace.serve.manifests import DRAIN_S, GRACE_S, LEAVE_S, Placement, manifests
from millrace.serve.process import ServerProcess

GOLDEN = Path(__file__).parent / "manifests"
PLACED = Placement(
    name="digits", version="3", variant="int8", digest="sha256:" + "0" * 64, size_bytes=10_000_000,
    image="registry.example/digits:3", package_version="0.1.0", namespace="shop", threads=2,
)  # fmt: skip
PLAIN, KSERVE = manifests(PLACED), manifests(PLACED, is_kserve=True)
_META = {
    "type": "object",
    "required": ["name", "namespace"],
    "properties": {"annotations": {"additionalProperties": {"type": "string"}}},
}
_FORMAT = {"name": {"type": "string"}, "version": {"type": "string"}}


def strict(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


KSERVE_SCHEMAS = {
    "ServingRuntime": strict(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "serving.kserve.io/v1alpha1"},
        kind={},
        metadata=_META,
        spec=strict(
            ["containers", "supportedModelFormats"],
            labels={"type": "object"},
            containers={"type": "array", "minItems": 1},
            volumes={"type": "array"},
            protocolVersions={"type": "array", "items": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}},
            supportedModelFormats={
                "type": "array",
                "items": strict(["name"], **_FORMAT, autoSelect={"type": "boolean"}, priority={"type": "integer"}),
            },
        ),
    ),
    "InferenceService": strict(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "serving.kserve.io/v1beta1"},
        kind={},
        metadata=_META,
        spec=strict(
            ["predictor"],
            predictor=strict(
                ["model"],
                minReplicas={"type": "integer", "minimum": 0},
                maxReplicas={"type": "integer", "minimum": 1},
                scaleMetric={"enum": ["cpu", "memory", "concurrency", "rps"]},
                scaleTarget={"type": "integer"},
                automountServiceAccountToken={"type": "boolean"},
                terminationGracePeriodSeconds={"type": "integer"},
                securityContext={"type": "object"},
                model=strict(
                    ["modelFormat"],
                    modelFormat=strict(["name"], **_FORMAT),
                    runtime={"type": "string"},
                    protocolVersion={"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                ),
            ),
        ),
    ),
}


def objects(files: dict[str, str]) -> dict[str, Any]:
    return {name: yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")}


@pytest.mark.parametrize(("kind", "files"), [("plain", PLAIN), ("kserve", KSERVE)])
def test_field_by_field_as_kept(kind: str, files: dict[str, str]) -> None:
    kept = {path.name: path.read_text() for path in (GOLDEN / kind).iterdir()}
    assert objects(files) == objects(kept)
    assert files["Containerfile"] == kept["Containerfile"]
    assert files == manifests(PLACED, is_kserve=kind == "kserve")


@pytest.mark.parametrize("file", [name for name in PLAIN if name.endswith(".yaml")])
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_takes_it(file: str, version: str) -> None:
    kubernetes_validate.validate(yaml.safe_load(PLAIN[file]), version, strict=True)


def test_the_validator_would_object() -> None:
    broken = yaml.safe_load(PLAIN["deployment.yaml"])
    broken["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def test_kserve_knows_the_fields() -> None:
    found = objects(KSERVE)
    for name in ("servingruntime.yaml", "inferenceservice.yaml"):
        jsonschema.validate(found[name], KSERVE_SCHEMAS[found[name]["kind"]])
    for name in ("configmap.yaml", "networkpolicy.yaml"):
        kubernetes_validate.validate(found[name], "1.37", strict=True)
    # Container and pod fields are those of Kubernetes: checked as the pod that KServe makes of both.
    runtime, service = found["servingruntime.yaml"]["spec"], found["inferenceservice.yaml"]["spec"]["predictor"]
    fields = ("automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext")
    spec = {"containers": runtime["containers"], "volumes": runtime["volumes"]}
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "digits"},
        "spec": spec | {name: service[name] for name in fields},
    }  # fmt: skip
    kubernetes_validate.validate(pod, "1.37", strict=True)
    assert service["model"]["runtime"] == found["servingruntime.yaml"]["metadata"]["name"]
    assert runtime["containers"][0]["name"] == "kserve-container"


def test_a_pod_may_do_nothing_but_serve() -> None:
    pod = objects(PLAIN)["deployment.yaml"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod["terminationGracePeriodSeconds"] == GRACE_S > LEAVE_S + DRAIN_S
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}
    lines = PLAIN["Containerfile"].splitlines()
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in lines


def test_what_the_pod_is_told_serves(tmp_path: Path, digits_bundle: Path, kit: ModuleType) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("digits.shop.svc")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "tls.pem"))
    (tmp_path / "tokens").write_text("0123456789abcdef0123\n")
    text = objects(PLAIN)["configmap.yaml"]["data"]["server.json"]
    config = msgspec.json.decode(text, type=ChildConfig)
    server = msgspec.structs.replace(
        config.server, variant=kit.child_config(digits_bundle).server.variant, port=0,
        tls_cert=str(tmp_path / "tls.pem"), tls_key="", token_file=str(tmp_path / "tokens"),
    )  # fmt: skip
    process = ServerProcess(msgspec.structs.replace(config, bundle_dir=str(digits_bundle), digest=None, server=server))
    port = process.wait_ready()
    context = ssl._create_unverified_context(cafile=str(tmp_path / "ca.pem"))
    try:
        for path, host, token, status in (
            ("/v2/health/ready", "localhost", "", 200),  # as the kubelet asks
            ("/v2/models/digits", "digits.shop.svc", "", 401),
            ("/v2/models/digits", "digits.shop.svc:443", "0123456789abcdef0123", 200),
            ("/v2/models/digits", "digits-predictor.shop.svc", "0123456789abcdef0123", 200),
        ):
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
            connection.request("GET", path, headers={"Host": host, "Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            assert answer.status == status, (path, host, body)
    finally:
        assert process.stop() == 0
    assert json.loads(text)["digest"] == PLACED.digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "Digits_1"}, {"name": "a" * 53}, {"namespace": "a b"}, {"image": "a b"}, {"image": "x\nUSER root"},
        {"min_replicas": 5}, {"min_replicas": 0},
    ],
)  # fmt: skip
def test_what_kubernetes_does_not_take_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="want"):
        manifests(msgspec.structs.replace(PLACED, **wrong))
