"""Modules of users, always as they stand in the file: compiled code that Python has kept may be of an earlier one.

Python takes what it kept when the file's size and its time, in whole seconds, are the same. Files of archives have one
time all, and a change may keep the size: the code that is counted and the code that runs would differ.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from millrace.core.errors import InputError


class _FreshLoader(SourceFileLoader):
    """Neither reads nor writes compiled code."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def load_source(path: Path) -> ModuleType:
    """A module from a file, named after it; modules beside it are fresh too, once their folder is on `sys.path`.

    Raises:
        InputError: It is not a Python file.
        Exception: Whatever the code raises.
    """
    if path.suffix != ".py":
        raise InputError(f"{path.name} is not a Python file: want a .py file")
    loaders = [(ExtensionFileLoader, EXTENSION_SUFFIXES), (_FreshLoader, [".py"])]
    sys.path_importer_cache[str(path.parent)] = FileFinder(str(path.parent), *loaders)
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=_FreshLoader(path.stem, str(path)))
    assert spec is not None  # a loader is given
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
