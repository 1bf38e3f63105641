"""Which files of a spec's folder travel to another machine."""

from __future__ import annotations

import os
from pathlib import Path

from millrace.core.errors import InputError

MAX_PROJECT_BYTES = 2 << 30
LEFT_AT_HOME = frozenset({"report.html", "__pycache__", "node_modules"})  # and names that begin with a dot


def project_files(folder: Path) -> list[Path]:
    """What a run may need: regular files, sorted, without hidden ones, caches and earlier reports.

    Raises:
        InputError: They are more than 2 GiB.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "model.py").write_text(""), (Path(folder) / ".env").write_text("")
        ...     [path.name for path in project_files(Path(folder))]
        ['model.py']
    """
    found, size = [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in LEFT_AT_HOME)
        for name in names:
            path = Path(root) / name
            if name.startswith(".") or name in LEFT_AT_HOME or not path.is_file():
                continue
            size += path.stat().st_size
            found.append(path)
    if size > MAX_PROJECT_BYTES:
        raise InputError(
            f"{folder} has {size >> 20} MiB to upload, at most {MAX_PROJECT_BYTES >> 20} are",
            hint="put the data where the server can read it, and name that place in data.source",
        )
    return sorted(found)
