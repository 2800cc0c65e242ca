"""Time per training step over slow links: plain DDP, torch's hooks, and codecs in the DDP hook.

    python benchmarks/links.py --mbit 100,1000 --loopback --rounds 7 --out benchmarks/results/links

Four processes in four network namespaces, each behind a shaped link (``tests/netns.py``, needs
root), train a model of ten million parameters with a tiny batch. All arms live in the same
processes, each with a DDP model and a process group of its own, and take turns, one step each, so
that what else the machine does hits them alike. A step's time is that of the slowest rank; medians
over the rounds.

The bound of an arm is what its step would take without any overlap and without any waste:

    bound = bytes per rank / bandwidth + codec + compute

with the bytes from the interface's counters, the codec's time from the ledger (not known for
torch's hooks, where it is left out) and forward, backward and update from a step under
``no_sync()``, all on the same busy cores. Overlap can beat it. The link carries the ledger's bytes
plus headers: up to 5 %, less where the kernel counts the headers of a large segment once.
"""

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import processes
from ddp_arms import DdpArm, plain, sterna, torch_fp16, torch_powersgd
from results import write
from sterna.codecs.fp16 import Fp16
from sterna.codecs.identity import Identity
from sterna.codecs.terngrad import TernGrad
from sterna.randomness import generator, isolated

WARM_UP = 4  # DDP rebuilds its buckets, PowerSGD starts, numba compiles

ARMS: dict[str, Callable[[nn.Module], DdpArm]] = {
    "DDP fp32": plain,
    "DDP fp16 hook": torch_fp16,
    "DDP PowerSGD hook, rank 2": torch_powersgd(rank=2),
    "Sterna Identity": sterna(Identity()),
    "Sterna Fp16": sterna(Fp16()),
    "Sterna TernGrad": sterna(TernGrad()),
    "Sterna TernGrad dense": sterna(TernGrad(dense=True)),
}
REFERENCE = "DDP fp32"


# One worker process.


def work(arguments: argparse.Namespace) -> None:
    comm, interface = processes.join(arguments)
    x = torch.randn(4, arguments.width, generator=generator(0, "batch", comm.rank))
    arms, optimizers = {}, {}
    for name in arguments.arms:
        with isolated(0, "model"):
            layers = [
                nn.Linear(arguments.width, arguments.width, bias=False)
                for _ in range(arguments.layers)
            ]
        arms[name] = ARMS[name](nn.Sequential(*layers))
        optimizers[name] = torch.optim.SGD(arms[name].model.parameters(), lr=1e-3)

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        arms[name].model(x).square().mean().backward()
        optimizers[name].step()

    def measure(name: str) -> dict[str, float]:
        arm = arms[name]
        dist.barrier()
        with arm.model.no_sync():
            start = time.perf_counter()
            step(name)
            compute_s = time.perf_counter() - start
        before = arm.hook.ledger.spent() if arm.hook else None
        dist.barrier()
        counted, start = processes.counters(interface), time.perf_counter()
        step(name)
        step_s = time.perf_counter() - start
        dist.barrier()  # whatever was on its way has arrived
        sample = {"step_s": step_s, "compute_s": compute_s}
        if interface is not None:
            sent, received = (
                b - a for a, b in zip(counted, processes.counters(interface), strict=True)
            )
            sample |= {"link_sent": sent, "link_received": received}
        if arm.hook and before:
            spent = arm.hook.ledger.spent()
            sample["ledger_sent"] = (spent.bits_sent - before.bits_sent) / 8
            sample["codec_s"] = spent.compute_s - before.compute_s
            sample["wait_s"] = spent.wait_s - before.wait_s
        return sample

    for name in arguments.arms:
        for _ in range(WARM_UP):
            step(name)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.arms}
    for _ in range(arguments.rounds):
        for name in arguments.arms:
            samples[name].append(measure(name))
    for arm in arms.values():
        if arm.hook:
            arm.hook.close()
    processes.leave(arguments, comm, samples)


# The parent.


def summarise(link: str, mbit: float | None, by_rank: list[Any]) -> list[dict[str, Any]]:
    """One row per arm."""
    rows: list[dict[str, Any]] = []
    for name in by_rank[0]:
        ranks = [samples[name] for samples in by_rank]

        def median(
            key: str, combine: Callable[[Sequence[float]], float], ranks: Any = ranks
        ) -> Any:
            """Over the rounds, of what ``combine`` makes of the ranks."""
            if key not in ranks[0][0]:
                return None
            rounds = zip(*ranks, strict=True)
            return statistics.median(combine([s[key] for s in samples]) for samples in rounds)

        row = {
            "link": link,
            "arm": name,
            "step_s": median("step_s", max),
            "compute_s": median("compute_s", max),
            "codec_s": median("codec_s", statistics.mean),
            "wait_s": median("wait_s", statistics.mean),
            "link_bytes": median("link_sent", statistics.mean),
            "ledger_bytes": median("ledger_sent", statistics.mean),
            "steps_s": [max(s["step_s"] for s in samples) for samples in zip(*ranks, strict=True)],
        }
        row["bound_s"] = None
        if mbit is not None:
            most = median("link_sent", max)
            row["bound_s"] = 8e-6 * most / mbit + (row["codec_s"] or 0.0) + row["compute_s"]
        rows.append(row)
    reference = next((row["step_s"] for row in rows if row["arm"] == REFERENCE), None)
    for row in rows:
        row["speed_up"] = reference and reference / row["step_s"]
        row["of_bound"] = row["bound_s"] and row["step_s"] / row["bound_s"]
    return rows


HEADER = (
    *("link, arm", "ms/step", "spread", "speed-up", "compute ms", "codec ms", "bound ms"),
    *("step/bound", "kB/step link", "kB/step ledger", "link/ledger"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""

    def cell(value: float | None, factor: float, digits: int) -> str:
        return "" if value is None else f"{value * factor:.{digits}f}"

    link, ledger = row["link_bytes"], row["ledger_bytes"]
    return [
        f"{row['link']}, {row['arm']}",
        cell(row["step_s"], 1e3, 0),
        f"{min(row['steps_s']) * 1e3:.0f}-{max(row['steps_s']) * 1e3:.0f}",
        cell(row["speed_up"], 1, 2),
        cell(row["compute_s"], 1e3, 0),
        cell(row["codec_s"], 1e3, 0),
        cell(row["bound_s"], 1e3, 0),
        cell(row["of_bound"], 1, 2),
        cell(link, 1e-3, 1),
        cell(ledger, 1e-3, 1),
        cell(link / ledger if link and ledger else None, 1, 4),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--mbit", default="", help="link rates in Mbit/s, such as 100,1000")
    parser.add_argument("--loopback", action="store_true", help="also without namespaces")
    processes.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each arm")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--arms", type=json.loads, default=list(ARMS), help="JSON list of names")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.arms if name not in ARMS]
    if unknown:
        parser.error(f"--arms: no arm {unknown[0]!r}; there are {json.dumps(list(ARMS))}.")
    if arguments.worker:
        work(arguments)
        return
    if not arguments.mbit and not arguments.loopback:
        parser.error("give --mbit 100,1000 or --loopback, or both.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    extra = [
        *("--rounds", str(arguments.rounds), "--layers", str(arguments.layers)),
        *("--width", str(arguments.width), "--arms", json.dumps(arguments.arms)),
    ]
    rows: list[dict[str, Any]] = []
    for word in filter(None, arguments.mbit.split(",")):
        mbit = float(word)
        rows += summarise(f"{mbit:g} Mbit/s", mbit, processes.run_shaped(mbit, arguments, extra))
    if arguments.loopback:
        rows += summarise("loopback", None, processes.run_loopback(arguments, extra))
    write(
        arguments.out,
        "Time per step over slow links",
        HEADER,
        [cells(row) for row in rows],
        {"rows": rows},
        f"{arguments.workers} workers, {arguments.layers} layers of {arguments.width} x "
        f"{arguments.width}, batch 4 a worker, {arguments.rounds} rounds; all workers and links on "
        "one machine.",
    )


if __name__ == "__main__":
    main()
