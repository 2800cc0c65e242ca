"""From pixels of unsigned bytes to float32 with mean 0 and standard deviation 1 per channel."""

import numpy as np
import torch
from jaxtyping import Float32, Float64
from numpy.typing import NDArray
from torch import Tensor

Images = Float32[Tensor, "examples channels height width"]
PerChannel = Float64[Tensor, " channels"]


def statistics(images: NDArray[np.uint8]) -> tuple[PerChannel, PerChannel]:
    """Mean and standard deviation of each channel, of pixels divided by 255.

    Computed from exact counts, so equal on every machine and with any number of threads.

    Args:
        images: shape (examples, channels, height, width).

    Example:
        >>> statistics(np.array([0, 255], np.uint8).reshape(1, 1, 1, 2))
        (tensor([0.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        pixels = np.array(images[:, channel], order="C").reshape(-1)
        share = torch.from_numpy(pixels).bincount(minlength=256).double() / pixels.size
        means.append((share * value).sum())
        stds.append((share * (value - means[-1]) ** 2).sum().sqrt())
    return torch.stack(means), torch.stack(stds)


def standardised(images: NDArray[np.uint8], mean: PerChannel, std: PerChannel) -> Images:
    """Pixels divided by 255, less the channel's mean, divided by its standard deviation.

    A channel that is constant is only centred.

    Args:
        images: shape (examples, channels, height, width).
        mean: of each channel, of pixels divided by 255.
        std: of each channel, of pixels divided by 255.

    Example:
        >>> half = torch.tensor([0.5], dtype=torch.float64)
        >>> standardised(np.array([0, 255], np.uint8).reshape(1, 1, 1, 2), half, half)
        tensor([[[[-1.,  1.]]]])
    """
    x = torch.from_numpy(images.astype(np.float32, order="C"))
    centre = mean.view(1, -1, 1, 1) * 255
    scale = std.view(1, -1, 1, 1) * 255
    scale = torch.where(scale > 0, scale, 255.0)
    return x.sub_(centre.float()).div_(scale.float())
