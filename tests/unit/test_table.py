"""Tables in the terminal at several widths, and as Markdown."""

import pytest
from rich.console import Console

from sterna.runs import figures
from sterna.runs.compare import compare
from sterna.runs.table import ComparisonTable, fitting, markdown, run_figures, run_table

RUNS = [
    {
        "experiment": name,
        "seed": seed,
        "accuracy": accuracy + 0.003 * ((seed * 7 + len(name)) % 3 - 1),
        "bits_sent": bits,
        "messages": 2400,
        "compute_s": 2.2 + 0.1 * seed,
        "wait_s": wait,
        "wall_s": 3.3,
    }
    for name, accuracy, bits, wait in (
        ("digits.sync", 0.93, 790_000_000, 1.4),
        ("digits.terngrad", 0.92, 50_600_000, None),
    )
    for seed in range(3)
]
COMPARISON = compare(RUNS, "digits.sync")


def shown(what, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_wide_terminal_shows_every_column():
    text = shown(ComparisonTable(COMPARISON), 160)
    row = next(line for line in text.splitlines() if line.startswith("digits.terngrad"))
    assert row.split() == [
        "digits.terngrad", "3", "92.00", "±", "0.75", "\u22121.00", "[\u22122.29,", "0.29]",
        "0.079", "50.6", "15.6x", "2,400", "2.30", "±", "0.248", "\u2013", "3.30", "±", "0", "1.00x",
    ]  # fmt: skip
    assert "Left out" not in text


def test_eighty_columns_keep_what_matters_whole():
    text = shown(ComparisonTable(COMPARISON), 80)
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("digits.terngrad"))
    assert all(cell in row for cell in ("92.00 ± 0.75", "[\u22122.29, 0.29]", "50.6", "15.6x"))
    assert "2,400" not in text
    assert "Left out for want of room: seeds, p, messages" in text
    assert all(len(line) <= 80 for line in lines)
    assert "\u2026" not in text


@pytest.mark.parametrize("width", [50, 60, 72, 80, 90, 100, 120, 200])
def test_no_figure_is_ever_cut(width):
    text = shown(ComparisonTable(COMPARISON), width)
    assert "\u2026" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert "92.00 ± 0.75" in text
    assert "50.6" in text


def test_columns_leave_one_by_one():
    counts = [len(fitting(COMPARISON.statistics, width)) for width in range(30, 200)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (3, 12)


def test_one_seed_is_said():
    one = [run for run in RUNS if run["seed"] == 0]
    text = shown(ComparisonTable(compare(one, "digits.sync")), 120)
    assert "One seed: no interval." in text
    assert "±" not in text


def test_one_experiment_has_no_comparison_columns():
    text = shown(ComparisonTable(compare(RUNS[:3], "digits.sync")), 160)
    assert "fewer" not in text
    assert "difference (points)" not in text.replace("\n", " ")


def test_cautions_are_shown():
    unlike = [RUNS[0] | {"epochs": 1}, RUNS[3] | {"epochs": 2}]
    text = shown(ComparisonTable(compare(unlike, "digits.sync")), 120)
    assert "! The runs differ in epochs (1, 2): neither the scores nor the costs compare." in text


def test_markup_in_names_is_text():
    text = shown(
        ComparisonTable(compare([RUNS[0] | {"experiment": "[red]x[/red]"}], "[red]x[/red]")), 80
    )
    assert "[red]x[/red]" in text


def test_markdown_has_every_column_and_the_cautions():
    unlike = [run | {"epochs": 1 if "sync" in run["experiment"] else 2} for run in RUNS]
    lines = markdown(compare(unlike, "digits.sync")).splitlines()
    assert "| 2.30 ± 0.248 | \u2013 | 3.30 ± 0 |" in lines[3]
    assert {line.count("|") for line in lines[:4]} == {13}
    assert lines[3].startswith("| digits.terngrad | 3 | 92.00 ± 0.75 | \u22121.00 [")
    assert lines[1].startswith("| --- | ---: |")
    assert lines[5] == (
        "- The runs differ in epochs (1, 2): neither the scores nor the costs compare."
    )


def test_markdown_escapes_bars():
    assert "a\\|b" in markdown(compare([{"experiment": "a|b", "seed": 0}], "a|b"))


def test_single_run_leaves_unknown_figures_out():
    assert run_figures(RUNS[3]) == [
        ("experiment", "digits.terngrad"),
        ("seed", "0"),
        ("accuracy, %", "91.70"),
        ("Mbit sent", "50.6"),
        ("messages", "2,400"),
        ("computing, s", "2.20"),
        ("wall, s", "3.30"),
    ]
    assert "digits.terngrad" in shown(run_table(RUNS[3]), 80)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.seconds, 0.0123, "0.012"),
        (figures.seconds, 1.2345, "1.23"),
        (figures.seconds, 9.999, "10.0"),
        (figures.seconds, 1234.5, "1,234"),
        (figures.seconds, 0, "0"),
        (figures.seconds, None, "\u2013"),
        (figures.megabits, 50_600_000, "50.6"),
        (figures.mebibytes, 2**20, "1.00"),
        (figures.count, 2400.0, "2,400"),
        (figures.count, 2.5, "2.5"),
        (figures.ratio, 15.64, "15.6x"),
        (figures.ratio, 1.004, "1.00x"),
        (figures.ratio, 12345.6, "12,346x"),
        (figures.ratio, None, "\u2013"),
        (figures.p_value, 0.0002, "< 0.001"),
        (figures.p_value, 0.0432, "0.043"),
        (figures.compact, 1500, "1.5 k"),
        (figures.compact, 2e7, "20 M"),
        (figures.compact, -0.5, "\u22120.5"),
    ],
)
def test_figures_are_written(write, value, text):
    assert write(value) == text


def test_a_difference_that_rounds_to_zero_has_no_sign():
    assert figures.points(-0.00001, "accuracy", sign=True) == "0.00"
    assert figures.points(0.0123, "accuracy", sign=True) == "+1.23"
    assert figures.points(-0.0123, "accuracy") == "\u22121.23"
