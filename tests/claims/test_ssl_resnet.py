"""SSL on ResNet-20 and pictures: the front of accuracy against time, beside a peer and beside scratch.

Measured on the CIFAR-10 subset with 3 seeds, every network for as many epochs in all: group lasso over the
coupled channels and removal to two targets of multiply-adds; Torch-Pruning's group magnitude at two ratios;
each shape that SSL found, trained from scratch; whole residual blocks alone (``depth``); and the dense
network. Claims: the targets give about 2 and 4 times the dense speed in ONNX Runtime (batch 64, one
thread) at an accuracy no more than 3 points below the peer's; blocks go at a loss of 1.5 points at most.
Who is ahead, SSL, the peer or scratch, is reported, not claimed.

``STERNA_RESNET_EPOCHS`` (dense,penalised,finetuned) and ``STERNA_RESNET_SEEDS`` (0,1,2) change the size of
the experiment. ``STERNA_RESNET_KEPT`` names a folder for the figures of each seed: what is there is not done
again, and several processes may share the seeds. ``STERNA_CLAIMS`` names another folder for the results.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import nn

from results import write
from sterna.data import cifar10
from sterna.export.timing import time_models
from sterna.models import ResNet
from sterna.objectives import Augment, CrossEntropy
from sterna.procedures.scratch import from_scratch
from sterna.procedures.sparsify import sparsify
from sterna.procedures.training import Training
from sterna.randomness import isolated
from sterna.runs.estimate import paired
from sterna.runs.figures import difference, p_value
from sterna.schedules import Cosine
from sterna.surgery import couple

RESULTS = Path(
    os.environ.get("STERNA_CLAIMS") or Path(__file__).parents[2] / "benchmarks" / "results"
)
DENSE, PENALISED, FINETUNED = map(int, os.environ.get("STERNA_RESNET_EPOCHS", "3,1,4").split(","))
SEEDS = tuple(map(int, os.environ.get("STERNA_RESNET_SEEDS", "0,1,2").split(",")))
KEPT = os.environ.get("STERNA_RESNET_KEPT")
STRENGTH, DEPTH, ROUND_TO = 0.002, 0.005, 4
WITHOUT_BLOCKS = 0.8
"""Share of the multiply-adds that is left when the two weakest residual blocks are gone."""
TARGETS = {"2x": (0.26, 0.5), "4x": (0.065, 0.75)}
"""Share of the multiply-adds that SSL leaves, and share of the channels that the peer removes."""


def fresh(seed: int) -> nn.Module:
    with isolated(seed, "ssl", "network"):
        return ResNet(depth=20, shortcut="B")


def draw(module: nn.Module) -> None:
    """As `ResNet` draws its weights."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear | nn.BatchNorm2d):
        module.reset_parameters()


def peer(dense: nn.Module, training: Training, ratio: float) -> nn.Module:
    """Torch-Pruning, as its documentation has it, and the rest of the epochs."""
    tp = pytest.importorskip("torch_pruning", reason="pip install torch-pruning==1.6.1")
    model = deepcopy(dense)
    tp.pruner.BasePruner(
        model,
        training.example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.fc],
        round_to=ROUND_TO,
    ).step()
    training.fit(model, PENALISED + FINETUNED, phase="magnitude")
    return model


def kept(training: Training, seed: int) -> dict[str, Any]:
    """The figures of a seed, from the folder where they are there."""
    file = Path(KEPT) / f"ssl-resnet-{seed}.json" if KEPT else None
    if file is None or not file.exists():
        found = arms(training, seed)
        if file is None:
            return found
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def arms(training: Training, seed: int) -> dict[str, Any]:
    start = fresh(seed)
    training.fit(start, DENSE, phase="dense")
    models: dict[str, nn.Module] = {"dense": deepcopy(start)}
    training.fit(models["dense"], PENALISED + FINETUNED, phase="dense, further")
    options: dict[str, Any] = {
        "epochs": PENALISED,
        "finetune_epochs": FINETUNED,
        "span": (0.0, 1.0),
    }
    reports = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the widths are in the table
        for name, (share, ratio) in TARGETS.items():
            ssl = f"SSL {name}"
            models[ssl], reports[ssl] = sparsify(
                start,
                training,
                strength=STRENGTH,
                adaptive=0.3,
                multiply_adds=share,
                round_to=ROUND_TO,
                **options,
            )
            models[f"Torch-Pruning {name}"] = peer(start, training, ratio)
            models[f"scratch, as {ssl}"] = from_scratch(
                models[ssl], training, epochs=DENSE + PENALISED + FINETUNED, draw=draw
            )
        models["SSL depth"], reports["SSL depth"] = sparsify(
            start,
            training,
            strength=0.0,
            depth=DEPTH,
            layers=("stage?.?",),
            multiply_adds=WITHOUT_BLOCKS,
            **options,
        )
    timings = time_models(
        models, training.data.test.inputs[:64], batch=64, threads=1, engines=["onnxruntime"]
    )
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        row = timings.of(name, "onnxruntime")
        assert row.ratio is not None, row.unavailable
        found[name] = {
            "accuracy": training.judge(model).accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": couple(model, training.example).multiply_adds,
            "milliseconds": 1000 * (row.seconds or 0.0),
            "faster": row.ratio,
        }
    for name, report in reports.items():
        found[name]["blocks"] = list(report.blocks)
        found[name]["widths"] = {layer: after for layer, (_, after) in report.widths.items()}
        phases = ("dense", "penalised", "shrunk", "finetuned")
        found[name]["phases"] = {phase: getattr(report, phase).accuracy for phase in phases}
    print(seed, found, flush=True)
    return found


def against(runs: Sequence[Mapping[str, Any]], name: str, other: str) -> str:
    gaps = [run[name]["accuracy"] - run[other]["accuracy"] for run in runs]
    found = paired(gaps)
    return f"{difference(found, 'accuracy')}, p = {p_value(found.p_value)}" if found else ""


def row_of(name: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    own = [run[name] for run in runs]

    def mean(key: str) -> float:
        return fmean(x[key] for x in own)

    target = name.removeprefix("SSL ")
    rivals = [f"Torch-Pruning {target}", f"scratch, as {name}"] if target in TARGETS else ["", ""]
    return [
        name,
        f"{100 * mean('accuracy'):.2f}",
        f"{mean('faster'):.2f}",
        f"{mean('milliseconds'):.1f}",
        f"{mean('parameters'):,.0f}",
        f"{mean('multiply_adds'):,.0f}",
        " ".join(str(len(x["blocks"])) for x in own) if "blocks" in own[0] else "",
        against(runs, name, "dense") if name != "dense" else "",
        *(against(runs, name, rival) if rival and rival != name else "" for rival in rivals),
    ]


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_resnet_gets_faster_than_the_peers(shared_data: Path) -> None:
    pytest.importorskip("torch_pruning", reason="pip install torch-pruning==1.6.1")
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        training = Training(
            data=cifar10.load(shared_data),
            optimizer=partial(
                torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
            ),
            schedule=Cosine(warmup=0.1),
            objective=Augment(CrossEntropy()),
            batch_size=64,
            seed=seed,
        )
        runs.append(kept(training, seed))
        write(
            RESULTS / "ssl_resnet",
            f"SSL: ResNet-20 on the {training.data.name}, cut and timed",
            [
                "network",
                "test accuracy, %",
                "times faster than dense",
                "ms a batch",
                "parameters",
                "multiply-adds",
                "blocks gone, by seed",
                "against dense",
                "against Torch-Pruning",
                "against scratch",
            ],
            [row_of(name, runs) for name in runs[0]],
            {"seeds": runs, "epochs": [DENSE, PENALISED, FINETUNED]},
            f"{len(runs)} seeds. Every network is trained for {DENSE + PENALISED + FINETUNED} epochs in all: "
            f"{DENSE} dense, {PENALISED} with the penalty and {FINETUNED} after the cut, in one descent of "
            "the rate; Torch-Pruning 1.6.1 "
            f"(group magnitude, widths in multiples of {ROUND_TO}) cuts after the dense epochs. SGD with "
            "Nesterov momentum 0.9, learning rate 0.1 down to 0 by half a cosine, weight decay "
            "5e-4, batch 64, shifted and mirrored pictures. Times: ONNX Runtime, batch 64, one thread, "
            "medians of interleaved rounds, ratio to the dense network of the same seed. Differences in "
            "points, paired over the seeds, with 95 % intervals and the p-value of the t-test.",
        )
    mean = {
        name: {key: fmean(run[name][key] for run in runs) for key in ("accuracy", "faster")}
        for name in runs[0]
    }
    for name, times in (("2x", 1.8), ("4x", 3.6)):
        assert mean[f"SSL {name}"]["faster"] >= times, mean
        rival = mean[f"Torch-Pruning {name}"]
        assert mean[f"SSL {name}"]["accuracy"] >= rival["accuracy"] - 0.03, mean
    assert all(run["SSL depth"]["blocks"] for run in runs), "no block went"
    assert mean["SSL depth"]["accuracy"] >= mean["dense"]["accuracy"] - 0.015, mean
