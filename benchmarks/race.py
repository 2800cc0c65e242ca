"""The race: seconds to a fixed test accuracy over slow links, torch's means and Sterna's.

    python benchmarks/race.py --steps --into RESULTS
    python benchmarks/race.py --links --mbit 10,100,1000 --into RESULTS
    python benchmarks/race.py --whole --mbit 10,100,1000 --into RESULTS
    python benchmarks/race.py --table --into RESULTS --out benchmarks/results/race

Four workers train one network on MNIST, with SGD, momentum and 32 examples each a step, until the
replicas reach the target. Three measurements, each by the same code for the arms (``race_arms.py``):

``--steps``   steps to the target, over loopback, without a clock. The rate is chosen for each arm on a
              tenth of the training part, then three seeds count, judged every 32 steps on the test
              part. It rises in 32 steps and falls to 0 in 1024, or in 1280 or 1536 for an arm of which
              a seed does not arrive.
``--links``   seconds per step, in namespaces behind shaped links: all arms in one set of processes take
              turns; a sample is one round (the steps from one exchange to the next) of the slowest
              rank, medians over the rounds.
``--whole``   as a check, whole runs on the shaped link, from the first step to the target, with the
              clock stopped while the replicas are judged: of the fastest arms and of the references.

The table gives steps x seconds per step, a product, for every arm, and beside it the whole runs there
are. Everything is kept in the folder, run by run; what is there already is not done again.
"""

import argparse
import json
import signal
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import race_worker
from race_arms import ARMS, REFERENCE, SETTINGS, STRETCH, Setting
from race_table import figures, header, is_hook, lines
from results import write

UNSHAPED = 4000.0  # Mbit/s, while the arms are made and warmed up


def work(arguments: argparse.Namespace) -> None:
    comm, interface = processes.join(arguments)
    setting, task = SETTINGS[arguments.model], arguments.task
    result: Any = None
    if task == "steps":
        race_worker.steps(arguments.arms, setting, arguments.into)
    elif task == "links":
        rates = arguments.mbit or [0.0]
        result = race_worker.links(
            arguments.arms,
            setting,
            rates,
            arguments.rounds,
            arguments.budget,
            interface,
            arguments.folder,
        )
    else:
        data = race_worker.data_of("test")
        (name,) = arguments.arms
        setting = replace(setting, horizon=arguments.horizon)
        limit = arguments.limit or setting.horizon
        result = race_worker.train(
            name, arguments.lr, arguments.seed, setting, data, setting.target, limit
        )
    processes.leave(arguments, comm, result)


def extra(arguments: argparse.Namespace, task: str, arms: list[str], **more: Any) -> list[str]:
    """The command line of a worker."""
    given = {
        "task": task,
        "model": arguments.model,
        "arms": json.dumps(arms),
        "into": arguments.into,
        "rounds": arguments.rounds,
        "budget": arguments.budget,
        **more,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def measure_links(arguments: argparse.Namespace) -> None:
    """Stage B: all arms in one set of processes, one rate of the links after the other."""
    if not arguments.mbit:
        by_rank = processes.run_loopback(arguments, extra(arguments, "links", arguments.arms))
    else:
        mbit = ",".join(f"{rate:g}" for rate in arguments.mbit)
        words = extra(arguments, "links", arguments.arms, mbit=mbit)
        by_rank = processes.run_shaped(UNSHAPED, arguments, words)
    links: dict[str, Any] = {}
    for rate, arms in by_rank[0].items():
        for name in arms:
            ranks = [samples[rate][name] for samples in by_rank]
            rounds = list(zip(*ranks, strict=True))
            entry = {"steps_s": [max(s["step_s"] for s in one) for one in rounds]}
            entry["step_s"] = statistics.median(entry["steps_s"])
            for key in ("link_bytes", "ledger_bytes", "wait_s"):
                if key in ranks[0][0]:
                    means = [statistics.mean(s[key] for s in one) for one in rounds]
                    entry[key] = statistics.median(means)
            links.setdefault(rate, {})[name] = entry
    file = arguments.into / f"{arguments.model}.links.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **links}, indent=1) + "\n")


def measure_whole(arguments: argparse.Namespace, setting: Setting) -> None:
    """Stage C: whole runs of the fastest arms and of the references, where they fit the budget."""
    file = arguments.into / f"{arguments.model}.whole.json"
    whole: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows = figures(arguments.into, arguments.model)["rows"]
    for mbit in arguments.mbit:
        rate = f"{mbit:g}"
        ranked = [row for row in rows if row["mbit"] == rate and row["product_s"]]
        ranked.sort(key=lambda row: row["product_s"])
        best_of_torch = [row for row in ranked if ARMS[row["arm"]].torch][:1]
        best_of_torch += [row for row in ranked if is_hook(row["arm"])][:1]
        reference = [row for row in ranked if row["arm"] == REFERENCE]
        names: dict[str, Any] = {}
        for row in [*ranked[: arguments.fastest], *best_of_torch, *reference]:
            names[row["arm"]] = row
        for name, row in names.items():
            if row["product_s"] > arguments.budget:
                print(f"{rate} Mbit/s, {name}: {row['product_s']:.0f} s do not fit the budget.")
                continue
            done = whole.setdefault(rate, {}).setdefault(name, {})
            for seed in setting.seeds[: arguments.repeats]:
                if str(seed) in done:
                    continue
                words = extra(
                    arguments, "whole", [name], lr=row["lr"], seed=seed, horizon=row["horizon"]
                )
                if arguments.limit:
                    words += ["--limit", str(arguments.limit)]
                done[str(seed)] = processes.run_shaped(mbit, arguments, words)[0]
                file.write_text(json.dumps(whole, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for stage, text in (
        ("steps", "count the steps to the target, over loopback"),
        ("links", "seconds per step over shaped links (loopback without --mbit)"),
        ("whole", "whole runs over shaped links; after the other two"),
        ("table", "write the table of what is in the folder"),
    ):
        parser.add_argument(f"--{stage}", action="store_true", help=text)
    parser.add_argument("--into", type=Path, default=Path("race"), help="folder of the results")
    parser.add_argument("--model", choices=sorted(SETTINGS), default="mlp")
    parser.add_argument("--arms", type=json.loads, default=list(ARMS), help="JSON list of names")
    parser.add_argument("--mbit", type=_rates, default=[], help="rates in Mbit/s: 10,100,1000")
    parser.add_argument("--rounds", type=int, default=9, help="most rounds of an arm on a link")
    parser.add_argument(
        "--budget", type=float, default=200.0, help="seconds for a link, or for one whole run"
    )
    parser.add_argument("--fastest", type=int, default=3, help="arms to run whole on each link")
    parser.add_argument("--repeats", type=int, default=1, help="seeds of the whole runs")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    processes.add_arguments(parser)
    parser.add_argument("--limit", type=int, help="end whole runs after so many steps, for a trial")
    for name, kind in (("task", str), ("lr", float), ("seed", int), ("horizon", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.arms if name not in ARMS]
    if unknown:
        parser.error(f"--arms: no arm {unknown[0]!r}; there are {json.dumps(list(ARMS))}.")
    if arguments.worker:
        work(arguments)
        return
    if not (arguments.steps or arguments.links or arguments.whole or arguments.table):
        parser.error("give --steps, --links, --whole or --table.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.into = arguments.into.resolve()
    arguments.into.mkdir(parents=True, exist_ok=True)
    setting = SETTINGS[arguments.model]
    if arguments.steps:
        processes.run_loopback(arguments, extra(arguments, "steps", arguments.arms))
    if arguments.links:
        measure_links(arguments)
    if arguments.whole:
        measure_whole(arguments, setting)
    found = figures(arguments.into, arguments.model)
    horizons = [setting.stretched(factor).horizon for factor in STRETCH]
    write(
        arguments.out,
        f"Seconds to {setting.target:.1%} on MNIST over slow links",
        header(found),
        lines(found),
        found,
        f"{arguments.workers} workers, batch {setting.batch} in all, model {setting.model}. Seconds are "
        "products, mean steps to the target (three seeds; first of the evaluations at every 32nd step) "
        "times median seconds per step, but for the column of whole runs, timed from the first step to "
        "the target on the shaped link. Steps: >N where a seed did not reach the target in N steps. Rates "
        "are chosen on held-out examples with a seed of their own; PowerSGD of ranks 1 and 4 take the rate "
        "of rank 2, local steps with ternaries that of every 16. The fp16 hook takes the steps of fp32, "
        "dense ternaries those of TernGrad, plain local steps those of torch's averager. The rate falls to "
        f"0 over {horizons[0]} steps, and over {horizons[1]} or {horizons[2]} where a seed did not reach the "
        "target in those. Steps were counted by earlier commits of the same day. All workers and "
        "links on one machine.",
    )


def _rates(words: str) -> list[float]:
    return [float(word) for word in words.split(",")]


if __name__ == "__main__":
    main()
