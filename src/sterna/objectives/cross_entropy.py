"""Cross entropy between the softmax of a network's outputs and the right class.

For one prediction with logits z over C classes and class y, and label smoothing epsilon::

    p_c  = exp(z_c) / sum_j exp(z_j)
    q_c  = (1 - epsilon) [c = y] + epsilon / C
    loss = - sum_c q_c log p_c

An example with several predictions (the positions of a text) has the mean of their losses.

Reference: label smoothing is section 7 of C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna:
Rethinking the Inception architecture for computer vision. CVPR 2016, arXiv:1512.00567.

Differs from the paper: nothing.

Cost per step: one forward pass; memory for the logits and as much again for their gradient.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from sterna.objectives.algebra import Composable
from sterna.seams import Batch, Loss

Logits = Float[Tensor, "batch *positions classes"]
Targets = Int64[Tensor, "batch *positions"]
PerExample = Float[Tensor, " batch"]

_NO_CLASS = -(2**63)  # torch leaves targets of this value out, -100 unless told: here no target is


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Composable):
    """The mean negative log-probability of the right classes.

    Args:
        label_smoothing: epsilon, the share of the target spread evenly over all classes, in [0, 1].

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 1].

    Example:
        >>> batch = Batch(torch.zeros(2, 4), torch.tensor([0, 3]), torch.arange(2))
        >>> loss = CrossEntropy()(nn.Identity(), batch, torch.Generator())
        >>> loss.per_example, loss.penalty
        (tensor([1.3863, 1.3863]), tensor(0.))
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(
                "CrossEntropy: label_smoothing (epsilon) must lie in [0, 1]; got "
                f"{self.label_smoothing}."
            )

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """The loss of each example; draws nothing from ``rng``.

        Args:
            model: gives logits of shape (batch, ..., classes).
            batch: its targets are classes, int64 of shape (batch, ...).
            rng: not used.

        Raises:
            TypeError: the targets are not int64 or the logits not floating point.
            ValueError: shapes disagree, or a target is not a class (on CUDA the last is torch's own
                device-side assertion, because looking would cost a synchronisation).
        """
        per_example = self.per_example(model(batch.inputs), batch.targets)
        return Loss(per_example, per_example.new_zeros(()))

    def per_example(self, logits: Logits, targets: Targets) -> PerExample:
        """The loss of each example from its logits; the mean where it has several predictions."""
        if not logits.is_floating_point() or targets.dtype != torch.int64:
            raise TypeError(
                "CrossEntropy: logits must be floating point and targets int64 classes; got "
                f"{logits.dtype} and {targets.dtype}. Convert targets with .long()."
            )
        if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
            raise ValueError(
                "CrossEntropy: logits must have shape (batch, ..., classes) and targets the same "
                f"without classes; got {tuple(logits.shape)} and {tuple(targets.shape)}."
            )
        classes = logits.shape[-1]
        try:
            losses = F.cross_entropy(
                logits.reshape(-1, classes),
                targets.reshape(-1),
                reduction="none",
                label_smoothing=self.label_smoothing,
                ignore_index=_NO_CLASS,
            )
        except IndexError as error:
            low, high = (int(x) for x in targets.aminmax())
            raise ValueError(
                f"CrossEntropy: targets must lie in [0, {classes}), the model's classes; got "
                f"{low}..{high}. Give the model more outputs or mend the targets."
            ) from error
        return losses if targets.dim() == 1 else losses.view(len(targets), -1).mean(1)


EXAMPLES = (CrossEntropy(), CrossEntropy(label_smoothing=0.1))
