"""What Kubernetes and KServe are told so that they serve a model: text alone, nothing is applied."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import msgspec
import yaml

from millrace.core.errors import InputError
from millrace.core.types import Struct
from millrace.serve.child import ChildConfig

PORT, USER = 8080, 65532
LEAVE_S = 5  # until Services everywhere know that a pod goes
DRAIN_S = 10
GRACE_S = LEAVE_S + DRAIN_S + 10  # besides: closing the model, and some air
_BESIDE = ("MODEL_CARD.md", "measurements.json", "signature.json")  # what an export adds
_BASE_MIB = 192  # a process with no model
_CONFIG, _TLS, _TOKENS = "/etc/millrace/config", "/etc/millrace/tls", "/etc/millrace/tokens"


class Placement(Struct, frozen=True, kw_only=True):
    """What is to be served, and how often.

    `name`: of the model in requests, and of every object; `digest`: of the bundle, checked when a pod starts;
    `size_bytes`: of the variant's file; `image`: with the bundle at `/models/NAME`, as the container file makes it.
    """

    name: str
    version: str
    variant: str
    digest: str
    size_bytes: int
    image: str
    package_version: str
    namespace: str = "default"
    threads: int = 1
    max_batch: int = 64
    queue: int = 1024
    min_replicas: int = 2
    max_replicas: int = 4


def manifests(placed: Placement, *, is_kserve: bool = False) -> dict[str, str]:
    """Files by name, the same for the same placement.

    Args:
        placed: What is served.
        is_kserve: A ServingRuntime and an InferenceService in the place of a Deployment and what belongs to it.

    Raises:
        InputError: The name, the image or the numbers of replicas are none that Kubernetes takes.

    Example:
        >>> placed = Placement(
        ...     name="digits", version="3", variant="fp32", digest="sha256:0", size_bytes=1, image="i:1",
        ...     package_version="0.1.0",
        ... )
        >>> sorted(manifests(placed, is_kserve=True))
        ['Containerfile', 'configmap.yaml', 'inferenceservice.yaml', 'networkpolicy.yaml', 'servingruntime.yaml']
    """
    _check(placed)
    objects = {"configmap": _config_map(placed), "networkpolicy": _network_policy(placed)}
    if is_kserve:
        objects |= {"servingruntime": _serving_runtime(placed), "inferenceservice": _inference_service(placed)}
    else:
        objects |= {
            "deployment": _deployment(placed), "service": _service(placed), "hpa": _autoscaler(placed),
            "pdb": _disruption_budget(placed),
        }  # fmt: skip
    files = {
        f"{name}.yaml": yaml.dump(found, Dumper=_Dumper, sort_keys=False, width=120) for name, found in objects.items()
    }
    return {"Containerfile": container_file(placed), **dict(sorted(files.items()))}


def container_file(placed: Placement) -> str:
    """An image with the bundle as its last layer: no root, and nothing is written at run time."""
    return f"""\
# Beside this file: the folder `bundle`, as `millrace models export` writes it.
FROM python:3.12-slim
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS={max(1, placed.threads)}
RUN pip install --no-cache-dir millrace-ai=={placed.package_version}
COPY bundle /models/{placed.name}
# An export holds more than the bundle, and what is no part of that is not loaded.
RUN cd /models/{placed.name} && rm -f {" ".join(_BESIDE)} && chmod -R a+rX,a-w /models
USER {USER}:{USER}
EXPOSE {PORT}
ENTRYPOINT ["python", "-m", "millrace.serve.child", "--config", "{_CONFIG}/server.json"]
"""


def _check(placed: Placement) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", placed.name):
        raise InputError(
            f"want a name that Kubernetes takes (a-z, 0-9, -; from a letter; at most 52), got {placed.name!r}",
            hint="deploy the model at an endpoint with such a name, and give that",
        )
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", placed.namespace):
        raise InputError(f"want a namespace that Kubernetes takes, got {placed.namespace!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", placed.image):
        raise InputError(f"want an image such as registry.example/digits:3, got {placed.image!r}")
    if not 1 <= placed.min_replicas <= placed.max_replicas:
        raise InputError(
            f"want 1 <= min <= max replicas, got {placed.min_replicas} and {placed.max_replicas}",
            hint="an HPA keeps at least one",
        )


def _meta(placed: Placement, name: str = "") -> dict[str, Any]:
    return {"name": name or placed.name, "namespace": placed.namespace, "labels": _labels(placed)}


def _labels(placed: Placement) -> dict[str, str]:
    return {
        **_selector(placed),
        "app.kubernetes.io/version": placed.version,
        "app.kubernetes.io/managed-by": "millrace",
    }


def _selector(placed: Placement) -> dict[str, str]:
    return {"app.kubernetes.io/name": placed.name}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stay readable."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _config_map(placed: Placement) -> dict[str, Any]:
    data = {"server.json": _config(placed)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _meta(placed), "data": data}


def _config(placed: Placement) -> str:
    host = f"{placed.name}.{placed.namespace}.svc"
    hosts = [placed.name, f"{placed.name}.{placed.namespace}", host, f"{host}.cluster.local"]
    hosts += [name.replace(placed.name, f"{placed.name}-predictor", 1) for name in hosts]  # KServe's Service
    server = {
        "name": placed.name, "version": placed.version, "variant": placed.variant, "host": "0.0.0.0", "port": PORT,
        "max_batch": placed.max_batch, "queue": placed.queue, "drain_s": float(DRAIN_S), "allowed_hosts": hosts,
        "tls_cert": f"{_TLS}/tls.crt", "tls_key": f"{_TLS}/tls.key", "token_file": f"{_TOKENS}/tokens",
    }  # fmt: skip
    config = {
        "bundle_dir": f"/models/{placed.name}", "digest": placed.digest, "threads": placed.threads, "server": server,
    }  # fmt: skip
    msgspec.convert(config, ChildConfig)
    return json.dumps(config, indent=2) + "\n"


def _container(placed: Placement, name: str) -> dict[str, Any]:
    memory = _BASE_MIB + -(-3 * placed.size_bytes // (1 << 20))  # the file, and the session made of it
    return {
        "name": name,
        "image": placed.image,
        "ports": [{"name": "https", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {
            "requests": {"cpu": str(max(1, placed.threads)), "memory": f"{memory}Mi"},
            "limits": {"memory": f"{2 * memory}Mi"},
        },
        "startupProbe": _probe("/v2/health/ready", periodSeconds=1, failureThreshold=60),
        "readinessProbe": _probe("/v2/health/ready", periodSeconds=2, failureThreshold=2),
        "livenessProbe": _probe("/v2/health/live", periodSeconds=10, failureThreshold=3),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S)]}}},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG, "readOnly": True},
            {"name": "tls", "mountPath": _TLS, "readOnly": True},
            {"name": "tokens", "mountPath": _TOKENS, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }  # fmt: skip


def _probe(path: str, **times: int) -> dict[str, Any]:
    """Without a token: paths of health want none."""
    get = {
        "path": path, "port": "https", "scheme": "HTTPS", "httpHeaders": [{"name": "Host", "value": "localhost"}],
    }  # fmt: skip
    return {"httpGet": get, "timeoutSeconds": 2, **times}


def _pod(placed: Placement, container: str) -> dict[str, Any]:
    secret = {"defaultMode": 0o440}
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(placed, container)],
        "volumes": [
            {"name": "config", "configMap": {"name": placed.name}},
            {"name": "tls", "secret": {"secretName": f"{placed.name}-tls", **secret}},
            {"name": "tokens", "secret": {"secretName": f"{placed.name}-tokens", **secret}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
        ],
    }  # fmt: skip


def _deployment(placed: Placement) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _meta(placed),
        "spec": {
            # No `replicas`: the HPA says it, and applying again must not undo that.
            "selector": {"matchLabels": _selector(placed)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": _labels(placed), "annotations": {"millrace/config": _digest(placed)}},
                "spec": _pod(placed, "millrace"),
            },
        },
    }


def _digest(placed: Placement) -> str:
    """Another configuration makes other pods."""
    return hashlib.sha256(_config(placed).encode()).hexdigest()


def _service(placed: Placement) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(placed),
        "spec": {
            "selector": _selector(placed),
            "ports": [{"name": "https", "port": 443, "targetPort": "https", "protocol": "TCP"}],
        },
    }


def _autoscaler(placed: Placement) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _meta(placed),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": placed.name},
            "minReplicas": placed.min_replicas,
            "maxReplicas": placed.max_replicas,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}},
                }
            ],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
        },
    }


def _disruption_budget(placed: Placement) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _meta(placed),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _selector(placed)}},
    }


def _network_policy(placed: Placement) -> dict[str, Any]:
    """In: pods of the namespace, to the port. Out: nothing, a model calls nobody."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(placed),
        "spec": {
            "podSelector": {"matchLabels": _selector(placed)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": PORT, "protocol": "TCP"}]}],
            "egress": [],
        },
    }


def _serving_runtime(placed: Placement) -> dict[str, Any]:
    pod = _pod(placed, "kserve-container")
    # The pod's own fields are said by the InferenceService: a ServingRuntime knows only some of them.
    known = {name: pod[name] for name in ("containers", "volumes")}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": _meta(placed),
        "spec": {
            "labels": _labels(placed),
            "supportedModelFormats": [{"name": "millrace", "version": "1", "autoSelect": False}],
            "protocolVersions": ["v2"],
            **known,
        },
    }


def _inference_service(placed: Placement) -> dict[str, Any]:
    pod = _pod(placed, "kserve-container")
    fields = ("automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext")
    annotations = {"serving.kserve.io/deploymentMode": "RawDeployment"}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {**_meta(placed), "annotations": annotations},
        "spec": {
            "predictor": {
                "minReplicas": placed.min_replicas,
                "maxReplicas": placed.max_replicas,
                "scaleMetric": "cpu",
                "scaleTarget": 70,
                **{name: pod[name] for name in fields},
                "model": {
                    "modelFormat": {"name": "millrace", "version": "1"},
                    "runtime": placed.name,
                    "protocolVersion": "v2",
                },
            }
        },
    }
