"""Which framework trains a spec's model and which extras that needs; light, for planning."""

from __future__ import annotations

from typing import Literal

from millrace.core.errors import InputError
from millrace.core.spec import Train

Framework = Literal["torch", "sklearn", "lightgbm"]

BUILT_IN = ("auto", "linear", "boosting")
_TREES = (("lightgbm", "sklearn"), ("onnxmltools", "sklearn"))
_SKLEARN = (("sklearn", "sklearn"), ("skl2onnx", "sklearn"), ("onnx", "sklearn"))
EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "torch": (("torch", "torch"), ("safetensors", "torch"), ("onnx", "torch")),
    "sklearn": (*_SKLEARN, *_TREES),
    "lightgbm": (*_SKLEARN, *_TREES),
}


def framework_of(train: Train) -> Framework:
    """Who trains: a model of one's own is PyTorch unless `framework` says otherwise.

    Raises:
        InputError: `model` is neither built in nor `file.py:function`, or needs another framework.

    Example:
        >>> framework_of(Train(model="model.py:build")), framework_of(Train())
        ('torch', 'sklearn')
    """
    own = ":" in train.model
    if not own and train.model not in BUILT_IN:
        raise InputError(f"train.model: want {', '.join(BUILT_IN)} or file.py:function, got {train.model!r}")
    if not own and train.framework == "torch":
        raise InputError(
            f"train.model {train.model!r} is not made with PyTorch",
            hint='give a function, for example model: "model.py:build", or leave out train.framework',
        )
    if train.framework == "lightgbm" and train.model == "linear":
        raise InputError("train.model 'linear' is not made with LightGBM", hint="leave out train.framework")
    if train.framework != "auto":
        return train.framework
    return "torch" if own else "sklearn"


def extras_of(train: Train) -> tuple[tuple[str, str], ...]:
    """The (module, extra) pairs that training and export of this spec import.

    Example:
        >>> extras_of(Train(model="model.py:build"))[0]
        ('torch', 'torch')
    """
    found = EXTRAS[framework_of(train)]
    return (*found, ("tensorboardX", "torch")) if train.tensorboard else found
