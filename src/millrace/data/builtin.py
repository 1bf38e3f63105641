"""Built-in sets: `data.source: builtin:iris` and its like, real data that scikit-learn brings along. Light.

Nothing is downloaded. The bytes of the bundled files enter the data step's cache key.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from millrace.core import extras
from millrace.core.errors import DataError
from millrace.core.facts import Task
from millrace.data.naming import did_you_mean

PREFIX = "builtin:"


class Builtin(NamedTuple):
    """A set: the column to predict, what kind of task that is, and the bundled files it is read from."""

    label: str
    task: Task
    files: tuple[str, ...]


BUILTINS = {
    "breast_cancer": Builtin("diagnosis", "classification", ("breast_cancer.csv",)),
    "diabetes": Builtin("progression", "regression", ("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz")),
    "digits": Builtin("digit", "classification", ("digits.csv.gz",)),
    "iris": Builtin("species", "classification", ("iris.csv",)),
    "wine": Builtin("cultivar", "classification", ("wine_data.csv",)),
}


def builtin_of(source: str | list[str]) -> str | None:
    """The name of the built-in set that a source means; None where it means files.

    Raises:
        DataError: There is no such set (with did-you-mean), or it stands in a list.

    Example:
        >>> builtin_of("builtin:iris"), builtin_of("iris.csv")
        ('iris', None)
        >>> builtin_of("builtin:irsi")
        Traceback (most recent call last):
        millrace.core.errors.DataError: data.source 'builtin:irsi': there is no built-in set 'irsi'
    """
    listed = [source] if isinstance(source, str) else list(source)
    named = [one for one in listed if one.startswith(PREFIX)]
    if not named:
        return None
    name = named[0].removeprefix(PREFIX)
    if name not in BUILTINS:
        raise DataError(
            f"data.source {named[0]!r}: there is no built-in set {name!r}",
            hint=did_you_mean(name, list(BUILTINS), "built-in sets"),
        )
    if len(listed) > 1:
        raise DataError(
            f"data.source lists {named[0]!r} with {len(listed) - 1} more: a built-in set stands alone",
            hint=f"write `source: {named[0]}`",
        )
    return name


def bundled_files(name: str) -> list[Path]:
    """Where a set's files are; scikit-learn is not imported for it.

    Args:
        name: A key of `BUILTINS`.

    Raises:
        ExtraMissingError: scikit-learn is not installed.
        DataError: This release of scikit-learn does not bring them.

    Example:
        >>> [path.name for path in bundled_files("iris")]
        ['iris.csv']
    """
    extras.require([("sklearn", "sklearn")], f"the built-in set {name}")
    found = importlib.util.find_spec("sklearn")
    places = list(found.submodule_search_locations or []) if found else []
    files = [Path(place) / "datasets" / "data" / file for place in places for file in BUILTINS[name].files]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(
            f"the built-in set {name} is not in scikit-learn {extras.version_of('scikit-learn')}: no {missing}",
            hint="install another release of scikit-learn, or name a file in data.source",
        )
    return files
