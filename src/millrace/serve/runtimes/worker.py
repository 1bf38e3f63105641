"""A model's own process: `python -m millrace.serve.runtimes.worker FD` runs a user's code for the server."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from millrace.core import extras
from millrace.core.errors import InputError, MillraceError, NotFoundError, StageError
from millrace.core.source_code import load_source
from millrace.core.types import Struct
from millrace.serve.runtimes import wire
from millrace.serve.runtimes.declared import NAMES, Declared, as_tensor, declared, example_of

_WATCH_S = 0.5
_PR_SET_PDEATHSIG = 1
_TORCH = "millrace.serve.runtimes.torch_folder:TorchFolder"
Tensors = dict[str, np.ndarray]


class Order(Struct, frozen=True, kw_only=True):
    """What to run: a class of a file, or a folder with `model.py` and `model.safetensors`."""

    path: str
    attribute: str = ""  # the class; "": the path is a folder
    threads: int = 1


class Loaded(Protocol):
    """A model in this process, loaded."""

    declared: Declared

    def predict(self, batch: Tensors) -> Mapping[str, Any]:
        """Outputs by name."""
        ...


class ClassModel:
    """A user's class: `inputs`, `outputs`, `load()`, `predict(batch)`.

    Args:
        path: The file.
        attribute: The class in it.

    Raises:
        NotFoundError: There is no such file, or no such class in it.
        InputError: The class is no service, or what it says of itself is wrong.
        Exception: Whatever the user's code raises.
    """

    def __init__(self, path: Path, attribute: str) -> None:
        if not path.is_file():
            raise NotFoundError(f"there is no file {path}", hint="name a file with a class: service.py:Class")
        sys.path.insert(0, str(path.parent))
        module = load_source(path)
        made = getattr(module, attribute, None)
        if not isinstance(made, type):
            names = sorted(name for name, value in vars(module).items() if _is_own_class(value, module.__name__))
            raise NotFoundError(f"{path.name} has no class {attribute!r}", hint=f"it has {', '.join(names) or 'none'}")
        predict = getattr(made, "predict", None)
        if not callable(predict):
            raise InputError(f"{attribute} has no predict(self, batch): want a method from tensors to tensors")
        self.declared = declared({name: getattr(made, name) for name in NAMES if hasattr(made, name)}, attribute)
        self._model: Any = made()
        if callable(getattr(self._model, "load", None)):
            self._model.load()

    def predict(self, batch: Tensors) -> Mapping[str, Any]:
        """Outputs by name."""
        return self._model.predict(batch)


def _is_own_class(value: Any, module: str) -> bool:
    return isinstance(value, type) and value.__module__ == module


def open_model(order: Order) -> Loaded:
    """Load what an order names.

    Raises:
        MillraceError: It cannot be.
        Exception: Whatever the user's code raises.
    """
    path = Path(order.path)
    if order.attribute:
        return ClassModel(path, order.attribute)
    needs = [("torch", "torch"), ("safetensors", "torch")]
    extras.require(needs, f"serving the weights in {path.name}")
    return extras.load(_TORCH)(path, order.threads)


def answer(model: Loaded, tensors: Tensors) -> Tensors:
    """One call, with the outputs that were declared.

    Raises:
        StageError: The model gave something else.
        Exception: Whatever the user's code raises.
    """
    given: Any = model.predict(tensors)
    if not isinstance(given, Mapping):
        raise StageError(f"predict must return a dict of arrays by name, got {type(given).__name__}")
    outputs: Tensors = {}
    for spec in model.declared.signature.outputs:
        if spec.name not in given:
            raise StageError(f"predict gave {', '.join(map(str, given)) or 'nothing'}: want an output {spec.name!r}")
        try:
            outputs[spec.name] = as_tensor(spec, given[spec.name], f"predict: {spec.name!r}")
        except (InputError, ValueError) as error:
            raise StageError(str(error)) from error
    return outputs


def _error(caught: BaseException, place: str) -> dict[str, Any]:
    if isinstance(caught, MillraceError):
        return caught.to_dict()
    text = f"{place} raised {type(caught).__name__}: {str(caught)[:300]}"
    return StageError(text, hint="its traceback is in the server's log").to_dict()


def _serve(sock: socket.socket) -> None:
    message, _ = wire.receive(sock)
    order = msgspec.convert(message.body, Order)
    try:
        model = open_model(order)
        example = example_of(model.declared, order.attribute or Path(order.path).name)
    except Exception as caught:  # noqa: BLE001 - a user's code may raise anything, and its name is told
        if not isinstance(caught, MillraceError):
            traceback.print_exc()
        wire.send(sock, "error", _error(caught, order.attribute or Path(order.path).name), {})
        return
    body = msgspec.to_builtins(msgspec.structs.replace(model.declared, example={}))
    wire.send(sock, "ready", body, example)
    while True:
        _, tensors = wire.receive(sock)
        try:
            outputs = answer(model, tensors)
        except Exception as caught:  # noqa: BLE001 - as above
            if not isinstance(caught, MillraceError):
                traceback.print_exc()
            wire.send(sock, "error", _error(caught, "predict"), {})
        else:
            wire.send(sock, "answer", {}, outputs)


def _end_with(parent: int) -> None:
    """Where the kernel cannot be asked, and for what this process has started itself."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _ask_kernel() -> None:
    """Die at once with the parent, even in a call that lets no thread run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """The command; ends with the socket, and with its parent."""
    if len(arguments) != 2:
        print("usage: python -m millrace.serve.runtimes.worker FD PARENT", file=sys.stderr)
        return 2
    parent = int(arguments[1])
    _ask_kernel()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    with socket.socket(fileno=int(arguments[0])) as sock:
        try:
            _serve(sock)
        except (EOFError, OSError):
            return 0  # the server has closed it
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
