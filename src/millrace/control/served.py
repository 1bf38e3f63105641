"""What `millrace serve` is asked for: versions of the registry, a user's own code, ensembles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from millrace.control.models import open_version, resolve_model
from millrace.control.services import Services
from millrace.core.errors import ConflictError, DeniedError, InputError, NotFoundError
from millrace.core.operations.live import ServeRequest
from millrace.core.refs import Ref
from millrace.core.spec import Serve
from millrace.core.types import Endpoint, ModelVersion
from millrace.formats.bundle import open_bundle
from millrace.serve.child import ServedModel
from millrace.serve.ensembles import read_document

CODE, WEIGHTS = "model.py", "model.safetensors"
MAX_PARTS = 32


class Wanted(NamedTuple):
    """One version of an endpoint that is to be served."""

    model: ServedModel
    version: ModelVersion | None  # None: of a path, watched by nobody
    reference: dict[str, Any]


def wanted_models(services: Services, body: ServeRequest, serve: Serve) -> list[Wanted]:
    """Everything that a request names, each version once.

    Raises:
        InputError: Nothing is named, or a path is no model.
        NotFoundError: No such model, or no such file.
        ConflictError: An endpoint of that name is kept by the server, or two things have one name.
        DeniedError: Code of a path, asked for through a server.
    """
    texts = [text for text in (body.model, *body.more) if text]
    if body.all:
        texts += sorted({one.name for one in services.records.find(ModelVersion)}) if services.is_used else []
    if not texts:
        hint = "`millrace models` lists what there is"
        raise InputError("want at least one model, got none", hint=hint)
    wanted: dict[tuple[str, str], Wanted] = {}
    for text in dict.fromkeys(texts):
        one = _wanted(services, text, body, serve)
        before = wanted.get((one.model.name, one.model.version))
        if before is not None and before.model.path != one.model.path:
            raise ConflictError(f"two models would be {one.model.name!r}", hint="--name gives one of them another name")
        is_first = all(name != one.model.name for name, _ in wanted)
        weighed = one.model if is_first else msgspec.structs.replace(one.model, weight=0.0)
        wanted.setdefault((one.model.name, one.model.version), one._replace(model=weighed))
    for name in {name for name, _ in wanted}:
        _refuse_deployed(services, name)
    return list(wanted.values())


def is_path(text: str) -> bool:
    """Whether a model is named by a path: a class in a file, an ensemble, or a folder.

    Example:
        >>> [is_path(text) for text in ("digits@3", "service.py:Fraud", "./folder", "both.yaml")]
        [False, True, True, True]
    """
    return bool(re.search(r"\.py(:|$)|\.ya?ml$|/|^\.", text)) and ":" not in text.partition(".py")[0]


def _wanted(services: Services, text: str, body: ServeRequest, serve: Serve) -> Wanted:
    if not is_path(text):
        return _of_registry(services, text, body, serve)
    if services.drives_apart:
        raise DeniedError(
            f"a server does not run code of a path ({text[:80]})", hint="`millrace serve` on your own machine does"
        )
    return Wanted(_of_path(services, text, body, serve), None, {})


def _of_registry(services: Services, text: str, body: ServeRequest, serve: Serve) -> Wanted:
    version = resolve_model(services, text)
    variant = body.variant or (version.chosen_variant if serve.variant == "chosen" else serve.variant)
    folder = open_version(services, version)
    bundle = open_bundle(folder, signature=None, verifier=None, expected_digest=version.bundle.digest)
    bundle.model_path(variant)
    model = ServedModel(
        name=version.name, version=str(version.number), path=str(folder), digest=version.bundle.digest,
        variant=variant, threads=body.threads or serve.threads, max_batch=serve.max_batch, queue=serve.queue,
    )  # fmt: skip
    return Wanted(model, version, bundle.reference or {})


def _of_path(services: Services, text: str, body: ServeRequest, serve: Serve, base: Path | None = None) -> ServedModel:
    file, _, attribute = text.partition(":")
    path = ((base or Path.cwd()) / file).resolve()
    common: dict[str, Any] = {
        "threads": body.threads or serve.threads,
        "max_batch": serve.max_batch,
        "queue": serve.queue,
    }
    if path.suffix in (".yaml", ".yml"):
        return _ensemble(services, path, body, serve, common)
    if path.suffix == ".py":
        if not attribute:
            raise InputError(f"{text}: want file.py:Class", hint=f"for example {file}:Model")
        if not path.is_file():
            raise NotFoundError(f"there is no file {path}", hint="correct the name")
        return ServedModel(
            name=_name(body, attribute), source="code", path=str(path), attribute=attribute, variant="code", **common
        )
    if not path.is_dir():
        raise NotFoundError(f"there is no file or folder {path}", hint="want file.py:Class, a folder, or ensemble.yaml")
    missing = [name for name in (CODE, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path} has no {missing[0]}", hint=f"a folder wants {CODE} with build(), and {WEIGHTS}")
    return ServedModel(name=_name(body, path.name), source="code", path=str(path), variant="torch", **common)


def _ensemble(
    services: Services, path: Path, body: ServeRequest, serve: Serve, common: dict[str, Any]
) -> ServedModel:  # fmt: skip
    try:
        given = yaml.safe_load(path.read_text())
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}", hint="correct the name") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is not YAML: {error}") from None
    document = read_document(given)
    if len(document.models) > MAX_PARTS:
        raise InputError(f"{path.name}: want at most {MAX_PARTS} models, got {len(document.models)}")
    parts: dict[str, ServedModel] = {}
    for text in document.models:
        if is_path(text) and text.partition(":")[0].endswith((".yaml", ".yml")):
            raise InputError(f"{path.name}: {text}: an ensemble may not stand in another")
        plain = ServeRequest(model=text, threads=body.threads)
        if is_path(text):
            part = _of_path(services, text, plain, serve, path.parent)
        else:
            part = _of_registry(services, text, plain, serve).model
        parts[text] = part
    return ServedModel(
        name=_name(body, document.name), source="ensemble", path=str(path), document=given, parts=parts,
        variant="ensemble", **common,
    )  # fmt: skip


def _name(body: ServeRequest, usual: str) -> str:
    """The endpoint's name: as asked, else in the form of names."""
    if body.name is not None:
        return Ref.parse(body.name, kind="model").name
    dashed = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", usual).lower()
    return Ref.parse(re.sub(r"[^a-z0-9._-]+", "-", dashed).strip("-._") or "model", kind="model").name


def _refuse_deployed(services: Services, name: str) -> None:
    deployed = services.records.get(Endpoint, name) if services.is_used else None
    if deployed is not None and deployed.is_managed:
        raise ConflictError(
            f"the endpoint {name!r} is deployed: the server serves it at {deployed.url or 'its address'}",
            hint=f"use that one, or `millrace endpoints delete {name}` first",
        )
