"""A small convolutional network for pictures of 28x28 or 32x32 pixels."""

from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch classes"]


class SmallCNN(nn.Module):
    """Three stages of 3x3 convolution, group normalisation and ReLU, then a linear layer.

    The stages have 1, 2 and 4 times ``width`` channels. Max pooling halves the picture after the
    first two stages; the mean over what is left feeds a linear layer, so any size from 4x4 upwards
    will do. Normalisation is by groups of 8 channels, not over the batch: what one example
    contributes does not depend on the others, so several workers with small batches compute what
    one worker computes with the large one.

    Args:
        channels: colours of the input.
        classes: number of classes.
        width: channels of the first stage, a multiple of 8.

    Raises:
        ValueError: ``width`` is not a positive multiple of 8, or another argument is below 1.

    Example:
        >>> model = SmallCNN()
        >>> sum(p.numel() for p in model.parameters())
        24058
        >>> import torch
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("classes", classes)):
            if value < 1:
                raise ValueError(f"SmallCNN: {name} must be at least 1; got {value}.")
        if width < 8 or width % 8:
            raise ValueError(f"SmallCNN: width must be a positive multiple of 8; got {width}.")
        self.stage1 = _stage(channels, width)
        self.pool1 = nn.MaxPool2d(2)
        self.stage2 = _stage(width, 2 * width)
        self.pool2 = nn.MaxPool2d(2)
        self.stage3 = _stage(2 * width, 4 * width)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Images) -> Logits:
        """Logits, shape (batch, classes)."""
        x = self.pool1(self.stage1(x))
        x = self.pool2(self.stage2(x))
        out: Tensor = self.fc(self.flatten(self.mean(self.stage3(x))))
        return out


def _stage(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(fan_out // 8, fan_out),
        nn.ReLU(),
    )
