"""TensorBoard event files of a training, by tensorboardX."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter


class TensorBoard:
    """Writes scalars to event files in a folder; `tensorboard --logdir` shows them.

    Args:
        folder: Made when absent.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=5)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of one curve."""
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
