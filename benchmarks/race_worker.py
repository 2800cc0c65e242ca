"""What one worker of the race does: train to the target, or time rounds of all arms in turn."""

import json
import math
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import processes
from race_arms import ARMS, LOOK, STRETCH, Diverged, InSterna, Racer, Setting, built
from sterna.data import mnist
from sterna.data.examples import Dataset, Examples
from sterna.samplers import Shuffle

WARM_UP = 4  # DDP rebuilds its buckets, PowerSGD starts, numba compiles


@cache
def data_of(part: str) -> Dataset:
    """MNIST: judged on its test part, or on a tenth of the training part to choose rates by."""
    whole = mnist.load(None)
    return whole if part == "test" else whole.validation_split(0.1, seed=0)


def train(
    name: str,
    lr: float,
    seed: int,
    setting: Setting,
    data: Dataset,
    target: float,
    limit: int,
    watch: bool = False,
) -> dict[str, Any]:
    """Train one arm until the target or ``limit`` steps; the same answer on every rank.

    ``watch`` ends it for all workers where one diverges; it takes time.

    Returns:
        ``steps`` and ``seconds`` to the target (None: not reached) and ``curve``: step, accuracy, seconds
        at each look. The clock stands still while the replicas are judged.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    period = ARMS[name].period
    look = LOOK * period // math.gcd(LOOK, period)
    racer = ARMS[name].make(built(setting.model, seed), seed)
    part = setting.batch // size
    sampler = Shuffle(len(data.train), part, rank=rank, size=size, seed=seed)
    curve: list[tuple[int, float, float]] = []
    seconds, step, reached = 0.0, 0, False
    if watch and isinstance(racer, InSterna):
        racer.watch = True
    dist.barrier()
    start = time.perf_counter()
    while step < limit and not reached:
        for index in sampler:
            racer.set_rate(lr * setting.factor(step))
            batch = data.train[index]
            try:
                racer.step(batch.inputs, batch.targets)
            except Diverged:
                limit = step
                break
            step += 1
            if step % look == 0 and step >= setting.first_look:
                dist.barrier()  # the slowest worker has come as far
                seconds += time.perf_counter() - start
                accuracy = judge(racer.module, data.test, target)
                curve.append((step, accuracy, seconds))
                reached = accuracy >= target
                dist.barrier()
                start = time.perf_counter()
            if reached or step >= limit:
                break
    racer.close()
    return {
        "arm": name,
        "lr": lr,
        "seed": seed,
        "horizon": setting.horizon,
        "steps": step if reached else None,
        "seconds": seconds if reached else None,
        "best": max((accuracy for _, accuracy, _ in curve), default=0.0),
        "curve": curve,
    }


def judge(module: nn.Module, examples: Examples, target: float) -> float:
    """Accuracy, the examples shared out over the ranks; on every tenth where those are far below."""
    coarse = _accuracy(module, examples, 10)
    return coarse if coarse < target - 0.012 else _accuracy(module, examples, 1)


def _accuracy(module: nn.Module, examples: Examples, every: int) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs, targets = (x[rank * every :: size * every] for x in (examples.inputs, examples.targets))
    module.eval()
    with torch.no_grad():
        right = sum(
            (module(x).argmax(1) == y).sum()
            for x, y in zip(inputs.split(500), targets.split(500), strict=True)
        )
    module.train()
    counts = torch.tensor([int(right), len(targets)])
    dist.all_reduce(counts)
    return int(counts[0]) / int(counts[1])


# Stage A: steps to the target, arm by arm; each run is kept as soon as it is done.


def steps(names: list[str], setting: Setting, folder: Path) -> None:
    """Choose each arm's rate on the validation part, then count steps on the test part.

    With the shortest horizon of those in `STRETCH` with which all seeds of the arm reach the target.
    """
    for name in names:
        if ARMS[name].steps_of is not None:
            continue
        lr = _rate(name, setting, folder)
        kept = _Kept(name, setting, folder)
        for stretch in STRETCH:
            if kept.reached(setting.stretched(stretch), lr):
                break


def _rate(name: str, setting: Setting, folder: Path) -> float:
    """The rate of an arm; chooses what has not been chosen."""
    other = ARMS[name].rate_of
    if other is not None:
        return _rate(other, setting, folder)
    kept = _Kept(name, setting, folder)
    for lr in (setting.rate_factor * rate for rate in ARMS[name].rates):
        if lr not in [run["lr"] for run in kept.tuning]:
            # A rate that is slower than the best so far need not be followed to its end.
            limit = min([run["steps"] for run in kept.tuning if run["steps"]] or [setting.horizon])
            data, target, seed = (
                data_of("validation"),
                setting.validation_target,
                setting.tuning_seed,
            )
            kept.add("tuning", train(name, lr, seed, setting, data, target, limit, watch=True))
    return chosen(kept.tuning)


class _Kept:
    """What has been run of one arm, in its file; rank 0 writes."""

    def __init__(self, name: str, setting: Setting, folder: Path) -> None:
        self.file = folder / f"{setting.model}-{slug(name)}.json"
        dist.barrier()
        known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        dist.barrier()
        if known.get("setting") != json.loads(json.dumps(setting.about())):
            known = {}  # of another race
        self.name, self.setting = name, setting
        self.tuning: list[dict[str, Any]] = known.get("tuning", [])
        self.runs: list[dict[str, Any]] = known.get("runs", [])
        for run in self.runs:
            run.setdefault("horizon", setting.horizon)

    def add(self, which: str, run: dict[str, Any]) -> None:
        {"tuning": self.tuning, "runs": self.runs}[which].append(run)
        if dist.get_rank() == 0:
            about = {"arm": self.name, "setting": self.setting.about()}
            content = {**about, "tuning": self.tuning, "runs": self.runs}
            self.file.write_text(json.dumps(content, indent=1) + "\n")

    def reached(self, setting: Setting, lr: float) -> bool:
        """Whether all seeds reach the target with this horizon; runs what has not been run."""
        for seed in setting.seeds:
            which = (seed, setting.horizon, lr)
            done = [one for one in self.runs if (one["seed"], one["horizon"], one["lr"]) == which]
            if not done:
                data, limit = data_of("test"), setting.horizon
                one = train(self.name, lr, seed, setting, data, setting.target, limit, watch=True)
                self.add("runs", one)
                done = [one]
            if done[0]["steps"] is None:
                return False
        return True


def chosen(tuning: list[dict[str, Any]]) -> float:
    """The rate that came first to the target; where none did, the one with the best accuracy."""
    best = min(tuning, key=lambda t: (t["steps"] or math.inf, -t["best"]))
    return float(best["lr"])


def slug(name: str) -> str:
    """A file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


# Stage B: seconds per step, the arms in turn.


def links(
    names: list[str],
    setting: Setting,
    rates: list[float],
    rounds: int,
    budget_s: float,
    interface: str | None,
    folder: Path,
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """For each rate of the link and each arm the samples: seconds of one round, per step.

    A round is ``period`` steps, the last of which communicates. Arms take turns; from the fourth turn
    on only those take part of which another round still fits into the budget of this rate.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    racers = {name: ARMS[name].make(built(setting.model, 0), 0) for name in names}
    examples = data_of("test").train
    part = torch.arange(setting.batch // size) * size + rank
    batch = examples[part]
    inputs, targets = batch.inputs, batch.targets
    for name, racer in racers.items():
        racer.set_rate(1e-3)
        for _ in range(max(WARM_UP, ARMS[name].period)):
            racer.step(inputs, targets)
    samples: dict[str, dict[str, list[dict[str, float]]]] = {}
    for mbit in rates:
        dist.barrier()
        if interface is not None:
            if rank == 0:
                processes.ask_for_rate(folder, mbit)
            dist.barrier()
        here = samples[f"{mbit:g}"] = {name: [] for name in names}
        start, running = time.perf_counter(), list(names)
        for turn in range(rounds):
            for name in running:
                here[name].append(
                    _round(racers[name], ARMS[name].period, inputs, targets, interface)
                )
            took = {n: statistics.median(s["round_s"] for s in here[n]) for n in running}
            left = budget_s - (time.perf_counter() - start)
            if turn >= 2:
                running = _affordable(took, left, rounds - turn - 1)
            if not running:
                break
    for racer in racers.values():
        racer.close()
    return samples


def _affordable(took: dict[str, float], left: float, turns: int) -> list[str]:
    """The arms that go on: the slowest leave until the rest can have all ``turns``; rank 0 decides."""
    order = sorted(took, key=lambda name: took[name])
    count = torch.zeros(1, dtype=torch.int64)
    while count < len(order) and turns * sum(took[n] for n in order[: int(count) + 1]) <= left:
        count += 1
    dist.broadcast(count, 0)
    kept = [""] * len(order) if dist.get_rank() else order
    dist.broadcast_object_list(kept, 0)
    kept = kept[: int(count)]
    return [name for name in took if name in kept]


def _round(
    racer: Racer, period: int, inputs: torch.Tensor, targets: torch.Tensor, interface: str | None
) -> dict[str, float]:
    before = racer.ledger.spent() if racer.ledger else None
    dist.barrier()
    counted, start = processes.counters(interface), time.perf_counter()
    for _ in range(period):
        racer.step(inputs, targets)
    round_s = time.perf_counter() - start
    dist.barrier()  # whatever was on its way has arrived
    sent = processes.counters(interface)[0] - counted[0]
    sample = {"round_s": round_s, "step_s": round_s / period, "link_bytes": sent / period}
    if racer.ledger and before:
        spent = racer.ledger.spent()
        sample["ledger_bytes"] = (spent.bits_sent - before.bits_sent) / 8 / period
        sample["wait_s"] = (spent.wait_s - before.wait_s) / period
    return sample
