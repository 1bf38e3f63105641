"""The digests of a user's file and of every local module that it imports: part of the cache key; light."""

from __future__ import annotations

import ast
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from millrace.core.errors import InputError, NotFoundError
from millrace.core.ids import digest_bytes

# threads that parse at once may break one another's depth: https://github.com/python/cpython/issues/106905
_PARSING = threading.Lock()


def code_digests(ref: str, project_dir: Path) -> dict[str, str]:
    """The digest of every file whose change may change what `ref` does.

    Imports are followed through the source, without running it: `import helper`, `from package.part
    import name`, relative ones, and those inside functions. Only files below the folder count.

    Args:
        ref: `model.py:build`, or a file alone.
        project_dir: The folder of the spec.

    Returns:
        Relative path with forward slashes → `sha256:…`, sorted by path.

    Raises:
        NotFoundError: The file does not exist.
        InputError: It lies outside the folder, or a file of it is not Python.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.py").write_text("import layers, json")
        >>> _ = (folder / "layers.py").write_text("size = 3")
        >>> sorted(code_digests("model.py:build", folder))
        ['layers.py', 'model.py']
    """
    root = project_dir.resolve()
    first = (root / ref.partition(":")[0]).resolve()
    if not first.is_relative_to(root):
        raise InputError(f"{ref} lies outside the folder of the spec", hint="keep the code beside the spec")
    if not first.is_file():
        raise NotFoundError(
            f"there is no file {first.name} in {first.parent}", hint="correct the name before the colon"
        )
    found: dict[str, str] = {}
    waiting = deque([first])
    while waiting:
        path = waiting.popleft()
        name = path.relative_to(root).as_posix()
        if name in found:
            continue
        source = path.read_bytes()
        found[name] = digest_bytes(source)
        waiting.extend(_local_imports(_parse(source, name), path, root, first.parent))
    return dict(sorted(found.items()))


def _parse(source: bytes, name: str) -> ast.Module:
    try:
        with _PARSING:
            return ast.parse(source, filename=name)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(
            f"{name}:{line}: not Python: {getattr(error, 'msg', error)}", hint="correct that line"
        ) from error


def _local_imports(tree: ast.Module, path: Path, root: Path, script_dir: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(alias.name.split("."), [script_dir, root], root)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            places = [path.parents[node.level - 1]] if 0 < node.level <= len(path.parents) else [script_dir, root]
            yield from _module_files(parts, places, root)
            for alias in node.names:  # the name may be a module of the package
                yield from _module_files([*parts, alias.name], places, root)


def _module_files(parts: list[str], places: list[Path], root: Path) -> Iterator[Path]:
    """The files that importing a dotted name executes: each package's `__init__` and the module."""
    for place in places:
        for end in range(1, len(parts) + 1):
            stem = place.joinpath(*parts[:end])
            for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
                if path.is_file() and path.resolve().is_relative_to(root):
                    yield path.resolve()
