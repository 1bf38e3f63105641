"""The same requests to two servers, and where their answers differ. What ids, times and words are does not count.

python tests/api/mlflow/differences.py http://127.0.0.1:5000 http://127.0.0.1:5001
"""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import differences_registry
import differences_tracking

STEPS = [*differences_tracking.STEPS, *differences_registry.STEPS]

JSON = {"Content-Type": "application/json"}
# Times, words for people, and what only one of the two says.
IGNORED = {
    "message", "sqlstate", "error_class", "last_update_time", "creation_time", "creation_timestamp", "workspace",
    "last_updated_timestamp", "creation_timestamp_ms", "last_updated_timestamp_ms", "next_page_token",
}  # fmt: skip
_LONG = re.compile(r"(.)\1{99,}")
HEX = re.compile(r"(?:m-)?[0-9a-f]{32}")


class Server:
    """One server, with the ids that it gave by the names they were given here."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.names: dict[str, str] = {}

    def send(self, method: str, path: str, body: Any = None, raw: bytes | None = None) -> tuple[int, Any]:
        """Status and answer; `{name}` in the path and body stands for an id of this server."""
        path = self._filled(path)
        headers: dict[str, str] = {}
        data = raw
        if body is not None and method == "GET":
            pairs = [(key, one) for key, value in self._filled(body).items() for one in _listed(value)]
            path += "?" + urllib.parse.urlencode(pairs)
        elif body is not None:
            data, headers = json.dumps(self._filled(body)).encode(), JSON
        elif raw is not None and "/mlflow-artifacts/" not in path:
            headers = JSON
        if method == "POST" and data is None:
            data, headers = b"{}", JSON
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _decoded(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error.read())

    def _filled(self, value: Any) -> Any:
        if isinstance(value, str):
            for name, id in self.names.items():
                value = value.replace("{" + name + "}", id)
            return value
        if isinstance(value, dict):
            return {key: self._filled(one) for key, one in value.items()}
        return [self._filled(one) for one in value] if isinstance(value, list) else value

    def normal(self, value: Any) -> Any:
        """An answer with names for ids, without what does not count."""
        if isinstance(value, dict):
            done = {key: self.normal(one) for key, one in sorted(value.items()) if key not in IGNORED}
            return {key: one for key, one in done.items() if one not in ([], {}, "", False)}  # absent means the same
        if isinstance(value, list):
            done = [self.normal(one) for one in value]
            return sorted(done, key=lambda one: one["key"]) if done and _has_keys(done) else done
        if isinstance(value, str):
            return _LONG.sub(lambda match: f"{match[1]}*{len(match[0])}", HEX.sub(self._name, value))
        return value

    def _name(self, match: re.Match[str]) -> str:
        for name, id in self.names.items():
            if id == match[0]:
                return "{" + name + "}"
        return "{?}"


def _has_keys(values: list[Any]) -> bool:
    return all(isinstance(one, dict) and "key" in one for one in values)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data) if data else None
    except ValueError:
        return data[:200].decode(errors="replace")


def compare(left: Server, right: Server, steps: list[tuple[Any, ...]]) -> Iterator[tuple[str, Any, Any]]:
    """Run every step on both; yield those that differ as (step, left, right).

    A step is (method, path, body, {name: path in the answer}?, raw bytes?).
    """
    for step in steps:
        method, path, body, *more = step
        named: dict[str, str] = next((one for one in more if isinstance(one, dict)), {})
        raw = next((one for one in more if isinstance(one, bytes)), None)
        answers = []
        for server in (left, right):
            status, answer = server.send(method, path, body, raw)
            for name, where in named.items():
                found = answer
                for part in where.split("."):
                    found = found[int(part) if part.isdigit() else part] if found and part in found else None
                server.names[name] = str(found)
            answers.append((status, server.normal(answer)))
        if answers[0] != answers[1]:
            yield f"{method} {path} {json.dumps(body)[:300]}", answers[0], answers[1]


def differing(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """The places where two answers differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            yield from differing(left.get(key), right.get(key), f"{where}.{key}")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differing(one, other, f"{where}.{index}")
    elif left != right:
        yield f"  {where or '.'}: {json.dumps(left)[:400]}\n    {'':{len(where)}}{json.dumps(right)[:400]}"


def main() -> int:
    """Print the differences."""
    count = 0
    for step, left, right in compare(Server(sys.argv[1]), Server(sys.argv[2]), STEPS):
        count += 1
        print(f"--- {step}", *differing(left, right), sep="\n")
    print(f"{count} of {len(STEPS)} differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
