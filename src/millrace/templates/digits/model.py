"""A small convolutional network for 8×8 digits: edit it and run again, only what depends on it reruns."""

import torch
from torch import nn


class Shift(nn.Module):
    """While training, move every other image by one pixel, so that a digit's exact place does not matter."""

    moves = ((0, 0), (0, 0), (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # rows, columns

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return images
        count, _, height, width = images.shape
        padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
        move = torch.tensor(self.moves, device=images.device)
        move = move[torch.randint(len(self.moves), (count,), device=images.device)] + 1
        rows = move[:, 0, None] + torch.arange(height, device=images.device)
        columns = move[:, 1, None] + torch.arange(width, device=images.device)
        image = torch.arange(count, device=images.device)[:, None, None]
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """A 3×3 convolution that keeps the size, normalised."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def build(ctx) -> nn.Module:
    """The network: float [N, 1, 8, 8], normalised, to logits [N, classes].

    Args:
        ctx: Has `image_shape` (channels, height, width) and `classes`.
    """
    channels, height, width = ctx.image_shape
    return nn.Sequential(
        Shift(),
        convolution(channels, 32),
        convolution(32, 64),
        nn.MaxPool2d(2),
        convolution(64, 64),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * (height // 2) * (width // 2), 88),
        nn.ReLU(),
        nn.Linear(88, ctx.classes),
    )
