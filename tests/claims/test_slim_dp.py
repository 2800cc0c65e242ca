"""Slim-DP on a redundant network: less than half the volume at the accuracy of sending everything.

Claims, on MNIST with a network of 784-300-100-10 units and 4 workers that meet every 4 steps: a core of
0.15 and an explorer of 0.15 stay within 0.3 points of the dense average at no more than 0.45 of its volume;
an explorer is needed (core only is worse). Measured beside it, without a claim: whether the core matters,
against random only at the same volume (the core's own bits, below one per cent, not counted), and what each
worker's own best response comes to at that volume, its indices counted. Each arm has its own best rate, and
is judged by the weights that the workers agreed on last.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from claims.training import Task, Trained, train
from results import write
from sterna.data import mnist
from sterna.exchange.explorers import BestResponse
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.models import MLP
from sterna.runs.estimate import estimate, paired
from sterna.runs.figures import difference, p_value, score
from sterna.seams import Exchange

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
EVERY = 4
RATES = (0.025, 0.05, 0.1)
SEEDS = 3
EPOCHS = 2


def _slim(core: float, explorer: float) -> SlimDP:
    return SlimDP(every=EVERY, core_ratio=core, explorer_ratio=explorer)


ARMS: dict[str, Exchange] = {
    "dense": ModelAverage(every=EVERY),
    "core 0.15, explorer 0.15": _slim(0.15, 0.15),
    "random only 0.3": _slim(0.0, 0.3),
    "core only 0.3": _slim(0.3, 0.0),
    "best responses 0.075": SlimDP(
        every=EVERY, core_ratio=0.0, explorer_ratio=0.075, explorer=BestResponse()
    ),
    "core 0.1, best responses 0.05": SlimDP(
        every=EVERY, core_ratio=0.1, explorer_ratio=0.05, explorer=BestResponse()
    ),
}
AGAINST_RANDOM = (
    "core 0.15, explorer 0.15",
    "best responses 0.075",
    "core 0.1, best responses 0.05",
)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_less_than_half_the_volume(shared_data: Path) -> None:
    torch.set_num_threads(1)
    whole = mnist.load(shared_data)
    held_out = whole.validation_split(0.1, seed=0)
    task = Task(data=whole, model=partial(MLP, (784, 300, 100, 10)), lr=0.0, epochs=EPOCHS)
    trained: dict[str, list[Trained]] = {}
    validated: dict[str, dict[float, float]] = {}
    for arm, exchange in ARMS.items():
        validated[arm] = {}
        for lr in RATES:
            found = train(replace(task, data=held_out, lr=lr), exchange)
            validated[arm][lr] = found.accuracy or 0.0
        best = max(RATES, key=validated[arm].__getitem__)
        trained[arm] = [train(replace(task, lr=best, seed=seed), exchange) for seed in range(SEEDS)]
        print(arm, validated[arm], [one.accuracy for one in trained[arm]], flush=True)

    accuracy = {arm: [one.accuracy or 0.0 for one in runs] for arm, runs in trained.items()}
    bits = {arm: runs[0].bits_sent for arm, runs in trained.items()}
    volume = {arm: sent / bits["dense"] for arm, sent in bits.items()}
    rows = []
    for arm in ARMS:
        gaps = [a - b for a, b in zip(accuracy[arm], accuracy["dense"], strict=True)]
        rows.append(
            [
                arm,
                f"{max(RATES, key=validated[arm].__getitem__):g}",
                score(estimate(accuracy[arm]), "accuracy"),
                score(estimate([one.own_accuracy or 0.0 for one in trained[arm]]), "accuracy"),
                "baseline" if arm == "dense" else difference(paired(gaps), "accuracy"),
                f"{bits[arm] / 1e9:.3f}",
                f"{volume[arm]:.4f}",
            ]
        )
    against_random: dict[str, Any] = {}
    said = []
    for arm in AGAINST_RANDOM:
        pairs = zip(accuracy[arm], accuracy["random only 0.3"], strict=True)
        found = paired([a - b for a, b in pairs])
        assert found is not None
        against_random[arm] = {"mean": found.mean, "low": found.low, "high": found.high}
        said.append(f"{arm}: {difference(found, 'accuracy')}, p {p_value(found.p_value)}")
    write(
        RESULTS / "slim_dp_mnist",
        f"Slim-DP on MNIST: 784-300-100-10 units, 4 workers, a round every {EVERY} steps",
        ["arm", "rate", "accuracy, %", "own replicas, %", "difference, points", "Gbit", "volume"],
        rows,
        {
            "validation": validated,
            "accuracy": accuracy,
            "own_accuracy": {a: [one.own_accuracy for one in r] for a, r in trained.items()},
            "bits_sent_by_a_worker": bits,
            "volume": volume,
            "minus_random_only": against_random,
        },
        f"{EPOCHS} epochs, batch 64 over the workers, momentum 0.9, {SEEDS} seeds, 95 % intervals, "
        f"paired by seed. Each arm at the best of the rates {RATES}, on a tenth of the training "
        "examples held out, one seed. Accuracy is of the weights agreed on last; own replicas is the mean "
        "over the workers of what each one's own replica reaches. Gbit are sent by one worker; volume is "
        "their share of the dense average's. Points above random only: "
        f"{'; '.join(said)}.",
    )
    assert all(one.accuracy is not None for runs in trained.values() for one in runs), "diverged"
    slim, mean = "core 0.15, explorer 0.15", {a: sum(x) / SEEDS for a, x in accuracy.items()}
    assert volume[slim] <= 0.45
    assert mean[slim] - mean["dense"] > -0.003
    assert mean["core only 0.3"] < mean[slim] - 0.01, "an explorer is needed"
