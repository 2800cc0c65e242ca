"""Penn Treebank: a text of 10,000 different words, 929,589 to train on, judged by perplexity.

An LSTM of two layers, by default the small size of the papers (200 units, no dropout), on windows of 35
words: SGD without momentum, gradients shortened to a norm, and a rate that falls linearly to nothing. Each
window starts with an empty memory, so perplexities compare with each other, not with published ones.

Args:
    data_dir: folder with the files; default: the environment's STERNA_DATA, then the user's cache, then
        the network.
    epochs: passes over the training text.
    lr: learning rate at the start.
    batch_size: windows per step over all workers.
    hidden: units of each layer, and size of the embedding.
    clip_norm: shorten the gradient to this norm before the step; none: do not.
    train_words: only the first so many words of the training text, for trials; none: all.
    test_words: only the first so many words of the text that is judged by; none: all.
    part: which text that is: valid, for choosing hyperparameters, or test.
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
from sterna.data import ptb
from sterna.data.ptb import Part
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.local import Local
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.models import LSTMLanguageModel
from sterna.runs.run import Run
from sterna.schedules import Polynomial
from sterna.seams import Exchange


def _run(
    exchange: Exchange,
    *,
    data_dir: Path | None,
    epochs: int,
    lr: float,
    batch_size: int,
    hidden: int,
    clip_norm: float | None,
    train_words: int | None,
    test_words: int | None,
    part: Part,
) -> Run:
    data = ptb.load(data_dir, part=part, train_words=train_words, part_words=test_words)
    return Run(
        data=data,
        model=partial(LSTMLanguageModel, data.classes, hidden),
        optimizer=partial(SGD, lr=lr),
        exchange=exchange,
        schedule=Polynomial(power=1.0),
        epochs=epochs,
        batch_size=batch_size,
        clip_norm=clip_norm,
    )


def sync(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
) -> Run:
    """Synchronous data parallelism: the mean of all gradients, in float32."""
    return _run(
        AllReduce(),
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )


def fp16(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
) -> Run:
    """Gradients travel as 16-bit floats."""
    return _run(
        AllReduce(codec=Fp16()),
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )


def terngrad(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
    clip: float | None = 2.5,
    share_scalers: bool = True,
) -> Run:
    """TernGrad: gradients travel as -1, 0 or 1 in 2 bits each, and one float per tensor."""
    codec = TernGrad(clip=clip, share_scalers=share_scalers)
    return _run(
        AllReduce(codec=codec),
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )


def entropy(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
    step: float = 1.0,
) -> Run:
    """Gradients are rounded, what was lost is sent later, and the codes travel at their entropy."""
    codec = ErrorFeedback(inner=Entropy(inner=Quantise(step=step)), decay=1.0)
    return _run(
        AllReduce(codec=codec),
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )


def local_sgd(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
    every: int = 10,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    nesterov: bool = False,
) -> Run:
    """Local SGD: workers step alone and average their weights every so many steps."""
    exchange = ModelAverage(
        every=every, outer_lr=outer_lr, outer_momentum=outer_momentum, nesterov=nesterov
    )
    return _run(
        exchange,
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )


def slim_dp(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
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
    return _run(
        exchange,
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )


def lstm(
    *,
    data_dir: Path | None = None,
    epochs: int = 13,
    lr: float = 20.0,
    batch_size: int = 20,
    hidden: int = 200,
    clip_norm: float | None = 0.25,
    train_words: int | None = None,
    test_words: int | None = None,
    part: Part = "valid",
) -> Run:
    """One worker, nothing exchanged: the network by itself."""
    return _run(
        Local(),
        data_dir=data_dir,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        hidden=hidden,
        clip_norm=clip_norm,
        train_words=train_words,
        test_words=test_words,
        part=part,
    )
