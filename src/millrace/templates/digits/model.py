"""A small convolutional network for 8×8 digits: edit it and run again, only what depends on it reruns."""

import torch
from torch import nn


class Warp(nn.Module):
    """While training, move, turn and stretch every image a little: a thousand digits are few to learn from."""

    shift, turn, stretch = 0.5, 0.15, 0.08  # at most: pixels, radians, share of the size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return images
        count, _, height, width = images.shape
        random = torch.rand(5, count, device=images.device) * 2 - 1
        angle, wide, high = random[0] * self.turn, 1 + random[1] * self.stretch, 1 + random[2] * self.stretch
        across, down = random[3] * self.shift * 2 / width, random[4] * self.shift * 2 / height
        rows = [
            torch.stack([wide * angle.cos(), -angle.sin(), across], dim=1),
            torch.stack([angle.sin(), high * angle.cos(), down], dim=1),
        ]
        grid = nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


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
        Warp(),
        convolution(channels, 32),
        convolution(32, 48),
        nn.MaxPool2d(2),
        convolution(48, 80),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(80 * (height // 2) * (width // 2), 76),
        nn.ReLU(),
        nn.Linear(76, ctx.classes),
    )
