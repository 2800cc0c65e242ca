"""The table of the race: steps, seconds per step, their product, and the whole runs beside it."""

import json
import statistics
from pathlib import Path
from typing import Any

from race_arms import ARMS, REFERENCE
from race_worker import chosen, slug


def figures(folder: Path, model: str) -> dict[str, Any]:
    """Everything in the folder: ``steps`` by arm, and one row for each link and arm."""
    steps = {
        name: _steps(folder / f"{model}-{slug(arm.steps_of or name)}.json")
        for name, arm in ARMS.items()
    }
    links, whole = (_read(folder / f"{model}.{kind}.json") for kind in ("links", "whole"))
    rows = []
    for rate, arms in links.items():
        here = [_row(rate, name, steps[name], arms[name]) for name in arms if name in steps]
        products = [row["product_s"] for row in here if row["product_s"]]
        of_torch = [r["product_s"] for r in here if r["product_s"] and ARMS[r["arm"]].torch]
        hooks = [r["product_s"] for r in here if r["product_s"] and is_hook(r["arm"])]
        reference = next((r["product_s"] for r in here if r["arm"] == REFERENCE), None)
        for row in here:
            row["sooner_than_fp32"] = _ratio(reference, row["product_s"])
            row["sooner_than_hook"] = _ratio(min(hooks, default=None), row["product_s"])
            row["sooner_than_torch"] = _ratio(min(of_torch, default=None), row["product_s"])
            row["first"] = row["product_s"] == min(products, default=-1.0)
            runs = whole.get(rate, {}).get(row["arm"], {})
            _add_whole(row, list(runs.values()))
        rows += here
    return {"steps": steps, "rows": rows, "links": links, "whole": whole}


def is_hook(name: str) -> bool:
    """Whether the arm is a communication hook that PyTorch ships."""
    return ARMS[name].torch and ARMS[name].period == 1 and name != REFERENCE


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _steps(file: Path) -> dict[str, Any]:
    """Of one arm: the chosen rate, steps by seed (None: not reached) and their mean."""
    known = _read(file)
    first = known.get("setting", {}).get("horizon")
    every = [{"horizon": first, **run} for run in known.get("runs", [])]
    horizon = max((run["horizon"] for run in every), default=None)
    runs = [run for run in every if run["horizon"] == horizon]
    by_seed = [run["steps"] for run in runs]
    reached = bool(by_seed) and None not in by_seed
    return {
        "lr": runs[0]["lr"] if runs else None,
        "chosen_of": [t["lr"] for t in known.get("tuning", [])],
        "chosen": chosen(known["tuning"]) if known.get("tuning") else None,
        "by_seed": by_seed,
        "best": [run["best"] for run in runs],
        "mean": statistics.mean(by_seed) if reached else None,
        "horizon": horizon,
    }


def _row(rate: str, name: str, steps: dict[str, Any], link: dict[str, Any]) -> dict[str, Any]:
    mean = steps["mean"]
    return {
        "mbit": rate,
        "arm": name,
        "lr": steps["lr"],
        "horizon": steps["horizon"],
        "steps": mean,
        "steps_by_seed": steps["by_seed"],
        "step_s": link["step_s"],
        "steps_s": link["steps_s"],
        "link_bytes": link.get("link_bytes"),
        "product_s": mean * link["step_s"] if mean else None,
    }


def _add_whole(row: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Whole runs against the product for the very seeds that were run."""
    done = [run for run in runs if run["seconds"] is not None]
    row["whole_s"] = [run["seconds"] for run in done]
    row["whole_steps"] = [run["steps"] for run in done]
    expected = sum(run["steps"] * row["step_s"] for run in done)
    row["whole_of_product"] = sum(row["whole_s"]) / expected if done else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def header(found: dict[str, Any]) -> list[str]:
    """Columns of `lines`."""
    if not found["rows"]:
        return ["arm", "lr", "steps, by seed", "steps, mean"]
    return [
        *("link, arm", "lr", "steps, by seed", "ms/step", "spread", "kB/step"),
        *(
            "product s",
            "sooner than fp32",
            "than best hook",
            "than torch's best",
            "whole run s",
            "whole/product",
        ),
    ]


def lines(found: dict[str, Any]) -> list[list[str]]:
    """Cells, one line an arm and link, the soonest first; without links the steps alone."""
    if not found["rows"]:
        return [
            [name, f"{s['lr']:g}", _by_seed(s["by_seed"], s["horizon"]), _cell(s["mean"], 0)]
            for name, s in found["steps"].items()
            if s["by_seed"]
        ]
    links = list(dict.fromkeys(row["mbit"] for row in found["rows"]))
    rows = sorted(
        found["rows"],
        key=lambda row: (links.index(row["mbit"]), row["product_s"] or float("inf"), row["step_s"]),
    )
    out = []
    for row in rows:
        steps = found["steps"][row["arm"]]
        link = f"{row['mbit']} Mbit/s" if row["mbit"] != "0" else "loopback"
        out.append(
            [
                f"{link}, {row['arm']}",
                "" if row["lr"] is None else f"{row['lr']:g}",
                _by_seed(steps["by_seed"], steps["horizon"]),
                _cell(1e3 * row["step_s"], 1),
                f"{min(row['steps_s']) * 1e3:.1f}-{max(row['steps_s']) * 1e3:.1f}",
                _cell(row["link_bytes"] and row["link_bytes"] / 1e3, 1),
                _cell(row["product_s"], 1),
                _cell(row["sooner_than_fp32"], 2),
                _cell(row["sooner_than_hook"], 2),
                _cell(row["sooner_than_torch"], 2),
                ", ".join(f"{seconds:.1f}" for seconds in row["whole_s"]),
                _cell(row["whole_of_product"], 2),
            ]
        )
    return out


def _by_seed(steps: list[int | None], horizon: int | None) -> str:
    return ", ".join(f">{horizon}" if n is None else str(n) for n in steps)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
