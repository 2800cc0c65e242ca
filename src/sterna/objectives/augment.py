"""Random shifts and mirror images of the pictures in a batch, new ones at each step.

A picture is padded by ``pad`` zeros on each side and a random part of its own size is cut out; then
it is mirrored with probability one half.

Reference: C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu: Deeply-supervised nets. AISTATS 2015,
arXiv:1409.5185; as used in section 4.2 of K. He et al., arXiv:1512.03385, with 4 pixels.

Differs from the paper: zeros are added after standardisation, so the border has the mean colour.

Cost per step: three copies of the inputs in memory; no parameters, no traffic.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.objectives.algebra import Composable, MeanOutput
from sterna.seams import Batch, Loss, Objective

Images = Shaped[Tensor, "batch channels height width"]


@dataclass(frozen=True, kw_only=True)
class Augment(Composable):
    """An objective on randomly shifted and mirrored pictures.

    Args:
        inner: the objective on the changed batch.
        flip: mirror left and right with probability one half.
        pad: largest shift in pixels, at least 0.

    Raises:
        ValueError: ``pad`` is negative.
        TypeError: ``inner`` is not an objective.

    Example:
        >>> augment = Augment(inner=MeanOutput(), flip=True, pad=1)
        >>> picture = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
        >>> augment.images(picture, torch.Generator().manual_seed(0))
        tensor([[[[5., 4., 0.],
                  [8., 7., 0.],
                  [0., 0., 0.]]]])
    """

    inner: Objective = field(kw_only=False)
    flip: bool = True
    pad: int = 4

    def __post_init__(self) -> None:
        if not callable(self.inner) or isinstance(self.inner, type):
            raise TypeError(
                "Augment: inner must be an objective, called with (model, batch, rng); got "
                f"{self.inner!r}."
            )
        if not isinstance(self.pad, int) or self.pad < 0:
            raise ValueError(
                f"Augment: pad must be a whole number of pixels, 0 or more; got {self.pad!r}."
            )

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """The inner loss on ``images(batch.inputs)``.

        Raises:
            ValueError: the inputs are not of shape (batch, channels, height, width).
        """
        return self.inner(model, replace(batch, inputs=self.images(batch.inputs, rng)), rng)

    def images(self, x: Images, rng: torch.Generator) -> Images:
        """Changed copies of the pictures; ``x`` itself with ``pad=0`` and ``flip=False``."""
        if x.dim() != 4:
            raise ValueError(
                "Augment: inputs must have shape (batch, channels, height, width); got "
                f"{tuple(x.shape)}. For vectors leave Augment out."
            )
        n, _, height, width = x.shape
        if self.pad:
            padded = F.pad(x, (self.pad,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: all shifts at once
            down, right = torch.randint(2 * self.pad + 1, (2, n), generator=rng).to(x.device)
            x = windows[torch.arange(n, device=x.device), :, down, right]
        if self.flip:
            mirrored = torch.randint(2, (n, 1, 1, 1), generator=rng).to(x.device)
            x = torch.where(mirrored == 1, x.flip(3), x)
        return x


EXAMPLES = (
    Augment(inner=MeanOutput()),
    Augment(inner=MeanOutput(), flip=False, pad=0),
)
