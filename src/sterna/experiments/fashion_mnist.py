"""Fashion-MNIST: articles of clothing, 28x28 pixels, 60,000 to train and 10,000 to test on.

LeNet, with the settings of TernGrad's experiments: batch 64 over all workers, momentum 0.9, weight decay
5e-4 (added on each worker, never sent), and a rate that falls with the square root of what is left.

Args:
    data_dir: folder with the files; default: the environment's STERNA_DATA, then the user's cache, then
        the network.
    epochs: passes over the training examples.
    lr: learning rate at the start.
    batch_size: examples per step over all workers.
    clip: clip each tensor's gradient at this many standard deviations; none: no clipping.
    share_scalers: one scaler per tensor for all workers, or each its own.
    step: of the rounding, in root mean squares of each tensor.
    every: steps between two rounds of communication. What is judged and saved are the weights that the
        workers agreed on last.
    outer_lr: rate of the step from the last agreed weights towards the workers' average.
    outer_momentum: momentum of that step.
    nesterov: whether that momentum looks ahead.
    core_ratio: share of the weights that travel for their significance.
    explorer_ratio: share of the weights that travel by chance.
    refresh_every: rounds from one choice of the most significant weights to the next.
"""

from functools import partial
from pathlib import Path

from torch.optim import SGD

from sterna.codecs import Entropy, ErrorFeedback, Fp16, Quantise, TernGrad
from sterna.data import fashion_mnist
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.models import LeNet5
from sterna.runs.run import Run
from sterna.schedules import Polynomial
from sterna.seams import Exchange


def _run(exchange: Exchange, data_dir: Path | None, epochs: int, lr: float, batch_size: int) -> Run:
    return Run(
        data=fashion_mnist.load(data_dir),
        model=LeNet5,
        optimizer=partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        exchange=exchange,
        schedule=Polynomial(power=0.5),
        epochs=epochs,
        batch_size=batch_size,
    )


def sync(
    *, data_dir: Path | None = None, epochs: int = 10, lr: float = 0.01, batch_size: int = 64
) -> Run:
    """Synchronous data parallelism: the mean of all gradients, in float32."""
    return _run(AllReduce(), data_dir, epochs, lr, batch_size)


def fp16(
    *, data_dir: Path | None = None, epochs: int = 10, lr: float = 0.01, batch_size: int = 64
) -> Run:
    """Gradients travel as 16-bit floats."""
    return _run(AllReduce(codec=Fp16()), data_dir, epochs, lr, batch_size)


def terngrad(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    clip: float | None = 2.5,
    share_scalers: bool = True,
) -> Run:
    """TernGrad: gradients travel as -1, 0 or 1 in 2 bits each, and one float per tensor."""
    codec = TernGrad(clip=clip, share_scalers=share_scalers)
    return _run(AllReduce(codec=codec), data_dir, epochs, lr, batch_size)


def terngrad_dense(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    clip: float | None = 2.5,
) -> Run:
    """TernGrad with five codes to a byte: 1.6 bits each."""
    codec = TernGrad(clip=clip, dense=True)
    return _run(AllReduce(codec=codec), data_dir, epochs, lr, batch_size)


def entropy(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    step: float = 2.0,
) -> Run:
    """Gradients are rounded, what was lost is sent later, and the codes travel at their entropy."""
    codec = ErrorFeedback(inner=Entropy(inner=Quantise(step=step)), decay=1.0)
    return _run(AllReduce(codec=codec), data_dir, epochs, lr, batch_size)


def local_sgd(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    every: int = 10,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    nesterov: bool = False,
) -> Run:
    """Local SGD: workers step alone and average their weights every so many steps."""
    exchange = ModelAverage(
        every=every, outer_lr=outer_lr, outer_momentum=outer_momentum, nesterov=nesterov
    )
    return _run(exchange, data_dir, epochs, lr, batch_size)


def local_terngrad(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    every: int = 8,
) -> Run:
    """Local steps; what they came to travels as coded ternaries, and what was lost is sent later."""
    codec = ErrorFeedback(inner=Entropy(inner=TernGrad()))
    exchange = ModelAverage(every=every, codec=codec)
    return _run(exchange, data_dir, epochs, lr, batch_size)


def slim_dp(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    every: int = 1,
    core_ratio: float = 0.15,
    explorer_ratio: float = 0.15,
    refresh_every: int = 50,
) -> Run:
    """Slim-DP: of the weights only the most significant and some at random travel."""
    exchange = SlimDP(
        every=every,
        core_ratio=core_ratio,
        explorer_ratio=explorer_ratio,
        refresh_every=refresh_every,
    )
    return _run(exchange, data_dir, epochs, lr, batch_size)
