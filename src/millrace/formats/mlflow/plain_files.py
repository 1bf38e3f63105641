"""Reading a folder that others wrote: regular files only, no link followed, sizes bounded."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import yaml

from millrace.formats.mlflow.source import Problems, is_plain_path, storable

META = "meta.yaml"
VALUE_BYTES = 1 << 20  # of one tag, parameter or meta.yaml
LINE_BYTES = 4096
FOLDERS_DEEP = 64
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_FOLLOWED = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class PlainFiles:
    """What is read of a folder; the rest is noted and left out.

    Args:
        problems: Where it is noted.
    """

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, sorted; nothing where there is none."""
        try:
            mode = folder.lstat().st_mode
        except OSError:
            return []
        if stat.S_ISLNK(mode):
            self.problems.add(str(folder), "it is a symbolic link")
        if not stat.S_ISDIR(mode):
            return []
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            self.problems.add(str(folder), reason_of(error))
            return []

    def meta(self, folder: Path, what: str) -> Mapping[str, Any] | None:
        """The `meta.yaml` of a folder; None when there is none that can be read."""
        if not is_folder(folder):
            self.problems.add(what, "it is no folder: a symbolic link, or a file")
            return None
        try:
            loaded = yaml.load(self.text(folder / META), _LOADER)  # a safe loader: plain data only
            if b"\\u0000" in msgspec.json.encode(loaded):  # which refuses half characters
                raise ValueError("it has NUL characters, which cannot be stored")
        except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
            self.problems.add(what, f"its {META} cannot be read: {reason_of(error)}")
            return None
        if not isinstance(loaded, Mapping):
            self.problems.add(what, f"its {META} is no mapping")
            return None
        return loaded

    def text(self, path: Path) -> str:
        """A small text.

        Raises:
            OSError: It is no regular file, or cannot be read.
            ValueError: It is too large, or no UTF-8.
        """
        with self.open(path) as file:
            content = file.read(VALUE_BYTES + 1)
        if len(content) > VALUE_BYTES:
            raise ValueError(f"want at most {VALUE_BYTES} bytes")
        return content.decode()

    def texts(self, folder: Path, what: str) -> dict[str, str]:
        """Tags or parameters: a file each."""
        found: list[tuple[str, str]] = []
        for name in self.walk(folder, what):
            try:
                found.append((name, self.text(folder / name)))
            except (OSError, ValueError) as error:
                self.problems.add(f"{what} {name!r}", reason_of(error))
        return storable(found, what, self.problems)

    def lines(self, path: Path, what: str) -> Iterator[tuple[int, list[str]]]:
        """The words of each line with its number; empty lines are skipped."""
        try:
            with self.open(path) as file:
                number = 0
                while line := file.readline(LINE_BYTES):
                    number += 1
                    words = line.decode("utf-8", "replace").split()
                    if words:
                        yield number, words
        except OSError as error:
            self.problems.add(what, reason_of(error))

    def walk(self, folder: Path, what: str) -> Iterator[str]:
        """The paths of regular files below a folder, sorted, with forward slashes."""
        waiting = [("", 0)]
        while waiting:
            inside, depth = waiting.pop()
            below: list[tuple[str, int]] = []
            for name in self.names(folder / inside):
                path = f"{inside}/{name}" if inside else name
                try:
                    mode = (folder / path).lstat().st_mode
                except OSError as error:
                    self.problems.add(f"{what} {path!r}", reason_of(error))
                    continue
                if stat.S_ISLNK(mode) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    self.problems.add(f"{what} {path!r}", "it is a symbolic link, or no regular file")
                elif not is_plain_path(path):
                    self.problems.add(f"{what} {path!r}", "its name cannot be kept")
                elif stat.S_ISREG(mode):
                    yield path
                elif depth < FOLDERS_DEEP:
                    below.append((path, depth + 1))
                else:
                    self.problems.add(f"{what} {path!r}", "it is too deep")
            waiting += reversed(below)

    def open(self, path: Path) -> BinaryIO:
        """A regular file, never through a link; one that has another name (a hard link) may be of elsewhere.

        Raises:
            OSError: It is none, or cannot be read.
        """
        descriptor = os.open(path, _NOT_FOLLOWED)
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            os.close(descriptor)
            raise OSError(f"{path} is no regular file, or a hard link: copy it")
        return os.fdopen(descriptor, "rb")


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def reason_of(error: Exception) -> str:
    """An error in one line.

    Example:
        >>> reason_of(FileNotFoundError(2, "No such file or directory", "a"))
        'No such file or directory'
    """
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
