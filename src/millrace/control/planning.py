"""From a spec to steps with cache keys: what will run again, and why.

A key covers functions of data, spec, code and seed only. Its parts are kept by name, so that the
reason of a rerun can be said: "train.epochs 8 → 5", "model.py changed".
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from millrace.core import extras
from millrace.core.errors import InputError, NotFoundError
from millrace.core.ids import digest_bytes, digest_json
from millrace.core.ports import StageDescriptor
from millrace.core.spec import Section, Spec, StepSpec
from millrace.core.types import Artifact, Struct
from millrace.core.units import Share
from millrace.data.source_files import source_digests
from millrace.formats.cpu import cpu_flags
from millrace.train.code_digest import code_digests
from millrace.train.frameworks_table import extras_of

USER_STAGE = "user"


class StepPlan(Struct, frozen=True, kw_only=True):
    """A step of a run before it has a key: `needs` are the steps whose outputs it reads."""

    name: str
    stage: str
    implementation: str
    needs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    params: dict[str, Any] = {}
    memory: str | int | None = None
    wall_time: str | float | None = None


def plan_steps(spec: Spec, stages: Mapping[str, StageDescriptor]) -> list[StepPlan]:
    """The steps of a spec in an order in which every need comes first.

    Args:
        spec: A checked spec.
        stages: The stage table.
    """
    plans = [_section_step(spec, stage) for stage in stages.values()] if spec.data else []
    if not spec.monitor.enabled:
        plans = [plan for plan in plans if plan.name != "monitor"]
    for step in spec.steps:
        plans.extend(_user_steps(step, [other.name for other in spec.steps]))
    return _ordered(plans)


def _section_step(spec: Spec, stage: StageDescriptor) -> StepPlan:
    return StepPlan(
        name=stage.name,
        stage=stage.name,
        implementation=stage.implementation,
        needs=tuple(dict.fromkeys(name.split(".")[0] for name in stage.inputs)),
        inputs=stage.inputs,
        memory=spec.limits.memory,
        wall_time=spec.limits.wall_time,
    )


def _user_steps(step: StepSpec, names: Sequence[str]) -> list[StepPlan]:
    """A step, or one per point of its matrix (`sweep[0]`, `sweep[1]`, …)."""
    points: list[dict[str, Any]] = [{}]
    for key, values in step.matrix.items():
        points = [{**point, key: value} for point in points for value in values]
    plans = []
    for index, point in enumerate(points):
        plans.append(
            StepPlan(
                name=step.name if not step.matrix else f"{step.name}-{index}",
                stage=USER_STAGE,
                implementation="millrace.control.user_steps:run_user_step",
                needs=tuple(step.needs),
                params={"uses": step.uses, "values": {**step.params, **point}},
                memory=step.limits.memory,
                wall_time=step.limits.wall_time,
            )
        )
    return plans


def _ordered(plans: list[StepPlan]) -> list[StepPlan]:
    """Needs first; the order of the table otherwise. A need on a matrix step means all its points."""
    names = {plan.name for plan in plans}
    resolved = []
    for plan in plans:
        needs: list[str] = []
        for need in plan.needs:
            needs.extend([need] if need in names else sorted(name for name in names if name.startswith(f"{need}-")))
        resolved.append(msgspec.structs.replace(plan, needs=tuple(needs)))
    ordered: list[StepPlan] = []
    done: set[str] = set()
    while len(ordered) < len(resolved):
        ready = [plan for plan in resolved if plan.name not in done and set(plan.needs) <= done]
        if not ready:
            raise InputError("steps need one another in a circle")
        for plan in ready:
            ordered.append(plan)
            done.add(plan.name)
    return ordered


def check_before_work(
    spec: Spec, steps: Sequence[StepPlan], stages: Mapping[str, StageDescriptor], folder: Path
) -> None:
    """Find missing extras and files before anything runs.

    Raises:
        ExtraMissingError: A package of an extra is not installed.
        NotFoundError: A file that the spec names does not exist.
        DataError: The data source does not exist.
    """
    wanted = [extra for step in steps if step.stage in stages for extra in stages[step.stage].extras]
    if spec.data is not None:
        wanted.extend(extras_of(spec.train))
        source_digests(spec.data, folder)
        _check_file(spec.train.model, folder, "train.model")
    for step in spec.steps:
        _check_file(step.uses, folder, f"steps.{step.name}.uses")
    extras.require(wanted, f"the spec of project {spec.project!r}")


def _check_file(reference: str, folder: Path, key: str) -> None:
    name = reference.partition(":")[0]
    if name.endswith((".py", ".sh")) and not (folder / name).is_file():
        raise NotFoundError(f"{key}: there is no file {name} in {folder}", hint="write it, or correct the name")


def flatten(value: Any, prefix: str) -> dict[str, str]:
    """Leaves of a spec section by dotted name, as text.

    Example:
        >>> flatten({"a": {"b": 1}, "c": [1, 2]}, "train")
        {'train.a.b': '1', 'train.c': '[1,2]'}
    """
    if isinstance(value, dict) and value:
        parts: dict[str, str] = {}
        for key, child in value.items():
            parts.update(flatten(child, f"{prefix}.{key}"))
        return parts
    return {prefix: msgspec.json.encode(value).decode()}


def section_value(section: Section | list[Any] | str | float | None) -> Any:
    """A section, or one value of it, as plain data."""
    return msgspec.to_builtins(section, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return float(value)
    raise TypeError(type(value).__name__)


def encode_spec(spec: Spec) -> bytes:
    """The resolved spec as JSON for a worker."""
    return msgspec.json.encode(spec, enc_hook=_plain)


def resolve_device(wanted: str) -> str:
    """`auto` → cuda where an NVIDIA device file exists, mps on Apple silicon, else cpu; no torch needed."""
    if wanted != "auto":
        return wanted
    if os.path.exists("/dev/nvidia0"):
        return "cuda"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


class KeyMaker:
    """Makes the parts of cache keys for one spec in one folder; files are hashed once."""

    def __init__(self, spec: Spec, folder: Path, stages: Mapping[str, StageDescriptor]) -> None:
        self._spec = spec
        self._folder = folder
        self._stages = stages
        self._files: dict[str, dict[str, str]] = {}

    def parts(self, plan: StepPlan, inputs: Mapping[str, Artifact]) -> dict[str, str]:
        """The named parts of a step's key, given the artifacts it will read."""
        parts = {f"input {name}": artifact.digest for name, artifact in sorted(inputs.items())}
        if plan.stage == USER_STAGE:
            parts["seed"] = str(self._spec.train.seed)
            parts["stage"] = "user/1"
            parts["uses"] = plan.params["uses"]
            parts.update(flatten(plan.params["values"], "params"))
            parts.update(self._code(plan.params["uses"]))
            return parts
        stage = self._stages[plan.stage]
        parts["stage"] = f"{stage.name}/{stage.version}"
        parts["threads"] = str(self._spec.train.threads)
        if "train" in stage.sections:
            parts["seed"] = str(self._spec.train.seed)
            parts["device"] = resolve_device(self._spec.train.device)
        for name in stage.sections:
            parts.update(flatten(section_value(attrgetter(name)(self._spec)), name))
        for distribution in stage.distributions:
            parts[f"package {distribution}"] = extras.version_of(distribution)
        if stage.uses_source:
            parts.update(self._sources())
        if stage.uses_code and ":" in self._spec.train.model:
            parts.update(self._code(self._spec.train.model))
        if stage.timed:
            parts["cpu"] = digest_json(cpu_flags())[:19]
        return parts

    def _sources(self) -> dict[str, str]:
        if "sources" not in self._files:
            assert self._spec.data is not None
            found = source_digests(self._spec.data, self._folder)
            self._files["sources"] = {f"file {name}": digest for name, digest in found.items()}
        return self._files["sources"]

    def _code(self, reference: str) -> dict[str, str]:
        if reference not in self._files:
            name = reference.partition(":")[0]
            if name.endswith(".py"):
                found = code_digests(reference, self._folder)
            else:
                found = {name: digest_bytes((self._folder / name).read_bytes())}
            self._files[reference] = {f"code {path}": digest for path, digest in found.items()}
        return self._files[reference]


def cache_key(parts: Mapping[str, str]) -> str:
    """The key: a digest of its parts.

    Example:
        >>> cache_key({"a": "1", "b": "2"}) == cache_key({"b": "2", "a": "1"})
        True
    """
    text = "\n".join(f"{name}={parts[name]}" for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()


def explain(old: Mapping[str, str] | None, new: Mapping[str, str]) -> str:
    """Why a step runs again.

    Example:
        >>> explain({"train.epochs": "8"}, {"train.epochs": "5"})
        'train.epochs 8 → 5'
        >>> explain({"code model.py": "sha256:a"}, {"code model.py": "sha256:b"})
        'model.py changed'
    """
    if old is None:
        return "first time"
    reasons = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        kind, _, rest = name.partition(" ")
        if kind in ("code", "file", "input"):
            reasons.append(f"{rest} {'is new' if before is None else 'is gone' if after is None else 'changed'}")
        else:
            reasons.append(f"{rest or name} {before or 'absent'} → {after or 'absent'}")
    return (
        ", ".join(reasons[:4]) + (f" and {len(reasons) - 4} more" if len(reasons) > 4 else "") or "not finished before"
    )
