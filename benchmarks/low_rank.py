"""What low rank gains in time: LeNet and ResNet-20 cut to shares of their multiply-adds.

Times depend on shapes alone, so the weights are fresh. Medians of interleaved rounds on one thread, ratios
to the dense network round by round.

    python benchmarks/low_rank.py --out benchmarks/results/low_rank
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from results import write
from sterna.export.timing import Engine, time_models
from sterna.models import LeNet5, ResNet
from sterna.randomness import generator, isolated
from sterna.surgery.factorise import Form
from sterna.surgery.low_rank import low_rank

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "LeNet": (LeNet5, (1, 28, 28), ("conv2", "fc1")),
    "ResNet-20": (lambda: ResNet(depth=20, shortcut="B"), (3, 32, 32), ("stage*.conv?",)),
}
SHARES = (0.7, 0.5, 0.35)
TIMED: tuple[tuple[Engine, int], ...] = (("onnxruntime", 64), ("onnxruntime", 1), ("eager", 64))


def cuts(name: str) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The dense network first, then every cut that can be made; and the shares that are really left."""
    make, shape, layers = MODELS[name]
    with isolated(0, "low rank"):
        dense = make().eval()
    models, left = {"dense": dense}, {"dense": 1.0}
    for form in get_args(Form):
        for share in SHARES:
            for multiple_of in (1, 8):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # layers that would not get cheaper stay
                    try:
                        small, report = low_rank(
                            dense,
                            torch.zeros(1, *shape),
                            multiply_adds=share,
                            form=form,
                            layers=layers,
                            multiple_of=multiple_of,
                        )
                    except ValueError:  # more is left even at the least ranks
                        continue
                key = f"{form}, {share:.0%} of the work, ranks in {multiple_of}s"
                models[key] = small
                left[key] = report.multiply_adds_after / report.multiply_adds_before
    return models, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rows, figures = [], {}
    for name, (_, shape, _) in MODELS.items():
        models, left = cuts(name)
        inputs = torch.randn(64, *shape, generator=generator(0, "low rank"))
        faster: dict[str, list[str]] = {key: [] for key in models}
        for engine, batch in TIMED:
            timings = time_models(
                models,
                inputs[:batch],
                batch=batch,
                threads=1,
                engines=[engine],
                rounds=flags.rounds,
            )
            for key in models:
                row = timings.of(key, engine)
                if row.ratio is None or row.ratio_low is None or row.ratio_high is None:
                    raise SystemExit(f"{key}: {row.unavailable}")
                faster[key].append(f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})")
                figures[f"{name}, {key}, {engine}, batch {batch}"] = {
                    "left": left[key],
                    "milliseconds": 1000 * (row.seconds or 0.0),
                    "faster": row.ratio,
                }
        rows += [[f"{name}, {key}", f"{left[key]:.2f}", *cells] for key, cells in faster.items()]
    write(
        flags.out,
        "Low rank: how many times faster than dense",
        ["network", "multiply-adds left", *(f"{e}, batch {b}" for e, b in TIMED)],
        rows,
        figures,
        "Medians of interleaved rounds with quartiles, one thread. `channel` puts a k x k convolution to few "
        "channels before a 1 x 1, `spatial` a k x 1 before a 1 x k.",
    )


if __name__ == "__main__":
    main()
