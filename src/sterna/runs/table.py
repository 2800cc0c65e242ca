"""Ledgers as tables: for the terminal, which may be narrow, and as Markdown for benchmark files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sterna.data.merit import MERITS
from sterna.runs import figures
from sterna.runs.compare import Comparison, Statistic, Summary, number


@dataclass(frozen=True, kw_only=True)
class _Column:
    title: str
    cell: Callable[[Statistic], str]
    rank: int
    """The highest rank leaves first where there is no room; rank 0 stays."""


def _seeds(statistic: Statistic) -> str:
    known = 0 if statistic.score is None else statistic.score.num
    every = statistic.num_seeds
    return str(every) if known == every else f"{known} of {every}"


def _mean(name: str, write: Callable[[float | None], str]) -> Callable[[Statistic], str]:
    return lambda statistic: write(statistic.means[name])


def _time(name: str) -> Callable[[Statistic], str]:
    return lambda statistic: figures.estimated(statistic.times[name], figures.seconds)


def _ratio(name: str) -> Callable[[Statistic], str]:
    return lambda statistic: figures.ratio(statistic.ratios[name])


def _to_target(statistic: Statistic) -> str:
    found, every = statistic.to_target, statistic.num_seeds
    if found is None:
        return "never"
    time = figures.estimated(found, figures.seconds)
    return time if every == 1 else f"{time} ({found.num} of {every})"


def _score(name: str | None) -> Callable[[Statistic], str]:
    return lambda s: figures.score(s.score if s.score_name == name else None, name)


def _columns(statistics: Sequence[Statistic], target: float | None = None) -> list[_Column]:
    names = list(dict.fromkeys(s.score_name for s in statistics if s.score_name is not None))
    points = {MERITS[name].points.strip() for name in names}
    unit = points.pop() if len(points) == 1 else ""
    columns = [
        _Column(title="experiment", cell=lambda s: s.experiment, rank=0),
        _Column(title="seeds", cell=_seeds, rank=8),
        *(_Column(title=name + MERITS[name].unit, cell=_score(name), rank=0) for name in names),
        *([] if names else [_Column(title="score", cell=_score(None), rank=0)]),
        _Column(
            title=f"difference ({unit})" if unit else "difference",
            cell=lambda s: figures.difference(s.difference, s.score_name),
            rank=2 if target is None else 3,
        ),
        _Column(
            title="p",
            cell=lambda s: figures.p_value(s.difference.p_value if s.difference else None),
            rank=9,
        ),
        _Column(title="Mbit sent", cell=_mean("bits_sent", figures.megabits), rank=0),
        _Column(title="fewer bits", cell=_ratio("bits_sent"), rank=1 if target is None else 4),
        _Column(title="messages", cell=_mean("messages", figures.count), rank=7),
        _Column(title="computing s", cell=_time("compute_s"), rank=5),
        _Column(title="waiting s", cell=_time("wait_s"), rank=6),
        _Column(
            title="wall s",
            cell=_time("wall_s"),
            rank=3 if target is None else 2,
        ),
        _Column(title="less time", cell=_ratio("wall_s"), rank=4),
    ]
    if target is not None:
        title = f"seconds to {figures.points(target, 'accuracy').removesuffix('.00')}%"
        columns.append(_Column(title=title, cell=_to_target, rank=1))
        columns.append(
            _Column(title="times sooner", cell=lambda s: figures.ratio(s.times_sooner), rank=1)
        )
    if len(statistics) > 1:
        return columns
    alone = {"difference", "difference (points)", "p", "fewer bits", "less time", "times sooner"}
    return [column for column in columns if column.title not in alone]


def _width(column: _Column, statistics: Sequence[Statistic]) -> int:
    """What the column needs with its heading wrapped at spaces and its cells on one line."""
    cells = [len(column.cell(statistic)) for statistic in statistics]
    return max([*cells, *map(len, column.title.split())]) + 2


def fitting(
    statistics: Sequence[Statistic], width: int, target: float | None = None
) -> list[_Column]:
    """The most important columns that fit into ``width`` characters, in their order."""
    columns = _columns(statistics, target)
    while sum(_width(column, statistics) for column in columns) - 2 > width:
        least = max(columns, key=lambda column: column.rank)
        if least.rank == 0:
            break
        columns.remove(least)
    return columns


@dataclass(frozen=True)
class ComparisonTable:
    """A comparison for the terminal; leaves out the least important columns where it is narrow.

    Use: ``rich.console.Console().print(ComparisonTable(compare(summaries, "digits.sync")))``.
    """

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the table out for the width at hand."""
        statistics = self.comparison.statistics
        target = self.comparison.target_accuracy
        columns = fitting(statistics, options.max_width, target)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for i, column in enumerate(columns):
            heading = escape(column.title.replace(" ", "\n"))
            if i == 0:
                table.add_column(heading, overflow="fold", vertical="bottom")
            else:
                table.add_column(heading, justify="right", no_wrap=True)
        for statistic in statistics:
            style = "dim" if statistic.is_baseline and len(statistics) > 1 else ""
            table.add_row(*(escape(column.cell(statistic)) for column in columns), style=style)
        yield Group(table, *self._notes(_titles(statistics, columns, target)))

    def _notes(self, left_out: Sequence[str]) -> list[Text]:
        notes = [f"! {caution}" for caution in self.comparison.cautions]
        if any(statistic.num_seeds > 1 for statistic in self.comparison.statistics):
            notes.append(
                f"± and [ ]: {self.comparison.confidence:.0%} intervals over seeds; differences "
                f"and ratios are to {self.comparison.baseline}."
            )
        elif len(self.comparison.statistics) > 1:
            notes.append(
                f"One seed: no interval. Differences and ratios are to {self.comparison.baseline}."
            )
        if left_out:
            notes.append(f"Left out for want of room: {', '.join(left_out)}.")
        return [Text(note, style="yellow" if note[0] == "!" else "dim") for note in notes]


def _titles(
    statistics: Sequence[Statistic], columns: Sequence[_Column], target: float | None
) -> list[str]:
    shown = {column.title for column in columns}
    return [column.title for column in _columns(statistics, target) if column.title not in shown]


def run_table(summary: Summary) -> Table:
    """One run, a figure per line. Figures without a value are left out.

    Raises:
        ValueError: a figure is no number.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("figure", style="dim", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    for label, text in run_figures(summary):
        table.add_row(label, escape(text))
    return table


def run_figures(summary: Summary) -> list[tuple[str, str]]:
    """Label and written value of every known figure of one run; staleness only with a server."""
    seed = summary.get("seed")
    found = [("experiment", str(summary.get("experiment", figures.MISSING)))]
    found += [("seed", str(seed))] if seed is not None else []
    for label, key, write in _FIGURES:
        value = number(summary, key)
        if key.startswith("staleness") and not value and summary.get("refused") is None:
            continue  # no server, and nothing that could be stale
        if value is not None:
            virtual = summary.get("engine") == "virtual" and label.endswith(", s")
            found.append((f"{label} (virtual)" if virtual else label, write(value)))
    return found


def markdown(comparison: Comparison) -> str:
    """The comparison with every column, as a Markdown table, and its cautions as a list."""
    statistics = comparison.statistics
    columns = _columns(statistics, comparison.target_accuracy)
    rows = [
        [column.title for column in columns],
        ["---" if i == 0 else "---:" for i in range(len(columns))],
        *([column.cell(s).replace("|", "\\|") for column in columns] for s in statistics),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if comparison.cautions:
        lines += ["", *(f"- {caution}" for caution in comparison.cautions)]
    return "\n".join(lines) + "\n"


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    *(
        (name + merit.unit.replace(" ", ", "), name, partial(figures.points, name=name))
        for name, merit in MERITS.items()
    ),
    ("test loss", "loss", figures.plain),
    ("workers", "workers", figures.count),
    ("epochs", "epochs", figures.count),
    ("steps", "steps", figures.count),
    ("Mbit sent", "bits_sent", figures.megabits),
    ("Mbit received", "bits_received", figures.megabits),
    ("messages", "messages", figures.count),
    ("computing, s", "compute_s", figures.seconds),
    ("waiting, s", "wait_s", figures.seconds),
    ("wall, s", "wall_s", figures.seconds),
    ("staleness, mean", "staleness_mean", figures.plain),
    ("staleness, largest", "staleness_max", figures.count),
    ("gradients refused", "refused", figures.count),
    ("gradients too late", "late", figures.count),
    ("workers lost", "lost", figures.count),
    ("peak memory, MiB", "peak_memory_bytes", figures.mebibytes),
    ("peak activations, MiB", "peak_activation_bytes", figures.mebibytes),
    ("examples", "examples", figures.count),
    ("parameters", "parameters", figures.count),
    ("multiply-adds per example", "multiply_adds", figures.count),
    ("model, Mbit", "model_bits", figures.megabits),
)
