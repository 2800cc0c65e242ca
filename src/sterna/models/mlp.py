"""A fully connected network with ReLU between its layers."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

Inputs = Float[Tensor, "batch *features"]
Logits = Float[Tensor, "batch classes"]


class MLP(nn.Module):
    """Linear layers of the given sizes, ReLU after each but the last.

    Inputs of any shape (batch, ...) with ``sizes[0]`` numbers an example are flattened. Weights
    start as ``torch.nn.Linear`` draws them.

    Args:
        sizes: width of the input, of each hidden layer, and number of classes.

    Raises:
        ValueError: fewer than two sizes, or one below 1.

    Example:
        >>> model = MLP((64, 128, 64, 10))
        >>> sum(p.numel() for p in model.parameters())
        17226
        >>> import torch
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, sizes: Sequence[int] = (64, 128, 64, 10)) -> None:
        super().__init__()
        if len(sizes) < 2 or any(size < 1 for size in sizes):
            raise ValueError(
                "MLP: sizes must hold at least two numbers, input and classes, each at least 1; "
                f"got {tuple(sizes)}."
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for k, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            if k > 0:
                layers.append(nn.ReLU())
            layers.append(nn.Linear(fan_in, fan_out))
        self.sizes = tuple(sizes)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Inputs) -> Logits:
        """Logits, shape (batch, ``sizes[-1]``)."""
        out: Tensor = self.layers(x)
        return out
