"""What names and values may be, as MLflow has it."""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec

from millrace.core.errors import InputError

KEY_CHARS = 250
PARAM_CHARS = 6000
TAG_CHARS = 8000
EXPERIMENT_NAME_CHARS = 500
EXPERIMENT_TAG_CHARS = 20_000
MODEL_TAG_CHARS = 100_000
MODEL_NAME_CHARS = 256
ALIAS_CHARS = 255
BATCH_METRICS = 1000
BATCH_PAIRS = 100
BATCH_ALL = 1000
PATH_CHARS = 1000
RESULTS = 50_000
_INT64 = 2**63
_KEY = re.compile(r"[/\w.\- :]+")
_ALIAS = re.compile(r"[\w\-]+")
_RESERVED_ALIAS = re.compile(r"[vV]\d+|latest", re.IGNORECASE)
T = TypeVar("T")


def required(value: T | None, name: str) -> T:
    """The value of a field that must be there.

    Raises:
        InputError: It is absent or empty.
    """
    if value is None or value == "":
        raise InputError(f"the parameter {name!r} is missing")
    return value


def run_id_of(body: Any) -> str:
    """The run that a request is about, under either name of the field."""
    return required(body.run_id or body.run_uuid, "run_id")


@lru_cache(maxsize=4096)
def key(name: str | None, what: str) -> str:
    """The name of a metric, parameter or tag.

    Raises:
        InputError: It is absent, too long, has other characters, or is not a normal relative path.

    Example:
        >>> key("train/loss", "metric"), key("../x", "metric")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: a metric's name must be a normal relative path, got '../x'
    """
    name = required(name, f"key of a {what}")
    if not _KEY.fullmatch(name):
        allowed = "letters, digits, '_', '-', '.', ' ', ':' and '/'"
        raise InputError(f"a {what}'s name may have {allowed}, got {name[:300]!r}")
    normal = posixpath.normpath(name)
    if normal != name or normal == "." or normal.startswith(("..", "/")):
        raise InputError(f"a {what}'s name must be a normal relative path, got {name[:300]!r}")
    return within(name, KEY_CHARS, f"a {what}'s name")


def within(text: str, limit: int, what: str) -> str:
    """A text of at most `limit` characters.

    Raises:
        InputError: It is longer.
    """
    if len(text) > limit:
        raise InputError(f"{what} may have {limit} characters, got {len(text)}")
    return text


def tags(given: Mapping[str, str], limit: int) -> dict[str, str]:
    """Tags of experiments and models: their names and lengths checked."""
    return {key(name, "tag"): within(value, limit, f"the tag {name!r}") for name, value in given.items()}


def int64(value: int, name: str) -> int:
    """A number of 64 bits.

    Raises:
        InputError: It needs more.
    """
    if not -_INT64 <= value < _INT64:
        raise InputError(f"{name} must fit into 64 bits, got {value}")
    return value


def seconds(milliseconds: int, name: str) -> float:
    """A time of the protocol in seconds since 1970."""
    return int64(milliseconds, name) / 1000


def millis(seconds_: float) -> int:
    """A time in the protocol's milliseconds.

    Example:
        >>> millis(1_700_000_000.123)
        1700000000123
    """
    return round(seconds_ * 1000)


def page_size(asked: int | None, default: int, most: int) -> int:
    """How many results a page has.

    Raises:
        InputError: Fewer than one or more than `most` are asked for.
    """
    size = default if asked is None else asked
    if not 1 <= size <= most:
        raise InputError(f"max_results must be from 1 to {most}, got {size}")
    return size


def encode_token(value: Any) -> str:
    """A page token.

    Example:
        >>> decode_token(encode_token(100), int)
        100
    """
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode()


def decode_token(token: str | None, kind: Any) -> Any:
    """What a page token says; None where there is no token.

    Raises:
        InputError: It is not one of ours.
    """
    if not token:
        return None
    try:
        value = msgspec.json.decode(base64.urlsafe_b64decode(token), type=kind)
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise InputError(f"the page token {token[:100]!r} is not one that this server gave") from None
    if isinstance(value, int) and not 0 <= value < _INT64:
        raise InputError(f"the page token {token[:100]!r} is not one that this server gave")
    return value


def experiment_id(text: str) -> str:
    """An experiment's id in its normal form.

    Raises:
        InputError: It is not a number.

    Example:
        >>> experiment_id("007")
        '7'
    """
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InputError(f"an experiment's id is a number, got {text[:100]!r}")
    return str(int(text))


def experiment_name(name: str | None) -> str:
    """An experiment's name."""
    return within(required(name, "name"), EXPERIMENT_NAME_CHARS, "an experiment's name")


def model_name(name: str | None) -> str:
    """A registered model's name.

    Raises:
        InputError: It is blank, has a '/' or ':', or would be another path.
    """
    name = required(name, "name")
    normal = posixpath.normpath(name)
    if not name.strip() or any(char in name for char in "/:") or normal != name or normal.startswith(".."):
        raise InputError(f"a model's name must not be blank or a path, nor have '/' or ':', got {name[:300]!r}")
    return within(name, MODEL_NAME_CHARS, "a model's name")


def version_number(version: str | int | None) -> int:
    """A version's number, which travels as a text.

    Raises:
        InputError: It is not a number.
    """
    text = str(required(version, "version"))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InputError(f"a version is a number, got {text[:100]!r}")
    return int(text)


def alias_name(alias: str | None, *, is_new: bool = False) -> str:
    """An alias; a new one must not look like a version or mean the latest.

    Raises:
        InputError: It has other characters, is too long, or is reserved.
    """
    alias = required(alias, "alias")
    if not _ALIAS.fullmatch(alias):
        raise InputError(f"an alias may have letters, digits, '_' and '-', got {alias[:300]!r}")
    if is_new and _RESERVED_ALIAS.fullmatch(alias):
        raise InputError(f"the alias {alias!r} is reserved: it reads as a version")
    return within(alias, ALIAS_CHARS, "an alias")


def fully_unquoted(text: str) -> str:
    """Percent-decoded until nothing changes.

    Example:
        >>> fully_unquoted("%252e%252e")
        '..'
    """
    for _ in range(8):
        decoded = unquote(text)
        if decoded == text:
            return text
        text = decoded
    raise InputError("the path is percent-encoded too often")


def safe_path(path: str) -> str:
    """A file's path below its owner: relative, normal, whatever it is decoded to.

    Args:
        path: Decoded once, as the request line is.

    Raises:
        InputError: It is absolute, leaves its folder, or has a backslash or control characters.

    Example:
        >>> safe_path("model/MLmodel")
        'model/MLmodel'
        >>> safe_path("a/%2e%2e/b")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: the path 'a/%2e%2e/b' is not allowed: it must stay below its folder
    """
    for form in (path, fully_unquoted(path)):
        bad = "\\" in form or any(ord(char) < 32 or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in form)
        if bad or form.startswith("file:") or any(part in ("", ".", "..") for part in form.split("/")):
            raise InputError(f"the path {path[:300]!r} is not allowed: it must stay below its folder")
    return within(path, PATH_CHARS, "a path")
