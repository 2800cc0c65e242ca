"""What the framework costs: time per step of `fit` against a hand-written DDP loop of the same model.

Four Gloo workers on this machine, identity codec, the same batches. Both loops live in the same processes
and take turns, block by block, so that a busy machine slows both alike; medians over the blocks.

    python benchmarks/overhead.py --out benchmarks/results/overhead
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from results import write
from sterna import AllReduce, CrossEntropy, Examples, Replica, Shuffle, fit, launch
from sterna.models import MLP, LeNet5
from sterna.randomness import generator, isolated
from sterna.seams import Comm

WORKERS = 4
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 64-128-64-10, 17 thousand parameters": (MLP, (64,), 16),
    "LeNet, 0.43 million parameters": (LeNet5, (1, 28, 28), 16),
    "MLP 784-1024-1024-10, 1.9 million parameters": (
        lambda: MLP((784, 1024, 1024, 10)),
        (1, 28, 28),
        16,
    ),
}


def examples(shape: tuple[int, ...]) -> Examples:
    rng = generator(0, "overhead")
    inputs = torch.randn(4096, *shape, generator=rng)
    return Examples(inputs, torch.randint(10, (4096,), generator=rng))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with isolated(0, "model"):
        return make()


def ddp_loop(
    comm: Comm, make: Callable[[], nn.Module], data: Examples, batch: int
) -> Iterator[None]:
    """What a user writes by hand."""
    model = DistributedDataParallel(built(make))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sampler = Shuffle(len(data), batch_size=batch, rank=comm.rank, size=comm.size)
    while True:
        for index in sampler:
            optimizer.zero_grad()
            loss = cross_entropy(model(data.inputs[index]), data.targets[index])
            loss.backward()
            optimizer.step()
            loss.detach()
            yield


def fit_loop(
    comm: Comm, make: Callable[[], nn.Module], data: Examples, batch: int
) -> Iterator[None]:
    """The library's loop."""
    model = built(make)
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    sampler = Shuffle(len(data), batch_size=batch, rank=comm.rank, size=comm.size)
    yield from (
        None
        for _ in fit(
            replica, data, sampler, CrossEntropy(), exchange=AllReduce(), comm=comm, epochs=10**6
        )
    )


def worker(comm: Comm, name: str, rounds: int, steps: int) -> dict[str, list[float]]:
    make, shape, batch = MODELS[name]
    data = examples(shape)
    loops = {
        "DDP loop": ddp_loop(comm, make, data, batch),
        "fit": fit_loop(comm, make, data, batch),
    }
    taken: dict[str, list[float]] = {arm: [] for arm in loops}
    for turn in range(rounds + 1):
        for arm, loop in loops.items():
            start = time.perf_counter()
            for _ in range(steps):
                next(loop)
            if turn:  # the first block warms up
                taken[arm].append((time.perf_counter() - start) / steps)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    rows, figures = [], {}
    for name in MODELS:
        taken = launch(worker, (name, flags.rounds, flags.steps), workers=WORKERS)
        hand, ours = (statistics.median(taken[arm]) for arm in ("DDP loop", "fit"))
        ratio = statistics.median(
            b / a for a, b in zip(taken["DDP loop"], taken["fit"], strict=True)
        )
        figures[name] = {"ddp_ms": 1e3 * hand, "fit_ms": 1e3 * ours, "ratio": ratio}
        rows.append([name, f"{1e3 * hand:.2f}", f"{1e3 * ours:.2f}", f"{ratio:.3f}"])
    write(
        flags.out,
        "Time per step: `fit` against a hand-written DDP loop",
        ["model, 4 workers, 16 examples each", "DDP loop, ms", "fit, ms", "median ratio"],
        rows,
        figures,
    )


if __name__ == "__main__":
    main()
