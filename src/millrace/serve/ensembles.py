"""Several models and transforms as one: a graph of steps, or a cascade of a small and a large model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import msgspec
import numpy as np

from millrace.core.errors import InputError
from millrace.core.ports import Runtime
from millrace.core.types import Struct
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.runtimes.declared import declared

Tensors = dict[str, np.ndarray]


class Step(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model of the graph. `inputs`: its tensor → an input of the ensemble, or `step.output`."""

    model: str
    inputs: dict[str, str] = {}


class Cascade(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`small` answers; rows whose largest probability is below `below` are answered by `large`."""

    small: str
    large: str
    below: float


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`ensemble.yaml`: either `steps` with `inputs` and `outputs` (its output → `step.output`), or a `cascade`."""

    name: str
    inputs: dict[str, tuple[str, list[int]]] = {}
    outputs: dict[str, str] = {}
    classes: list[str] | None = None
    label: str | None = None
    steps: dict[str, Step] = {}
    cascade: Cascade | None = None

    @property
    def models(self) -> list[str]:
        """The models that it names, each once."""
        if self.cascade is not None:
            return list(dict.fromkeys([self.cascade.small, self.cascade.large]))
        return list(dict.fromkeys(step.model for step in self.steps.values()))


class Part(NamedTuple):
    """A loaded model of an ensemble."""

    runtime: Runtime
    signature: Signature
    max_batch: int = 64


def read_document(given: Any) -> Document:
    """An ensemble's document, with its form checked.

    Raises:
        InputError: It is not one; names the field.

    Example:
        >>> read_document({"name": "fast", "cascade": {"small": "a", "large": "b", "below": 0.8}}).models
        ['a', 'b']
        >>> read_document({"name": "fast", "cascade": {"small": "a", "large": "b", "below": 8}})
        Traceback (most recent call last):
        millrace.core.errors.InputError: ensemble: cascade.below: want a share from 0 to 1, got 8.0
    """
    try:
        document = msgspec.convert(given, Document)
    except msgspec.ValidationError as error:
        raise InputError(f"ensemble: {error}") from error
    if (document.cascade is None) == (not document.steps):
        raise InputError("ensemble: want either steps or a cascade", hint="docs/how-to/ensembles.md shows both")
    if document.cascade is not None and not 0 <= document.cascade.below <= 1:
        raise InputError(f"ensemble: cascade.below: want a share from 0 to 1, got {document.cascade.below}")
    if document.steps and not (document.inputs and document.outputs):
        raise InputError("ensemble: steps want inputs and outputs of the whole")
    return document


def open_ensemble(given: Mapping[str, Any], parts: Mapping[str, Part]) -> EnsembleRuntime | CascadeRuntime:
    """An ensemble of loaded models.

    Args:
        given: The document.
        parts: By what the document calls them.

    Raises:
        InputError: The parts do not fit one another; names step and tensor.
    """
    document = read_document(given)
    if document.cascade is not None:
        return CascadeRuntime(parts[document.cascade.small], parts[document.cascade.large], document.cascade.below)
    return EnsembleRuntime(document, {name: parts[step.model] for name, step in document.steps.items()})


class _Composed:
    """What every composition is: ready with its parts, unloaded with them, never on the event loop if a part is not."""

    platform = "ensemble"

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list({id(part.runtime): part for part in parts}.values())
        self.is_isolated = any(getattr(part.runtime, "is_isolated", False) for part in parts)
        self.mixes_rows = any(getattr(part.runtime, "mixes_rows", False) for part in parts)

    @property
    def is_ready(self) -> bool:
        """Whether every part is."""
        return all(part.runtime.is_ready for part in self._parts)

    @property
    def memory_bytes(self) -> int:
        """Of the parts' own processes."""
        return sum(getattr(part.runtime, "memory_bytes", 0) for part in self._parts)

    def load(self) -> None:
        """The parts are loaded already."""

    def unload(self) -> None:
        """Unload the parts."""
        for part in self._parts:
            part.runtime.unload()


class EnsembleRuntime(_Composed):
    """A graph of steps as one `Runtime`.

    Args:
        document: With steps.
        parts: By step.

    Raises:
        InputError: A cycle, a tensor that nobody gives, another dtype or shape.
    """

    def __init__(self, document: Document, parts: Mapping[str, Part]) -> None:
        super().__init__(list(parts.values()))
        self._steps, self._by_step, self._outputs = document.steps, parts, document.outputs
        self.order = _order(document)
        specs = _check_steps(document, parts, self.order)
        outputs: dict[str, tuple[str, list[int]]] = {}
        for name, source in document.outputs.items():
            found = _find(specs, source, f"ensemble: outputs.{name}")
            outputs[name] = (found.dtype, found.shape)
        given = _giver(document, parts)
        said = {"inputs": document.inputs, "outputs": outputs, "label": document.label or given.label,
                "classes": document.classes if document.classes is not None else given.classes}  # fmt: skip
        plain = declared(said, "ensemble").signature
        inputs = [_meaning(spec, document, parts) for spec in plain.inputs]
        self.signature = msgspec.structs.replace(plain, inputs=inputs, label_type=given.label_type)

    def infer(self, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """Outputs by name: the steps in their order, each once."""
        known = dict(tensors)
        for name in self.order:
            given = {inner: known[source] for inner, source in self._steps[name].inputs.items()}
            for output, values in run_part(self._by_step[name], given).items():
                known[f"{name}.{output}"] = values
        return {name: known[source] for name, source in self._outputs.items()}

    def sample(self) -> Tensors:
        """None of its own."""
        return {}


class CascadeRuntime(_Composed):
    """A small model first, a large one for the rows of which the small one is not sure.

    Args:
        small: Classifies.
        large: Reads and answers the same.
        below: Rows whose largest probability is lower go on.

    Raises:
        InputError: They read or answer different things.
    """

    def __init__(self, small: Part, large: Part, below: float) -> None:
        super().__init__([small, large])
        self._small, self._large, self._below = small, large, below
        self.signature = _same(small.signature, large.signature)

    def infer(self, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """Outputs by name."""
        answers = run_part(self._small, tensors)
        unsure = ~(answers["probabilities"].max(axis=1) >= self._below)  # NaN is not sure
        if not unsure.any():
            return answers
        better = run_part(self._large, {name: values[unsure] for name, values in tensors.items()})
        merged = {name: np.array(values) for name, values in answers.items()}
        for name, values in better.items():
            merged[name][unsure] = values
        return merged

    def sample(self) -> Tensors:
        """The small model's, where it has one."""
        sample = getattr(self._small.runtime, "sample", None)
        return dict(sample()) if sample is not None else {}


def run_part(part: Part, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A part's answers, in calls of as many rows as it takes: one, where rows of one call influence one another."""
    rows = len(next(iter(tensors.values())))
    limit = 1 if getattr(part.runtime, "mixes_rows", False) else part.max_batch
    if rows <= limit:
        return dict(part.runtime.infer(tensors))
    slices = [
        part.runtime.infer({name: values[at : at + limit] for name, values in tensors.items()})
        for at in range(0, rows, limit)
    ]
    return {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}


# --------------------------------------------------------------------------- checks


def _order(document: Document) -> list[str]:
    """The steps, each after what it reads.

    Raises:
        InputError: They read one another in a circle, or a step that is not there.
    """
    needs: dict[str, set[str]] = {}
    for name, step in document.steps.items():
        if "." in name or name in document.inputs:
            raise InputError(f"ensemble: a step may not be called {name!r}: want no dot and no input's name")
        needs[name] = set()
        for source in step.inputs.values():
            other = source.partition(".")[0]
            if source in document.inputs:
                continue
            if other not in document.steps:
                raise _unknown(f"ensemble: steps.{name}", source, [*document.inputs, *document.steps])
            needs[name].add(other)
    try:
        return list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise InputError(f"ensemble: the steps read one another in a circle: {' → '.join(error.args[1])}") from None


def _check_steps(document: Document, parts: Mapping[str, Part], order: Sequence[str]) -> dict[str, TensorSpec]:
    """Every tensor of the graph by its name.

    Raises:
        InputError: One that is read is not there, or is of another dtype or shape.
    """
    known = {spec.name: spec for spec in declared({"inputs": document.inputs}, "ensemble").signature.inputs}
    for name in order:
        step, signature = document.steps[name], parts[name].signature
        wanted = {spec.name: spec for spec in signature.inputs}
        for inner in step.inputs:
            if inner not in wanted:
                raise _unknown(f"ensemble: steps.{name}.inputs", inner, list(wanted))
        for inner, spec in wanted.items():
            place = f"ensemble: steps.{name}.inputs.{inner}"
            if inner not in step.inputs:
                raise InputError(f"{place}: missing: {step.model} reads it", hint=f"give it one of {', '.join(known)}")
            _check_fit(_find(known, step.inputs[inner], place), spec, place)
        known |= {f"{name}.{spec.name}": spec for spec in signature.outputs}
    return known


def _giver(document: Document, parts: Mapping[str, Part]) -> Signature:
    """Of the step whose probabilities are the ensemble's; where there is none, one that says nothing."""
    step, _, output = document.outputs.get("probabilities", "").partition(".")
    if step in parts and output == "probabilities":
        return parts[step].signature
    return Signature(task="regression", inputs=[], outputs=[], label="label")


def _meaning(spec: TensorSpec, document: Document, parts: Mapping[str, Part]) -> TensorSpec:
    """An input with the columns, and what else the first step that reads it knows of it."""
    for name, step in document.steps.items():
        for inner in parts[name].signature.inputs:
            if step.inputs.get(inner.name) == spec.name and inner.shape == spec.shape:
                return msgspec.structs.replace(inner, name=spec.name)
    return spec


def _find(known: Mapping[str, TensorSpec], source: str, place: str) -> TensorSpec:
    if source not in known:
        raise _unknown(place, source, list(known))
    return known[source]


def _check_fit(given: TensorSpec, wanted: TensorSpec, place: str) -> None:
    if given.dtype != wanted.dtype:
        raise InputError(f"{place}: want {wanted.dtype}, got {given.dtype} from {given.name!r}",
                         hint="put a step between them that converts")  # fmt: skip
    sizes = zip(given.shape, wanted.shape, strict=False)
    if len(given.shape) != len(wanted.shape) or any(a != b and -1 not in (a, b) for a, b in sizes):
        raise InputError(f"{place}: want shape {wanted.shape}, got {given.shape} from {given.name!r}")


def _unknown(place: str, name: str, known: Sequence[str]) -> InputError:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"want one of {', '.join(known)}"
    return InputError(f"{place}: there is no {name!r}", hint=hint)


def _same(small: Signature, large: Signature) -> Signature:
    if small.task != "classification":
        raise InputError("ensemble: cascade.small: want a classifier (its probabilities say how sure it is),"
                         f" got a model for {small.task}")  # fmt: skip
    if small.classes != large.classes:
        raise InputError(f"ensemble: cascade: want the same classes, got {small.classes} and {large.classes}")
    for kind, ours, theirs in (("reads", small.inputs, large.inputs), ("answers", small.outputs, large.outputs)):
        one, other = ([(spec.name, spec.dtype, spec.shape) for spec in specs] for specs in (ours, theirs))
        if one != other:
            raise InputError(f"ensemble: cascade: the large model {kind} {other}: want {one}, as the small one does")
    return small
