"""Reading YAML 1.2 with the position of every value; no tags, no bombs, no surprises.

`1e-3` is a number, `no` is a string, dates are strings, duplicate keys are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from millrace.core.errors import SpecError

MAX_SPEC_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 40
TOO_MUCH = f"a spec may have {MAX_NODES} values, {MAX_DEPTH} deep, at most"
KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL_FLOAT = re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


@dataclass(frozen=True)
class Position:
    """Where a value stands; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass
class Problem:
    """One thing that is wrong with a spec."""

    position: Position
    key: str
    rule: str
    received: str = ""
    hint: str = ""

    def __str__(self) -> str:
        received = f", got {self.received}" if self.received else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.position}: {self.key + ': ' if self.key else ''}{self.rule}{received}{hint}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "file": self.position.file,
            "line": self.position.line,
            "column": self.position.column,
            "key": self.key,
            "rule": self.rule,
            "received": self.received,
            "hint": self.hint,
        }


def refuse(problems: list[Problem]) -> SpecError:
    """The error that shows every problem at once, in the order of the file."""
    ordered = sorted(problems, key=lambda problem: (problem.position.line, problem.position.column))
    count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    lines = "\n".join(f"  {problem}" for problem in ordered)
    return SpecError(
        f"the spec has {count}:\n{lines}", details={"problems": [problem.to_dict() for problem in ordered]}
    )


class _TooManyError(yaml.MarkedYAMLError):
    """More than any spec has; half a minute's work if all of it were read."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only; scalars are resolved here by the YAML 1.2 core schema."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One more node; many are refused before they are all made."""
        self.composed += 1
        if self.composed > 2 * MAX_NODES:  # keys are nodes too
            raise _TooManyError(problem=TOO_MUCH, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


@dataclass
class Source:
    """A parsed YAML file: plain values and the position of each."""

    file: str
    value: Any
    positions: dict[KeyPath, Position] = field(default_factory=dict)

    def position(self, path: KeyPath) -> Position:
        """The position of the value at `path`, or of its nearest parent."""
        for length in range(len(path), -1, -1):
            found = self.positions.get(path[:length])
            if found is not None:
                return found
        return Position(self.file, 1, 1)


def parse_yaml(text: str, file: str) -> Source:
    """Parse YAML with positions.

    Args:
        text: The file's text.
        file: Its name, for messages.

    Raises:
        SpecError: Not YAML, a tag, a duplicate key, or larger than any spec may be.

    Example:
        >>> source = parse_yaml("a: 1e-3\\nb: [no, 07]\\n", "x.yaml")
        >>> source.value, str(source.position(("b", 1)))
        ({'a': 0.001, 'b': ['no', 7]}, 'x.yaml:2:9')
    """
    if len(text.encode()) > MAX_SPEC_BYTES:
        raise refuse([Problem(Position(file, 1, 1), "", f"a spec may have {MAX_SPEC_BYTES} bytes at most")])
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise refuse([_yaml_problem(error, file)]) from None
    source = Source(file, None)
    if node is not None:
        source.value = _Walk(source).convert(node, (), 0)
    return source


def _yaml_problem(error: Exception, file: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    detail = getattr(error, "problem", None) or getattr(error, "reason", None) or "nested too deeply"
    rule = detail if isinstance(error, _TooManyError) else f"not valid YAML: {detail}"
    return Problem(Position(file, line, column), "", rule)


class _Walk:
    """Turns nodes into values; aliases count every time they are used, so bombs end early."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._nodes = 0

    def convert(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        position = Position(self._source.file, node.start_mark.line + 1, node.start_mark.column + 1)
        self._source.positions.setdefault(path, position)
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise refuse([Problem(position, "", TOO_MUCH)])
        if isinstance(node, yaml.ScalarNode):
            self._check_tag(node, position, implicit=node.style is not None)
            text = _text(node.value, position)
            return _scalar(text) if node.style is None and not node.tag.startswith("!") else text
        self._check_tag(node, position, implicit=True)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, path, depth)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            position = Position(self._source.file, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise refuse([Problem(position, "", "a key must be text")])
            key = _text(key_node.value, position)
            if key in result:
                raise refuse([Problem(position, dotted((*path, key)), "a key may stand only once in a mapping")])
            result[key] = self.convert(value_node, (*path, key), depth + 1)
            self._source.positions[(*path, key)] = Position(
                self._source.file, value_node.start_mark.line + 1, value_node.start_mark.column + 1
            )
            self._source.positions[(*path, key, "<key>")] = position
        return result

    def _check_tag(self, node: yaml.Node, position: Position, *, implicit: bool) -> None:
        plain = {*_CORE_TAGS, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}
        if node.tag not in plain:
            raise refuse([Problem(position, "", "tags are not allowed in a spec", node.tag)])


def _text(value: str, position: Position) -> str:
    """JSON's escaped surrogate pairs become characters; a lone half is refused."""
    if value.isascii():
        return value
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise refuse([Problem(position, "", "half a surrogate pair is not text")]) from None


def dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _scalar(text: str) -> Any:
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.match(text):
        return int(text) if len(text) < 20 else float(text)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL_FLOAT.match(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan").replace(".Inf", "inf").replace(".NaN", "nan"))
    return text
