"""The tables of the page: the ledger side by side and worker by worker, and how runs were made."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from sterna.data.merit import MERITS
from sterna.runs import charts, figures
from sterna.runs.compare import Comparison, Statistic
from sterna.runs.estimate import Estimate
from sterna.runs.reading import Finished


@dataclass(frozen=True, kw_only=True)
class _Figure:
    label: str
    unit: str
    key: str
    write: Callable[[float | None], str]
    versus: tuple[str, str] | None = None
    """What a ratio above and below 1 is called; None shows no ratio."""


_BITS, _TIME, _MEMORY = ("fewer", "more"), ("less", "more"), ("less", "more")
_GROUPS: tuple[tuple[str, tuple[_Figure, ...]], ...] = (
    (
        "Sent, all workers",
        (
            _Figure(
                label="sent", unit="Mbit", key="bits_sent", write=figures.megabits, versus=_BITS
            ),
            _Figure(label="received", unit="Mbit", key="bits_received", write=figures.megabits),
            _Figure(label="messages", unit="", key="messages", write=figures.count, versus=_BITS),
        ),
    ),
    (
        "Time, mean per worker",
        (
            _Figure(label="computing", unit="s", key="compute_s", write=figures.seconds),
            _Figure(label="waiting", unit="s", key="wait_s", write=figures.seconds),
            _Figure(
                label="wall, slowest worker",
                unit="s",
                key="wall_s",
                write=figures.seconds,
                versus=_TIME,
            ),
        ),
    ),
    (
        "Memory, largest worker",
        (
            _Figure(label="process", unit="MiB", key="peak_memory_bytes", write=figures.mebibytes),
            _Figure(
                label="activations",
                unit="MiB",
                key="peak_activation_bytes",
                write=figures.mebibytes,
                versus=_MEMORY,
            ),
        ),
    ),
    (
        "Work",
        (
            _Figure(label="steps", unit="", key="steps", write=figures.count),
            _Figure(label="gradients of examples", unit="", key="examples", write=figures.count),
            _Figure(label="staleness, mean", unit="", key="staleness_mean", write=figures.plain),
            _Figure(label="staleness, largest", unit="", key="staleness_max", write=figures.plain),
        ),
    ),
    (
        "Network",
        (
            _Figure(label="parameters", unit="", key="parameters", write=figures.count),
            _Figure(
                label="multiply-adds per example",
                unit="",
                key="multiply_adds",
                write=figures.count,
            ),
            _Figure(
                label="size of the model",
                unit="Mbit",
                key="model_bits",
                write=figures.megabits,
                versus=_BITS,
            ),
        ),
    ),
)
_STALENESS = ("staleness_mean", "staleness_sum", "staleness_max")
_FOLDED = ("Work", "Network")
"""Groups whose figures are told below the table where all experiments have the same."""
_WORKER_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("steps", "steps", figures.count),
    ("examples", "examples", figures.count),
    ("sent, Mbit", "bits_sent", figures.megabits),
    ("received, Mbit", "bits_received", figures.megabits),
    ("messages", "messages", figures.count),
    ("computing, s", "compute_s", figures.seconds),
    ("waiting, s", "wait_s", figures.seconds),
    ("activations, MiB", "peak_activation_bytes", figures.mebibytes),
    ("process, MiB", "peak_memory_bytes", figures.mebibytes),
    ("staleness, sum", "staleness_sum", figures.count),
    ("staleness, largest", "staleness_max", figures.count),
)


def ledger_table(comparison: Comparison, places: Mapping[str, int]) -> str:
    """A figure per line, an experiment per column; ratios to the baseline below the figures."""
    statistics = comparison.statistics
    heads = "".join(
        f'<th scope="col">{charts.swatch(places[s.experiment])}{_breakable(s.experiment)}</th>'
        for s in statistics
    )
    parts = [
        '<div class="scroll" tabindex="0" role="region" aria-label="Ledger"><table class="ledger">',
        f'<thead><tr><th scope="col"><span class="of">{_seeds(statistics)}</span></th>{heads}'
        "</tr></thead>",
        "<tbody>",
        *_score_rows(statistics),
        *_target_row(statistics, comparison.target_accuracy),
        "</tbody>",
    ]
    alike = []
    for title, rows in _GROUPS:
        shown = []
        for row in rows:
            values = {s.means[row.key] for s in statistics}
            if row.key in _STALENESS and not any(values):
                continue  # nothing could be stale
            if title in _FOLDED and len(values) == 1 and len(statistics) > 1:
                alike += [_said(row, value) for value in values if value is not None]
            elif values != {None}:
                shown.append(row)
        if shown:
            span = len(statistics) + 1
            parts.append(
                f'<tbody><tr class="group"><th scope="rowgroup" colspan="{span}">{title}</th></tr>'
            )
            parts += [_row(row, statistics) for row in shown]
            parts.append("</tbody>")
    parts.append("</table></div>")
    if alike:
        parts.append(f'<p class="note alike">The same in all: {"; ".join(alike)}.</p>')
    return "\n".join(parts)


def _breakable(name: str) -> str:
    """An experiment's name that may be broken after dots and underscores."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _said(row: _Figure, value: float) -> str:
    return f"{row.label} {row.write(value)} {row.unit}".strip()


def _seeds(statistics: Sequence[Statistic]) -> str:
    numbers = {s.num_seeds for s in statistics}
    if len(numbers) > 1:
        return "mean over the seeds"
    return "one seed" if numbers == {1} else f"mean over {numbers.pop()} seeds"


def _spread(estimate: Estimate | None, write: Callable[[float], str]) -> str:
    text = figures.spread(estimate, write)
    return f" <span class=of>{text.strip()}</span>" if text else ""


def _score_rows(statistics: Sequence[Statistic]) -> list[str]:
    names = list(dict.fromkeys(s.score_name for s in statistics if s.score_name))
    rows = []
    for name in names:
        cells = []
        for s in statistics:
            mine = s.score if s.score_name == name else None
            text = figures.MISSING if mine is None else figures.points(mine.mean, name)
            cells.append(f"<td>{text}{_spread(mine, partial(figures.points, name=name))}</td>")
        unit = f' <span class="unit">{MERITS[name].unit.strip()}</span>' * bool(MERITS[name].unit)
        rows.append(f'<tr class="main"><th scope="row">{name}{unit}</th>{"".join(cells)}</tr>')
    if any(s.difference for s in statistics):
        cells = [f"<td>{_difference(s)}</td>" for s in statistics]
        rows.append(f'<tr><th scope="row">difference</th>{"".join(cells)}</tr>')
    cells = [f"<td>{figures.plain(s.means['loss'])}</td>" for s in statistics]
    if any(s.means["loss"] is not None for s in statistics):
        rows.append(f'<tr><th scope="row">test loss</th>{"".join(cells)}</tr>')
    return rows


def _target_row(statistics: Sequence[Statistic], target: float | None) -> list[str]:
    """Seconds to the target accuracy, and how many of the seeds reached it."""
    if target is None:
        return []
    cells = []
    for s in statistics:
        found, every = s.to_target, s.num_seeds
        text = "never" if found is None else figures.seconds(found.mean)
        text += _spread(found, figures.seconds)
        if every > 1:
            text += f"<small>{s.num_reached} of {every} seeds</small>"
        ratio = s.times_sooner
        if ratio not in (None, 1.0) and not s.is_baseline:
            word = "sooner" if ratio >= 1 else "later"
            times = figures.ratio(ratio if ratio >= 1 else 1 / ratio).replace("x", "\u00d7")
            text += f"<small>{times} {word}</small>"
        cells.append(f"<td>{text}</td>")
    goal = figures.points(target, "accuracy").removesuffix(".00")
    title = f'time to {goal}\u00a0% accuracy <span class="unit">s</span>'
    return [f'<tr><th scope="row">{title}</th>{"".join(cells)}</tr>']


def _difference(statistic: Statistic) -> str:
    if statistic.is_baseline:
        return '<span class="of">baseline</span>'
    found, name = statistic.difference, statistic.score_name
    if found is None:
        return figures.MISSING
    text = figures.points(found.mean, name, sign=True)
    if found.low is None or found.high is None or found.low == found.high:
        return f"{text}<small>no interval</small>"
    low, high = figures.points(found.low, name), figures.points(found.high, name)
    p_value = "" if found.p_value is None else f"<small>p {_p(found.p_value)}</small>"
    return f"{text}<small>{low} to {high}</small>{p_value}"


def _p(value: float) -> str:
    text = figures.p_value(value)
    return escape(text) if text.startswith("<") else f"= {text}"


def _row(row: _Figure, statistics: Sequence[Statistic]) -> str:
    cells = []
    for s in statistics:
        ratio = s.ratios[row.key]
        below = ""
        if row.versus is not None and ratio not in (None, 1.0) and not s.is_baseline:
            word = row.versus[0] if ratio >= 1 else row.versus[1]
            times = figures.ratio(ratio if ratio >= 1 else 1 / ratio).replace("x", "\u00d7")
            below = f"<small>{times} {word}</small>"
        spread = _spread(s.times.get(row.key), row.write)
        cells.append(f"<td>{row.write(s.means[row.key])}{spread}{below}</td>")
    main = ' class="main"' if row.key == "bits_sent" else ""
    unit = f' <span class="unit">{row.unit}</span>' if row.unit else ""
    return f'<tr{main}><th scope="row">{row.label}{unit}</th>{"".join(cells)}</tr>'


def workers_table(runs: Sequence[Finished]) -> str:
    """The last ledger of every worker of every run; empty where no run has one."""
    runs = [run for run in runs if run.workers]
    if not runs:
        return ""
    stale = any(row.get(key) for run in runs for row in run.workers for key in _STALENESS)
    columns = [c for c in _WORKER_COLUMNS if stale or c[1] not in _STALENESS]
    heads = "".join(f'<th scope="col">{title}</th>' for title, _, _ in columns)
    parts = [
        '<div class="scroll" tabindex="0" role="region" aria-label="Ledger of each worker">'
        f'<table class="workers"><thead><tr><th scope="col">worker</th>{heads}</tr></thead>'
    ]
    for run in runs:
        span = len(columns) + 1
        title = escape(f"{run.experiment}, seed {run.seed}")
        parts.append(
            f'<tbody><tr class="group"><th scope="rowgroup" colspan="{span}">{title}</th></tr>'
        )
        for row in run.workers:
            cells = "".join(f"<td>{write(row.get(key))}</td>" for _, key, write in columns)
            worker = escape(str(row.get("worker")))
            parts.append(f'<tr><th scope="row">{worker}</th>{cells}</tr>')
        parts.append("</tbody>")
    return "\n".join([*parts, "</table></div>"])


def how_made(runs: Sequence[Finished]) -> str:
    """What ``run.json`` says, once for all seeds that were made alike."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        if run.made:
            groups.setdefault(json.dumps([run.experiment, _alike(run.made)]), []).append(run)
    parts = []
    for group in groups.values():
        seeds = ", ".join(str(run.seed) for run in group)
        title = f"seed{'s' * (len(group) > 1)} {seeds}"
        made = _alike(group[0].made)
        parts.append(
            f"<details><summary>{escape(group[0].experiment)} "
            f'<span class="of">{escape(title)}</span></summary><div>{_described(made)}</div>'
            "</details>"
        )
    return "\n".join(parts)


def _alike(made: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("format", "experiment", "seed", "started")
    kept = {key: value for key, value in made.items() if key not in left_out}
    if isinstance(kept.get("arguments"), Mapping):
        kept["arguments"] = {k: v for k, v in kept["arguments"].items() if k != "seed"}
    return kept


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        items = (
            f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{_described(inner)}</dd>"
            for key, inner in value.items()
            if inner not in ({}, [])
        )
        return f"<dl>{''.join(items)}</dl>"
    if isinstance(value, list):
        return ", ".join(_described(inner) for inner in value)
    text = figures.MISSING if value is None else str(value)
    return f"<pre>{escape(text)}</pre>" if "\n" in text or "(" in text else escape(text)
