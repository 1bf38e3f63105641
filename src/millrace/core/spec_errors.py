"""From text to a Spec, or to every problem at once: file:line:column, the rule, what was received.

msgspec decides; only when it refuses does `jsonschema` look for everything that is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.core.errors import InputError, NotFoundError
from millrace.core.spec import Data, Spec
from millrace.core.spec_source import MAX_SPEC_BYTES, KeyPath, Position, Problem, Source, dotted, parse_yaml, refuse
from millrace.core.units import Share, parse_duration, parse_size

SCHEMA_ID = "https://millrace.dev/schema/spec-1.json"
_SHARE_SCHEMA = {
    "type": ["string", "number"],
    "format": "millrace-share",
    "description": "a share such as 2%, 1pp or 0.02",
}
_TYPE_NAMES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def decode_hook(target: type, value: Any) -> Any:
    """Custom types of the spec for msgspec's `dec_hook`.

    Raises:
        InputError: The value is not a share.
    """
    if target is Share:
        return Share.parse(value)
    raise TypeError(f"no decoder for {target}")


def spec_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `millrace.yaml`.

    Example:
        >>> spec_schema()["$defs"]["Data"]["required"]
        ['source', 'label']
    """

    def hook(target: type) -> dict[str, Any]:
        if target is Share:
            return dict(_SHARE_SCHEMA)
        raise TypeError(str(target))

    schema = msgspec.json.schema(Spec, schema_hook=hook)
    rule = schema["$defs"]["CleanRule"]
    rule["minProperties"] = rule["maxProperties"] = 1
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}


def load_spec(path: Path, overrides: Sequence[str] = ()) -> tuple[Spec, str]:
    """Read a spec file and apply `--set` overrides.

    Returns:
        The spec, and the text of the file.

    Raises:
        NotFoundError: There is no such file.
        SpecError: Every problem of it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_SPEC_BYTES + 1)  # which parsing refuses
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no spec {path.name} in {path.parent}",
            hint="`millrace init digits FOLDER` or `millrace init --data FILE --label COLUMN` writes one",
        ) from None
    except UnicodeDecodeError as error:
        raise refuse([Problem(Position(path.name, 1, 1), "", f"not UTF-8 text: {error.reason}")]) from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the spec {str(path)!r} cannot be read: {reason}", hint="name a millrace.yaml") from None
    return parse_spec(text, path.name, overrides), text


def parse_spec(text: str, file: str = "millrace.yaml", overrides: Sequence[str] = ()) -> Spec:
    """A spec from YAML text.

    Raises:
        SpecError: Every problem, with its position and what to write instead.

    Example:
        >>> parse_spec("data: {source: rows.csv, label: y}").train.model
        'auto'
        >>> parse_spec("data: {sorce: rows.csv, label: y}")
        Traceback (most recent call last):
        ...
        millrace.core.errors.SpecError: the spec has 2 problems:
          millrace.yaml:1:7: data: the key 'source' is required
          millrace.yaml:1:8: data.sorce: unknown key (did you mean 'source'?)
    """
    source = parse_yaml(text, file)
    if source.value is None:
        source.value = {}
    if not isinstance(source.value, dict):
        raise refuse([Problem(source.position(()), "", "a spec is a mapping", describe(source.value))])
    for override in overrides:
        _apply_override(source, override)
    desugar(source.value)
    try:
        spec = msgspec.convert(source.value, Spec, dec_hook=decode_hook)
        problems = []
    except (msgspec.ValidationError, InputError) as error:
        problems = list(schema_problems(source)) or [Problem(source.position(()), "", str(error))]
        raise refuse(problems) from None
    problems = list(combination_problems(spec, source))
    if problems:
        raise refuse(problems)
    return spec


def desugar(value: dict[str, Any]) -> None:
    """Short forms of cleaning rules become mappings: `drop_duplicates`, `{drop_missing: digit}`."""
    data = value.get("data")
    rules = data.get("clean") if isinstance(data, dict) else None
    if not isinstance(rules, list):
        return
    for index, rule in enumerate(rules):
        if isinstance(rule, str):
            rules[index] = {rule: {}}
        elif isinstance(rule, dict):
            for name, arguments in rule.items():
                if arguments is None or isinstance(arguments, str) or _is_text_list(arguments):
                    rule[name] = {} if arguments is None else {"columns": arguments}


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _apply_override(source: Source, override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    position = Position(f"--set {override}", 0, 0)
    if not separator or not all(parts):
        raise refuse([Problem(position, "", "want --set section.key=value")])
    value = parse_yaml(text, position.file).value
    target = source.value
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise refuse([Problem(position, key, f"'{part}' is not a mapping")])
    target[parts[-1]] = value
    path = tuple(parts)
    source.positions[path] = position
    source.positions[(*path, "<key>")] = position


def describe(value: Any) -> str:
    """A received value, short, for a message.

    Example:
        >>> describe({"a": 1}), describe("x" * 100)[:12]
        ("a mapping with 'a'", "'xxxxxxxxxxx")
    """
    if isinstance(value, dict):
        return "a mapping with " + ", ".join(repr(key) for key in list(value)[:4]) if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def schema_problems(source: Source) -> Iterator[Problem]:
    """Everything that the JSON Schema finds wrong, for people."""
    from jsonschema import Draft202012Validator, FormatChecker

    checker = FormatChecker(formats=())

    @checker.checks("millrace-share", raises=InputError)
    def is_share(value: object) -> bool:
        Share.parse(value)  # type: ignore[arg-type]
        return True

    schema = spec_schema()
    validator = Draft202012Validator(schema, format_checker=checker)
    for error in validator.iter_errors(source.value):
        yield from _explain(error, source, ())


def _explain(error: Any, source: Source, prefix: KeyPath) -> Iterator[Problem]:
    path = prefix or tuple(error.absolute_path)
    explain = _EXPLANATIONS.get(error.validator)
    if explain is not None:
        yield from explain(error, source, path)
        return
    yield Problem(source.position(path), dotted(path), _plain_rule(error), describe(error.instance))


def _explain_additional(error: Any, source: Source, path: KeyPath) -> Iterator[Problem]:
    known = list(error.schema.get("properties", {}))
    for key in error.instance:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else "known here: " + ", ".join(sorted(known)[:16])
            where = (*path, key)
            yield Problem(source.position((*where, "<key>")), dotted(where), "unknown key", hint=hint)


def _explain_required(error: Any, source: Source, path: KeyPath) -> Iterator[Problem]:
    missing = next((key for key in error.validator_value if f"'{key}'" in error.message), "?")
    yield Problem(source.position(path), dotted(path), f"the key '{missing}' is required")


def _explain_any_of(error: Any, source: Source, path: KeyPath) -> Iterator[Problem]:
    """Descend into the alternative that is meant: the one whose JSON type fits the value."""
    deeper = [
        child
        for child in error.context
        if child.validator != "type" or len(child.absolute_path) > len(error.absolute_path)
    ]
    objects = [child for child in deeper if isinstance(error.instance, dict | list)]
    if objects:
        for child in objects:
            yield from _explain(child, source, ())
        return
    wanted = []
    for alternative in error.validator_value:
        wanted.append(_alternative(alternative))
    rule = "want " + " or ".join(dict.fromkeys(wanted))
    hint = _closest(error.instance, error.validator_value)
    yield Problem(source.position(path), dotted(path), rule, describe(error.instance), hint)


def _alternative(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    if "$ref" in schema:
        return "a mapping"
    kind = schema.get("type")
    if isinstance(kind, list):
        return schema.get("description") or " or ".join(_TYPE_NAMES[one] for one in kind)
    return _TYPE_NAMES.get(kind or "", str(kind))


def _closest(value: Any, alternatives: list[dict[str, Any]]) -> str:
    names = [str(name) for schema in alternatives for name in schema.get("enum", ())]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""


def _explain_enum(error: Any, source: Source, path: KeyPath) -> Iterator[Problem]:
    rule = "want one of " + ", ".join(str(value) for value in error.validator_value)
    hint = _closest(error.instance, [{"enum": error.validator_value}])
    yield Problem(source.position(path), dotted(path), rule, describe(error.instance), hint)


def _explain_one_rule(error: Any, source: Source, path: KeyPath) -> Iterator[Problem]:
    yield Problem(source.position(path), dotted(path), "want exactly one cleaning rule", describe(error.instance))


_EXPLANATIONS = {
    "additionalProperties": _explain_additional,
    "required": _explain_required,
    "anyOf": _explain_any_of,
    "enum": _explain_enum,
    "minProperties": _explain_one_rule,
    "maxProperties": _explain_one_rule,
}


def _plain_rule(error: Any) -> str:
    value = error.validator_value
    match error.validator:
        case "type":
            kinds = value if isinstance(value, list) else [value]
            return "want " + " or ".join(_TYPE_NAMES[kind] for kind in kinds)
        case "format":
            return "want a share between 0 and 1, such as 2%, 1pp or 0.02"
        case "pattern":
            return "want lower-case letters, digits, '.', '_' or '-', starting with a letter or digit, at most 63"
        case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
            words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
            return f"want a number {words[error.validator]} {value}"
        case "minItems" | "maxItems":
            return f"want {'at least' if error.validator == 'minItems' else 'at most'} {value} items"
    return str(error.message)


def combination_problems(spec: Spec, source: Source) -> Iterator[Problem]:
    """What is well-formed but cannot work together."""

    def problem(path: KeyPath, rule: str, received: str = "", hint: str = "") -> Problem:
        return Problem(source.position(path), dotted(path), rule, received, hint)

    if spec.data is None:
        if not spec.steps:
            yield problem((), "the key 'data' is required (or list own steps under 'steps')")
    else:
        yield from _data_problems(spec, problem)
    if spec.train.precision == "fp16" and spec.train.device == "cpu":
        yield problem(("train", "precision"), "fp16 training needs cuda or mps", "device: cpu", "use fp32 or bf16")
    yield from _step_problems(spec, problem)
    yield from _quantity_problems(spec.limits, ("limits",), problem)
    for index, step in enumerate(spec.steps):
        yield from _quantity_problems(step.limits, ("steps", index, "limits"), problem)


def _data_problems(spec: Spec, problem: Any) -> Iterator[Problem]:
    data = spec.data
    assert data is not None
    split = data.split
    if split.group and split.time:
        yield problem(("data", "split", "group"), "split by group or by time, not both", f"time: {split.time}")
    if split.stratify and data.task == "regression":
        yield problem(("data", "split", "stratify"), "only classes can be stratified", "task: regression")
    if split.stratify and (split.time or split.group):
        yield problem(("data", "split", "stratify"), "a split by time or group cannot be stratified")
    if data.label in data.ignore:
        yield problem(("data", "ignore"), "the label cannot be ignored", data.label)
    if spec.train.class_weights and data.task == "regression":
        yield problem(("train", "class_weights"), "class weights need classes", "task: regression")
    yield from _expectation_problems(data, problem)


def _expectation_problems(data: Data, problem: Any) -> Iterator[Problem]:
    for key in ("test", "validation"):
        rule = _split_rule(getattr(data.split, key))
        if rule:
            yield problem(("data", "split", key), rule, describe(getattr(data.split, key)))
    for key in ("rows", "classes"):
        value = getattr(data.expect, key)
        if isinstance(value, str) and not _is_comparison(value):
            yield problem(("data", "expect", key), "want a number or a comparison such as '>=1000'", describe(value))
    for index, rule in enumerate(data.clean):
        name, arguments = rule.chosen()
        if name == "range" and getattr(arguments, "min", None) is None and getattr(arguments, "max", None) is None:
            yield problem(("data", "clean", index), "a range needs min, max or both")


def _is_comparison(text: str) -> bool:
    digits = text.strip().lstrip("<>=!").strip()
    return digits.isdigit()


def _split_rule(value: int | float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            Share.parse(value)
        except InputError:
            return "want a number of rows or a share such as 20%"
        return ""
    if isinstance(value, bool) or value < 0 or (isinstance(value, float) and value >= 1 and value != int(value)):
        return "want a number of rows, or a share between 0 and 1"
    return ""


def _step_problems(spec: Spec, problem: Any) -> Iterator[Problem]:
    builtin = {"data", "train", "export", "evaluate", "compress", "register", "serve", "monitor"}
    names = [step.name for step in spec.steps]
    known = {*names, *(builtin if spec.data else ())}
    for index, step in enumerate(spec.steps):
        if names.count(step.name) > 1 or step.name in builtin:
            yield problem(("steps", index, "name"), "a step's name must be its own", step.name)
        for need in step.needs:
            if need not in known:
                close = difflib.get_close_matches(need, sorted(known), n=1)
                hint = f"did you mean '{close[0]}'?" if close else ""
                yield problem(("steps", index, "needs"), "want the name of a step", need, hint)
        if ":" not in step.uses and not step.uses.endswith((".py", ".sh")):
            yield problem(("steps", index, "uses"), "want file.py:function, or a .py or .sh script", step.uses)
    if _has_cycle({step.name: list(step.needs) for step in spec.steps}):
        yield problem(("steps",), "steps may not need one another in a circle")


def _has_cycle(needs: dict[str, list[str]]) -> bool:
    left = dict(needs)
    while left:
        free = [name for name, wanted in left.items() if not any(want in left for want in wanted)]
        if not free:
            return True
        for name in free:
            del left[name]
    return False


def _quantity_problems(limits: Any, path: KeyPath, problem: Any) -> Iterator[Problem]:
    for key, parse in (("memory", parse_size), ("wall_time", parse_duration)):
        value = getattr(limits, key)
        if value is not None:
            try:
                parse(value)
            except InputError as error:
                yield problem((*path, key), error.message)
