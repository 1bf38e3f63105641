"""Lines per room, the largest file, the longest function, the share of imports inside functions.

.venv/bin/python scripts/sizes.py
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src/millrace"
FILE_LINES = 600
FUNCTION_LINES = 80
HIDDEN_IMPORTS = 0.02
ROOM_LINES = 16_000  # the aim is 3,000: control, serve and api are to be split further
PACKAGE_LINES = 85_000


@dataclass(frozen=True)
class Function:
    """A function and its length in lines, decorators and docstring included."""

    where: str
    lines: int


@dataclass
class Room:
    """A folder of the package, or its top-level files together."""

    name: str
    files: dict[str, int] = field(default_factory=dict)  # path → lines
    functions: list[Function] = field(default_factory=list)
    imports: int = 0
    hidden: list[str] = field(default_factory=list)  # imports inside functions, "path:line"

    @property
    def lines(self) -> int:
        """Lines of all files."""
        return sum(self.files.values())


def measure(source: Path = SOURCE) -> list[Room]:
    """Every room of the package, largest first."""
    rooms: dict[str, Room] = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).parts
        room = rooms.setdefault(parts[0] if len(parts) > 1 else "(top)", Room(parts[0] if len(parts) > 1 else "(top)"))
        read(path, "/".join(parts), room)
    return sorted(rooms.values(), key=lambda room: -room.lines)


def read(path: Path, name: str, room: Room) -> None:
    """Add one file to its room."""
    text = path.read_text(encoding="utf-8")
    room.files[name] = len(text.splitlines())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            room.functions.append(Function(f"{name}:{node.name}", (node.end_lineno or first) - first + 1))
    outside = imports(tree, inside=False)
    hidden = imports(tree, inside=True)
    room.imports += len(outside) + len(hidden)
    room.hidden += [f"{name}:{line}" for line in sorted(hidden)]


def imports(node: ast.AST, *, inside: bool, within: bool = False) -> list[int]:
    """Lines of import statements inside functions, or of those outside."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            if within == inside:
                found.append(child.lineno)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found += imports(child, inside=inside, within=within or is_function)
    return found


def main() -> int:
    """Print the table."""
    rooms = measure()
    print(f"{'room':<10} {'files':>5} {'lines':>6}  {'largest file':<38} {'longest function':<52} hidden imports")
    for room in rooms:
        largest = max(room.files, key=lambda name: room.files[name])
        longest = max(room.functions, key=lambda one: one.lines, default=Function("-", 0))
        share = len(room.hidden) / max(room.imports, 1)
        file_text, function_text = f"{room.files[largest]:>4} {largest}", f"{longest.lines:>3} {longest.where}"
        row = f"{room.name:<10} {len(room.files):>5} {room.lines:>6}  {file_text:<38} {function_text:<52}"
        print(f"{row} {len(room.hidden)}/{room.imports} ({share:.1%})")
    hidden, total = sum(len(room.hidden) for room in rooms), sum(room.imports for room in rooms)
    lines = sum(room.lines for room in rooms)
    print(f"\n{lines} lines (bound {PACKAGE_LINES}), hidden imports {hidden}/{total} ({hidden / max(total, 1):.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
