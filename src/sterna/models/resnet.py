"""Residual networks for 32x32 pictures.

A block computes, with BN batch normalisation and W 3x3 convolutions (eq. 1, figure 2)::

    y = relu(F(x) + s(x)),    F(x) = BN(W2 relu(BN(W1 x)))

The shortcut s is the identity where shapes agree. Where a stage halves the picture and doubles the
channels (section 3.3), it takes every second pixel and either adds channels of zeros (option A, no
parameters) or projects with a 1x1 convolution (option B, eq. 2). Section 4.2: a 3x3 convolution,
three stages of n blocks with 16, 32 and 64 channels, the mean over the picture, a linear layer;
depth 6n + 2.

Reference: K. He, X. Zhang, S. Ren, J. Sun: Deep residual learning for image recognition. CVPR 2016,
arXiv:1512.03385. Initial weights: the same authors, arXiv:1502.01852.

Differs from the paper: the linear layer starts as PyTorch draws it.

Cost per step: depth 20 takes 41 million multiply-adds an example forward and has 0.27 million
parameters. Batch normalisation keeps running statistics on each worker, and what an example
contributes depends on the worker's batch.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Images = Float[Tensor, "batch channels height width"]
Features = Float[Tensor, "batch channels_out height_out width_out"]
Logits = Float[Tensor, "batch classes"]


class ResNet(nn.Module):
    """The residual network of section 4.2.

    Args:
        depth: number of layers with weights, 6n + 2: 20, 32, 44, 56, 110.
        width: channels of the first stage, 16 in the paper.
        shortcut: "A" pads with channels of zeros, as in the paper on these pictures; "B" projects.
        classes: number of classes.
        channels: colours of the input.

    Raises:
        ValueError: ``depth`` is not 6n + 2, ``shortcut`` is unknown, or a number is below 1.

    Example:
        >>> sum(p.numel() for p in ResNet(depth=20).parameters())
        269722
        >>> sum(p.numel() for p in ResNet(depth=110).parameters())
        1727962
        >>> import torch
        >>> ResNet(depth=8, shortcut="B")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        shortcut: Literal["A", "B"] = "A",
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"ResNet: depth must be 6n + 2 with n at least 1 (8, 14, 20, ...); got {depth}."
            )
        if shortcut not in ("A", "B"):
            raise ValueError(f"ResNet: shortcut must be 'A' or 'B'; got {shortcut!r}.")
        for name, value in (("width", width), ("classes", classes), ("channels", channels)):
            if value < 1:
                raise ValueError(f"ResNet: {name} must be at least 1; got {value}.")
        n = (depth - 2) // 6
        self.conv = _conv(channels, width)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stage1 = _stage(n, width, width, shortcut)
        self.stage2 = _stage(n, width, 2 * width, shortcut)
        self.stage3 = _stage(n, 2 * width, 4 * width, shortcut)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Images) -> Logits:
        """Logits, shape (batch, classes)."""
        x = self.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        out: Tensor = self.fc(self.flatten(self.mean(x)))
        return out


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; halves the picture where the channels change.

    Args:
        fan_in: channels that come in.
        fan_out: channels that go out.
        shortcut: "A" or "B", where they differ.
    """

    def __init__(self, fan_in: int, fan_out: int, shortcut: Literal["A", "B"]) -> None:
        super().__init__()
        stride = 1 if fan_in == fan_out else 2
        self.conv1 = _conv(fan_in, fan_out, stride)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(fan_out, fan_out)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module
        if stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PaddedShortcut(fan_out - fan_in)
        else:
            project = nn.Conv2d(fan_in, fan_out, kernel_size=1, stride=2, bias=False)
            nn.init.kaiming_normal_(project.weight, nonlinearity="relu")
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(fan_out))
        self.relu2 = nn.ReLU()

    def forward(self, x: Images) -> Features:
        """``relu(F(x) + s(x))``."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and ``added`` channels of zeros behind the given ones.

    Args:
        added: number of channels of zeros.

    Example:
        >>> import torch
        >>> PaddedShortcut(2)(torch.ones(1, 2, 4, 4)).sum(dim=(0, 2, 3))
        tensor([4., 4., 0., 0.])
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Images) -> Features:
        """Shape (batch, channels + added, height / 2, width / 2), rounded up."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.added))


def _conv(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def _stage(n: int, fan_in: int, fan_out: int, shortcut: Literal["A", "B"]) -> nn.Sequential:
    blocks = [Block(fan_in if k == 0 else fan_out, fan_out, shortcut) for k in range(n)]
    return nn.Sequential(*blocks)
