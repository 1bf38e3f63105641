"""MLflow's filter language: clauses joined by AND, over attributes, metrics, parameters, tags and datasets.

One grammar; each kind of thing that is searched has its own attributes and operators (`Language`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

from lark import Lark, LarkError, Token, Transformer

from millrace.core.errors import InputError
from millrace.core.search import Comparison, Field, Operator, Ordering
from millrace.core.types import Struct

_GRAMMAR = r"""
start: clause (_AND clause)*
clause: KEY OPERATOR value      -> compare
      | KEY LIKE text           -> compare
      | KEY _IN list            -> inside
      | KEY _NOT _IN list       -> outside
      | KEY _IS _NULL           -> null
      | KEY _IS _NOT _NULL      -> not_null
value: NUMBER -> number
     | text
?text: STRING -> string
list: "(" STRING ("," STRING)* ","? ")"
KEY: /(?:[A-Za-z_]+\.)?(?:`[^`]+`|"[^"]+"|(?!\d)[\w.]+)/
OPERATOR: "<=" | ">=" | "!=" | "=" | "<" | ">"
LIKE: /I?LIKE\b/i
_IN.2: /IN\b/i
_NOT.2: /NOT\b/i
_IS.2: /IS\b/i
_NULL.2: /NULL\b/i
_AND.2: /AND\b/i
STRING: /'(?:''|[^'])*'|"[^"]*"/
NUMBER: /[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])/
%import common.WS
%ignore WS
"""
_ENTITIES: dict[str, Field] = {
    **dict.fromkeys(("attribute", "attributes", "attr", "run"), cast(Field, "attribute")),
    **dict.fromkeys(("metric", "metrics"), cast(Field, "metric")),
    **dict.fromkeys(("parameter", "parameters", "param", "params"), cast(Field, "param")),
    **dict.fromkeys(("tag", "tags"), cast(Field, "tag")),
    **dict.fromkeys(("dataset", "datasets"), cast(Field, "dataset")),
}
NUMERIC: tuple[Operator, ...] = ("=", "!=", "<", "<=", ">", ">=")
TEXT: tuple[Operator, ...] = ("=", "!=", "LIKE", "ILIKE")
TEXT_OR_NULL: tuple[Operator, ...] = (*TEXT, "IS NULL", "IS NOT NULL")
LISTS: tuple[Operator, ...] = ("IN", "NOT IN")
MAX_LENGTH = 100_000
_ORDER = re.compile(r"\s*(?P<key>(?:\w+\.)?(?:`[^`]+`|\"[^\"]+\"|[^\s`\"']+))(?:\s+(?P<way>\w+))?\s*", re.ASCII)


class Language(Struct, frozen=True, kw_only=True):
    """What may be said about one kind of thing.

    `attributes` maps a name in the language to the name here and the type of its values; `lists` are the
    attributes that IN is for; `ordering` adds names that only an order may use.
    """

    attributes: Mapping[str, tuple[str, Literal["text", "number"]]]
    operators: Mapping[Field, tuple[Operator, ...]]
    lists: frozenset[str] = frozenset()
    ordering: Mapping[str, str] = {}
    takes_quoted_numbers: bool = False
    ordered_fields: frozenset[Field] = frozenset({"attribute"})


class _Clauses(Transformer[Any, Any]):
    """The parse tree as (key, operator, value)."""

    start = list

    def compare(self, parts: list[Any]) -> tuple[str, str, Any]:
        return str(parts[0]), str(parts[1]).upper(), parts[2]

    def inside(self, parts: list[Any]) -> tuple[str, str, Any]:
        return str(parts[0]), "IN", parts[1]

    def outside(self, parts: list[Any]) -> tuple[str, str, Any]:
        return str(parts[0]), "NOT IN", parts[1]

    def null(self, parts: list[Any]) -> tuple[str, str, Any]:
        return str(parts[0]), "IS NULL", None

    def not_null(self, parts: list[Any]) -> tuple[str, str, Any]:
        return str(parts[0]), "IS NOT NULL", None

    def value(self, parts: list[Any]) -> Any:
        return parts[0]

    def number(self, parts: list[Token]) -> float:
        return float(parts[0])

    def string(self, parts: list[Token]) -> str:
        return _unquoted(parts[0])

    def list(self, parts: list[Token]) -> tuple[str, ...]:
        return tuple(_unquoted(part) for part in parts)


_PARSER = Lark(_GRAMMAR, parser="lalr", lexer="contextual", transformer=_Clauses())


def parse_filter(text: str | None, language: Language) -> tuple[Comparison, ...]:
    """The comparisons that a filter is made of.

    Args:
        text: The filter; nothing means no condition.
        language: What may be said.

    Raises:
        InputError: It is not in the language: OR, an unquoted text, an unknown attribute, a wrong operator.

    Example:
        >>> from millrace.api.mlflow.languages import RUNS
        >>> parse_filter("metrics.acc > 0.9 and params.`my lr` = '0.1'", RUNS)[1]
        Comparison(field='param', key='my lr', operator='=', value='0.1')
    """
    if not text or not text.strip():
        return ()
    return tuple(_comparison(key, operator, value, language) for key, operator, value in _clauses(text))


@lru_cache(maxsize=256)
def _clauses(text: str) -> tuple[tuple[str, str, Any], ...]:
    if len(text) > MAX_LENGTH:
        raise InputError(f"a filter may have {MAX_LENGTH} characters, got {len(text)}")
    try:
        return tuple(cast(list[tuple[str, str, Any]], _PARSER.parse(text)))
    except (LarkError, RecursionError) as error:
        where = getattr(error, "pos_in_stream", None)
        near = f" near {text[where : where + 20]!r}" if isinstance(where, int) and where >= 0 else ""
        raise InputError(
            f"the filter cannot be read{near}; want clauses such as metrics.\"name\" > 0.5 or params.name = 'text', "
            f"joined by AND; got {text[:200]!r}"
        ) from None


def _comparison(name: str, operator: str, value: Any, language: Language) -> Comparison:
    field, key = _named(name, language, language.operators)
    kind: str = "number" if field == "metric" else "text"
    listed = True
    if field == "attribute":
        if key not in language.attributes:
            raise _unknown(key, language.attributes)
        listed = key in language.lists
        key, kind = language.attributes[key]
    if kind == "number" and language.takes_quoted_numbers and isinstance(value, str) and value.isdecimal():
        value = float(value)
    allowed = NUMERIC if kind == "number" else language.operators[field]
    if operator not in allowed or (operator in LISTS and not listed):
        raise InputError(f"the operator {operator} is not for {name}; want one of {', '.join(allowed)}")
    if operator in NUMERIC and kind == "number" and not isinstance(value, float):
        raise InputError(f"{name} is compared with a number, got {value!r}")
    if kind == "text" and isinstance(value, float):
        raise InputError(f"{name} is compared with a quoted text, got the number {value:g}")
    return Comparison(field=field, key=key, operator=cast(Operator, operator), value=value)


def parse_order(clauses: Sequence[str] | None, language: Language) -> tuple[Ordering, ...]:
    """The keys of an order, each `key`, `key ASC` or `key DESC`.

    Raises:
        InputError: A clause cannot be read, names an unknown key, or names one twice.

    Example:
        >>> from millrace.api.mlflow.languages import RUNS
        >>> parse_order(["metrics.`a b` DESC"], RUNS)
        (Ordering(field='metric', key='a b', descending=True),)
    """
    found: list[Ordering] = []
    for clause in clauses or ():
        match = _ORDER.fullmatch(clause) if len(clause) < 1000 else None
        way = (match["way"] or "asc").lower() if match else ""
        if match is None or way not in ("asc", "desc"):
            raise InputError(f"want an order such as metrics.name DESC, got {clause[:200]!r}")
        field, key = _named(match["key"], language, language.ordered_fields)
        if field == "attribute":
            names = {**{name: one[0] for name, one in language.attributes.items()}, **language.ordering}
            if key not in names:
                raise _unknown(key, names)
            key = names[key]
        if any((one.field, one.key) == (field, key) for one in found):
            raise InputError(f"the order names {match['key']} twice")
        found.append(Ordering(field=field, key=key, descending=way == "desc"))
    return tuple(found)


def _named(name: str, language: Language, fields: Any) -> tuple[Field, str]:
    """Which field, and the key without its quotes."""
    entity, dot, key = name.partition(".")
    if name[0] in '`"' or not dot:
        entity, key = "attribute", name
    field = _ENTITIES.get(entity)
    if field is None or field not in fields:
        known = ", ".join(sorted(fields))
        raise InputError(f"{name!r} names no {known} that can be used here")
    if not key:
        raise InputError(f"{name!r} has no key after the dot")
    key = _unquoted(key) if key[0] in '`"' else key
    if field == "dataset" and key not in ("name", "digest", "context"):
        raise _unknown(key, ("name", "digest", "context"))
    return field, key


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    return inner.replace("''", "'") if text[0] == "'" else inner


def _unknown(key: str, known: Any) -> InputError:
    return InputError(f"there is no attribute {key!r}; want one of {', '.join(sorted(known))}")
