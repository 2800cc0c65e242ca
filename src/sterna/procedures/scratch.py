"""The control of every smaller shape: the same layers with fresh weights, trained for as many epochs.

    1. W' <- fresh, each layer drawn as its class draws it
    2. for all epochs that the other arm had in all of its phases:  W' <- W' - a grad E(W')

Reference: Z. Liu, M. Sun, T. Zhou, G. Huang, T. Darrell, "Rethinking the Value of Network Pruning", ICLR
    2019, arXiv:1810.05270: many pruned networks are no better than this.
"""

from collections.abc import Callable

from torch import nn

from sterna.procedures.training import Training
from sterna.randomness import isolated
from sterna.surgery.program import copied


def from_scratch(
    model: nn.Module,
    training: Training,
    *,
    epochs: int,
    draw: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """A model of the same shape, trained from fresh weights; the model is not changed.

    Args:
        model: gives the shape: what `sparsify` returned, say.
        training: data, optimizer and seed, of the weights too.
        epochs: all that the model went through, dense ones included.
        draw: called with each module (`nn.Module.apply`) to draw its weights in place, where the network
            draws them in its own way. None: by the ``reset_parameters`` of each module.

    Raises:
        ValueError: a parameter belongs to a module without ``reset_parameters``, and there is no
            ``draw``; or ``epochs`` is negative.
        NotFinite: training diverged.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from sterna.data import Dataset, Examples
        >>> points = Examples(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> sgd = partial(torch.optim.SGD, lr=1.0)
        >>> training = Training(data=Dataset("toy", points, points, 4), optimizer=sgd, batch_size=8)
        >>> shape = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
        >>> training.judge(from_scratch(shape, training, epochs=20)).accuracy
        1.0
    """
    fresh = copied(model)
    if draw is None:
        for name, module in fresh.named_modules():
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if own and not hasattr(module, "reset_parameters"):
                raise ValueError(
                    f"from_scratch: {'.'.join(filter(None, (name, own[0])))} cannot be drawn: "
                    f"{type(module).__name__} has no reset_parameters. Pass draw, which draws it."
                )
    with isolated(training.seed, "from scratch"):
        fresh.apply(draw or _reset)
    training.fit(fresh, epochs, phase="from scratch")
    return fresh


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
