"""How much each class counts while training."""

from __future__ import annotations

import numpy as np

from millrace.core.errors import InputError


def class_weights(wanted: str | dict[str, float] | None, classes: list[str], labels: np.ndarray) -> np.ndarray | None:
    """A weight for each class.

    Args:
        wanted: The spec's `class_weights`.
        classes: In the order of the outputs.
        labels: Class indices of the training rows.

    Returns:
        float32 [classes], or None: all are equal.

    Raises:
        InputError: A named class does not exist.

    Example:
        >>> class_weights("balanced", ["a", "b"], np.array([0, 0, 0, 1])).tolist()
        [0.6666666865348816, 2.0]
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = np.bincount(labels.astype(np.int64), minlength=len(classes))
        return (len(labels) / (len(classes) * np.maximum(counts, 1))).astype(np.float32)
    assert isinstance(wanted, dict)
    unknown = sorted(set(wanted) - set(classes))
    if unknown:
        raise InputError(f"train.class_weights: there is no class {unknown[0]!r}; the classes are {', '.join(classes)}")
    return np.array([wanted.get(name, 1.0) for name in classes], dtype=np.float32)
