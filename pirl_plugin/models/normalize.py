"""From the uint8 pixels that the loader sends to the floats that a network wants, on the network's own device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """``(x / 255 - mean) / std`` per channel for uint8 input; float input passes as it is.

    The constants are buffers, so that they follow ``.to(device)``, but they are no part of the state dict.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != len(std) or any(value <= 0 for value in std):
            raise ValueError(f"mean and std must have one value a channel and std be positive, got {mean} and {std}.")
        mean_of, std_of = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std_of)).float().view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean_of / std_of).float().view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(..., C, H, W)``; the memory format is kept.

        Raises:
            TypeError: integers other than uint8, whose range is not known.
        """
        if x.dtype == torch.uint8:
            return torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale)
        if not x.is_floating_point():
            raise TypeError(f"images must be uint8 (0..255) or already normalised floats, got {x.dtype}.")
        return x
