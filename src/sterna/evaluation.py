"""Test loss, accuracy and perplexity, shared among the workers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from sterna.data.examples import Examples
from sterna.data.merit import Merit
from sterna.flat import Flat
from sterna.seams import Comm

_PREDICTIONS = 1000
"""So many are made at once: the logits of 1,000 words out of 10,000 take 40 MB."""


class Evaluation(NamedTuple):
    """What a model reaches on some examples.

    Args:
        loss: mean cross entropy of a prediction, in nats.
        accuracy: share of the predictions that are right, in [0, 1].
    """

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: among how many equally likely classes the model might as well guess."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def of(self, merit: Merit) -> float:
        """The figure that counts."""
        value: float = getattr(self, merit.name)
        return value


def evaluate(model: nn.Module, examples: Examples, comm: Comm) -> Evaluation:
    """Mean cross entropy and accuracy of a model's predictions over all ``examples``.

    A classifier makes one prediction an example, with logits (batch, classes) and targets (batch,); a
    language model one for every position, with logits (batch, positions, classes) and targets (batch,
    positions). Each worker takes every N-th batch; the counts are added up, and nothing of it is
    accounted. Batches hold a thousand predictions, so that memory stays bounded. The model comes back
    in the mode it was in.

    Raises:
        ValueError: the model returns something else, or logits and targets do not have these shapes.

    Example:
        >>> from sterna.comm.solo import Solo
        >>> texts = Examples(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64))
        >>> model = nn.Embedding(8, 8)
        >>> _ = nn.init.zeros_(model.weight)
        >>> found = evaluate(model, texts, Solo())
        >>> round(found.perplexity, 3), found.accuracy
        (8.0, 1.0)
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    tally = torch.zeros(3, dtype=torch.float64)
    batch_size = max(1, _PREDICTIONS // examples.targets[0].numel())
    with torch.no_grad():
        for index in torch.split(torch.arange(len(examples)), batch_size)[comm.rank :: comm.size]:
            batch = examples[index]
            targets = batch.targets.to(device)
            logits = logits_of(model(batch.inputs.to(device)), targets)
            logits, targets = logits.flatten(0, -2), targets.flatten()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.argmax(dim=-1) == targets).sum()
            tally += torch.tensor([float(loss), float(correct), float(len(targets))])
    model.train(was_training)
    with comm.ledger.paused():
        comm.sum_(tally)
    loss_sum, correct_sum, count = tally.tolist()
    return Evaluation(loss_sum / count, correct_sum / count)


def logits_of(output: object, targets: Tensor) -> Tensor:
    """A model's output, if it is logits for some targets.

    Raises:
        ValueError: it is not; says how.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model must return one tensor of logits; got a {type(output).__name__}. Wrap it in a "
            "module that returns the logits alone."
        )
    if output.shape[:-1] != targets.shape:
        raise ValueError(
            "logits must have shape (batch, classes) or (batch, positions, classes), and targets the same "
            f"without classes; got {tuple(output.shape)} and {tuple(targets.shape)}."
        )
    if targets.numel() and int(targets.max()) >= output.shape[-1]:
        raise ValueError(
            f"targets must be less than the number of logits, {output.shape[-1]}; got "
            f"{int(targets.max())}. Give the model as many outputs as there are classes."
        )
    return output


def average_buffers(model: nn.Module, comm: Comm) -> None:
    """Replace the running statistics of normalisation layers by their mean over the workers.

    Gradients are exchanged, buffers are not, so each worker's statistics come from its own examples.
    Other buffers are left alone.
    """
    buffers = {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point()
    }
    if not buffers or comm.size == 1:
        return
    flat = Flat.of(buffers)
    comm.sum_(flat.buffer.div_(comm.size))
    for name, buffer in buffers.items():
        buffer.copy_(flat[name])


def reestimate(model: nn.Module, examples: Examples, count: int = 2048) -> None:
    """Take the running statistics of normalisation layers anew, at the weights of now.

    Under an asynchronous server whoever computes last leaves statistics of other weights. Nothing
    happens to a model without such layers; it comes back in the mode it was in, also after an error.

    Args:
        model: of any kind.
        examples: the first ``count`` of them are looked at, in batches of equal size (or one less), as
            batch normalisation takes no batch of a single example.
        count: how many.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not layers:
        return
    was_training, device = model.training, next(model.parameters()).device
    momenta = [layer.momentum for layer in layers]
    num = min(count, len(examples))
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over the batches
            layer.train()
        with torch.no_grad():
            for index in torch.tensor_split(torch.arange(num), max(1, -(-num // 256))):
                model(examples[index].inputs.to(device))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.train(was_training)
