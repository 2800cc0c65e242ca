"""Test loss and accuracy, shared among the workers."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from sterna.data.examples import Examples
from sterna.flat import Flat
from sterna.seams import Comm

_BATCH = 1000


def evaluate(model: nn.Module, examples: Examples, comm: Comm) -> tuple[float, float]:
    """Mean cross entropy and accuracy (fraction) of a classifier over all ``examples``.

    Each worker takes every N-th batch; the counts are added up, and nothing of it is accounted.
    The model comes back in the mode it was in.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    tally = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for index in torch.split(torch.arange(len(examples)), _BATCH)[comm.rank :: comm.size]:
            batch = examples[index]
            logits = model(batch.inputs.to(device))
            targets = batch.targets.to(device)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.argmax(dim=-1) == targets).sum()
            tally += torch.tensor([float(loss), float(correct), float(len(index))])
    model.train(was_training)
    with comm.ledger.paused():
        comm.sum_(tally)
    loss_sum, correct_sum, count = tally.tolist()
    return loss_sum / count, correct_sum / count


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
    happens to a model without such layers; it comes back in the mode it was in.

    Args:
        model: of any kind.
        examples: the first ``count`` of them are looked at, in batches.
        count: how many.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not layers:
        return
    was_training, device = model.training, next(model.parameters()).device
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over the batches
        layer.train()
    with torch.no_grad():
        for index in torch.split(torch.arange(min(count, len(examples))), 256):
            model(examples[index].inputs.to(device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
