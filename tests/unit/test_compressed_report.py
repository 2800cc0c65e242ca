"""The tables and the picture of ``sterna compress``, of candidates that are made up."""

import re

import pytest
from rich.console import Console

from sterna.cli.compress import _show_candidates
from sterna.export.timing import TITLES
from sterna.runs.charts import BOTTOM, TOP
from sterna.runs.compress import Outcome, Tried
from sterna.runs.compressed_report import _front, table, titles

SUMMARY = {
    "validation_accuracy_dense": 0.95,
    "keep_accuracy": 1.0,
    "parameters_dense": 25_557_032,
    "multiply_adds_dense": 4_089_284_608,
    "model_bits_dense": 817_825_024,
    "candidate": "strength 0.00123",
}
TRIED = Tried(
    label="strength 0.00123",
    accuracy=0.945,
    parameters=12_557_032,
    multiply_adds=2_089_284_608,
    bits=401_825_024,
    seconds=0.0016,
    low=0.0015,
    high=0.002,
    fastest=0.0014,
    ratio=2.0,
    ratio_low=1.5,
    ratio_high=2.25,
    keeps=True,
)


def outcome(*tried: Tried, by_size: bool = False, **summary: object) -> Outcome:
    return Outcome(
        summary=SUMMARY | {"met": True} | summary,
        tried=tried,
        layers=(),
        timings=None,
        by_size=by_size,
        cautions=(),
    )


def changed(**values: object) -> Tried:
    return Tried(**(vars(TRIED) | values))


def test_candidates_have_the_columns_of_the_timings() -> None:
    assert titles(outcome(TRIED)) == [
        "candidate", "validation %", "parameters", "multiply-adds", *TITLES[2:], "",
    ]  # fmt: skip
    dense, first = table(outcome(TRIED))
    assert first[4:] == ["1.60", "1.50\u20132.00", "2.00x", "1.50\u20132.25", "chosen"]
    assert len(dense) == len(first)


def test_where_storage_is_gained_only_ratios_are_shown() -> None:
    sized = outcome(TRIED, by_size=True)
    assert titles(sized)[4:] == ["Mbit", *TITLES[4:], ""]
    assert table(sized)[1][4:7] == ["402", "2.00x", "1.50\u20132.25"]


def test_what_was_not_timed_has_no_quartiles() -> None:
    names = ("seconds", "low", "high", "fastest", "ratio", "ratio_low", "ratio_high")
    found = table(outcome(changed(**dict.fromkeys(names))))[1]
    assert found[4:8] == ["\u2013", "", "\u2013", ""]


def shown(what: Outcome, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        _show_candidates(console, what)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width and "\u2026" not in captured.get()
    return [line for line in lines if "strength" in line or "Left out" in line]


@pytest.mark.parametrize("by_size", [False, True])
def test_the_table_fits_a_terminal(by_size: bool) -> None:
    slow = changed(seconds=1.234567, low=1.1, high=1.5, ratio_low=11.95, ratio_high=12.15)
    (row,) = shown(outcome(slow, by_size=by_size), 110)
    assert "11.95\u201312.15  chosen" in row and ("1,100\u20131,500" in row) != by_size
    assert row.startswith("strength 0.00123 ")


def test_quartiles_leave_where_there_is_no_room() -> None:
    row, note = shown(outcome(changed(ratio=2.5)), 80)
    assert row.startswith("strength 0.00123 ") and row.split()[-3:] == ["1.60", "2.50x", "chosen"]
    assert note == "Left out for want of room: quartiles. The report has them."


@pytest.mark.parametrize("accuracies", [(0.945, 0.93), (0.9991, 0.9982), (0.35, 0.2)])
def test_the_picture_starts_at_a_label(accuracies: tuple[float, float]) -> None:
    tried = [changed(label=f"{a}", accuracy=a, ratio=1 / a) for a in accuracies]
    picture = _front(outcome(*tried, validation_accuracy_dense=accuracies[0]))
    labels = re.findall(r'y="([^"]*)" dy=".34em" text-anchor="end">([^<]*)<', picture)
    (place, low), *_ = labels
    assert float(place) == BOTTOM and 0 <= float(low) < 100 * accuracies[1]
    (target,) = re.findall(r'y="([^"]*)">target<', picture)
    assert TOP < float(target) < BOTTOM - 6, "it does not lie on the axis"
