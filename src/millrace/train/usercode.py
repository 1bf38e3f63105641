"""A user's own model: loading `model.py:build` and what its function is given."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from millrace.core.errors import InputError, NotFoundError
from millrace.core.facts import Task
from millrace.core.ports import Context
from millrace.core.source_code import load_source
from millrace.core.spec import Spec
from millrace.formats.dataset import DatasetReader
from millrace.formats.feed import Feed, open_feed
from millrace.train.code_digest import code_digests
from millrace.train.preprocess import Preprocess


def load_function(reference: str, project_dir: Path) -> Callable[..., Any]:
    """The function that `model.py:build` names; the file may import others beside it.

    Args:
        reference: `file.py:function`.
        project_dir: The folder of the spec.

    Raises:
        NotFoundError: There is no such file.
        InputError: The file is not Python, has no such function, or imports what is not installed.
            An error of the user's own code while it is imported passes through as it is.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.py").write_text("def build(ctx):\\n    return 3\\n")
        >>> load_function("model.py:build", folder)(None)
        3
    """
    file, _, name = reference.partition(":")
    path = (project_dir / file).resolve()
    if not path.is_file():
        raise NotFoundError(f"train.model: there is no file {file} in {project_dir}", hint="correct the name")
    _make_importable([project_dir.resolve(), path.parent], code_digests(file, project_dir))
    module = _load_module(path, file)
    function = getattr(module, name, None)
    if not callable(function):
        functions = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        near = difflib.get_close_matches(name, functions, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(functions) or 'no function'}"
        raise InputError(f"{file}: train.model wants a function {name!r}, which is not there", hint=hint)
    return function


_FOLDERS: set[str] = set()  # from which this process has loaded users' code


def _make_importable(folders: list[Path], files: Iterable[str]) -> None:
    """Put the folders first, and forget equally named files of other folders or of an earlier state."""
    _FOLDERS.update(str(folder) for folder in folders)
    for folder in map(str, folders):
        sys.path[:] = [folder, *(other for other in sys.path if other != folder)]
    names = {part for file in files for part in _module_names(file)}
    for name in names & sys.modules.keys():
        if str(Path(getattr(sys.modules[name], "__file__", None) or "/").parent).startswith(tuple(_FOLDERS)):
            del sys.modules[name]


def _module_names(file: str) -> Iterable[str]:
    """`a/b.py` may be imported as `a.b`, or as `b` from its own folder."""
    parts = [part for part in file.removesuffix(".py").split("/") if part != "__init__"]
    return (".".join(parts[start:]) for start in range(len(parts)))


def _load_module(path: Path, file: str) -> ModuleType:
    try:
        return load_source(path)
    except SyntaxError as error:
        where = Path(error.filename or file).name
        raise InputError(f"{where}:{error.lineno}: {error.msg}", hint="correct that line") from error
    except ModuleNotFoundError as error:
        hint = f"install {error.name}, or put {error.name}.py beside {file}"
        raise InputError(f"{file}:{_last_line(error, path)}: {error.msg}", hint=hint) from error


def _last_line(error: BaseException, path: Path) -> int:
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


class ModelContext:
    """What `build(ctx)` and `train(ctx)` are given.

    Attributes:
        seed: The run's seed.
        task: classification or regression.
        classes: How many classes there are; 0 for regression.
        class_names: Their names, in the order of the outputs.
        outputs: What the last layer must give: the classes, or 1.
        features: How many numbers one row is.
        image_shape: (channels, height, width) of an image, else None.
        params: `train.params` of the spec.
        device: cpu, cuda or mps.
        threads: How many threads to use.
        checkpoints: A folder that survives kills of this step, for `train(ctx)`.
        train: The spec's `train` section.
        preprocess: How raw tensors become features.
    """

    def __init__(self, spec: Spec, ctx: Context, reader: DatasetReader, preprocess: Preprocess, device: str) -> None:
        manifest = reader.manifest
        self._ctx = ctx
        self.preprocess = preprocess
        self._folder = reader.folder
        self.train = spec.train
        self.seed = ctx.seed
        self.task: Task = manifest.task
        self.classes = len(manifest.classes)
        self.class_names = list(manifest.classes)
        self.outputs = self.classes or 1
        shape = preprocess.shape
        self.features = int(np.prod(shape))
        self.image_shape = tuple(shape) if len(shape) == 3 else None
        self.params: dict[str, Any] = dict(spec.train.params)
        self.device = device
        self.threads = ctx.threads
        self.checkpoints = ctx.checkpoints
        self.project_dir = ctx.project_dir

    def feed(self, split: str) -> Feed:
        """A split's raw tensors (memory-mapped) and answers."""
        return open_feed(self._folder, split, self._ctx.scratch / "feed")

    def data(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """A split as the model sees it.

        Args:
            split: train, validation or test.

        Returns:
            float32 features [rows, features] or [rows, channels, height, width]; answers: int64 class
            indices or float32 values.
        """
        feed = self.feed(split)
        return self.preprocess.transform(feed.arrays), np.array(feed.labels)

    @property
    def cancelled(self) -> bool:
        """True once the run is being cancelled: save what you need and return."""
        return self._ctx.cancelled

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        """Record one point; cheap."""
        self._ctx.log_metric(name, float(value), step)

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far the training is."""
        self._ctx.progress(done, total, text)


def is_full_control(reference: str) -> bool:
    """Whether the function trains by itself: its name is `train` or starts with `train_`.

    Example:
        >>> is_full_control("model.py:train"), is_full_control("model.py:build")
        (True, False)
    """
    name = reference.partition(":")[2]
    return name == "train" or name.startswith("train_")
