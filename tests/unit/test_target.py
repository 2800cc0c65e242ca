"""Time to a target accuracy: when it counts, over which seeds, and where it is shown."""

import json

import pytest
from rich.console import Console

from sterna.runs.compare import compare, read_comparison, write_comparison
from sterna.runs.conclusion import conclusion
from sterna.runs.files import StoreError
from sterna.runs.report import report, side_by_side
from sterna.runs.table import ComparisonTable, markdown
from sterna.runs.target import first_reached, seconds_to_target
from unit.test_report import Page, make_comparison, make_run


def timed(tmp_path, target=0.7, seeds=3, **accuracies):
    """Runs whose four evaluations are 0, 0.2, 0.4 and 0.6 seconds after the start."""
    runs = []
    for name, found in accuracies.items():
        for seed in range(seeds):
            folder = tmp_path / f"digits.{name}" / f"seed-{seed}"
            summary = make_run(folder, f"digits.{name}", seed)
            path = folder / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [r for r in rows if r["kind"] == "eval"]
            for r, accuracy in zip(rows, found, strict=True):
                r["accuracy"] = accuracy + seed / 100
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
            seconds = seconds_to_target(folder, target)
            place = f"digits.{name}/seed-{seed}"
            runs.append({**summary, "run": place, "seconds_to_target": seconds})
    return runs


FAST, SLOW, NEVER = (0.1, 0.8, 0.9, 0.9), (0.1, 0.5, 0.7, 0.8), (0.1, 0.2, 0.3, 0.69)


def test_first_evaluation_at_or_above_the_target_counts(tmp_path):
    make_run(tmp_path / "r")  # 0.1, 0.5, 0.7 and 0.8
    found = [seconds_to_target(tmp_path / "r", target) for target in (0, 0.5, 0.51, 0.8, 0.81)]
    assert found == [0.0, 0.2, 0.4, 0.6, None]


@pytest.mark.parametrize("target", [-0.1, 1.1, 95, float("nan"), True, "0.9"])
def test_target_that_is_no_fraction(tmp_path, target):
    make_run(tmp_path / "r")
    with pytest.raises(ValueError, match=r"target_accuracy must be a fraction in \[0, 1\], got"):
        seconds_to_target(tmp_path / "r", target)
    with pytest.raises(StoreError, match=r"target_accuracy must be a fraction in \[0, 1\], got"):
        report([tmp_path / "r"], target_accuracy=target)
    with pytest.raises(ValueError, match=r"compare: target_accuracy must be a fraction"):
        compare([{"experiment": "a", "seed": 0}], "a", target_accuracy=target)


def test_damaged_evaluation_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for rows, key in (
        ([{"step": 5, "accuracy": "high"}], "accuracy must be a number, got 'high'"),
        ([{"step": 5, "accuracy": 0.9}], "seconds must be a number, got None"),
    ):
        with pytest.raises(StoreError, match=f"the evaluation at step 5 is damaged: {key}"):
            first_reached(rows, 0.5, path)
    assert first_reached([{"step": 5, "perplexity": 3.0}], 0.5, path) is None


def test_time_to_target_is_a_mean_over_the_seeds_that_reached_it(tmp_path):
    runs = timed(tmp_path, slow=SLOW, fast=FAST, never=NEVER)
    slow, fast, never = compare(runs, "digits.slow", target_accuracy=0.7).statistics
    assert (slow.to_target.mean, slow.num_reached) == (pytest.approx(0.4), 3)
    assert fast.to_target.mean == pytest.approx(0.2)
    assert fast.times_sooner == pytest.approx(2.0)
    assert (never.num_reached, never.to_target.mean) == (2, pytest.approx(0.6)), "0.70 and 0.71"
    assert never.times_sooner is None, "not all seeds reached it"
    without = compare(runs, "digits.slow").statistics
    assert [s.to_target for s in without] == [None] * 3


def test_summary_without_the_time_is_refused():
    with pytest.raises(
        ValueError, match=r"each summary must have seconds_to_target, .* a, seed 0,"
    ):
        compare([{"experiment": "a", "seed": 0}], "a", target_accuracy=0.5)


def test_comparison_file_keeps_target_and_times(tmp_path):
    runs = timed(tmp_path, slow=SLOW, never=(0.1, 0.1, 0.1, 0.1))
    write_comparison(tmp_path, compare(runs, "digits.slow", target_accuracy=0.7))
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["target_accuracy"] == 0.7
    assert [run["seconds_to_target"] for run in content["runs"]] == [0.4] * 3 + [None] * 3
    again = read_comparison(tmp_path)
    assert again.target_accuracy == 0.7
    assert again.statistics[1].num_reached == 0
    words = Page(report([tmp_path])).words
    assert "time to 70 % accuracy s 0.400 ± 0 3 of 3 seeds never 0 of 3 seeds" in words
    other = Page(report([tmp_path], target_accuracy=0.1)).words
    assert "time to 10 % accuracy s 0 ± 0 3 of 3 seeds 0 ± 0 3 of 3 seeds" in other


def test_comparison_without_a_target_is_as_before(tmp_path):
    folder = make_comparison(tmp_path / "c")
    assert json.loads((folder / "compare.json").read_text())["target_accuracy"] is None
    assert "time to" not in Page(report([folder])).words


def test_stored_target_that_is_no_fraction(tmp_path):
    folder = make_comparison(tmp_path / "c")
    path = folder / "compare.json"
    path.write_text(path.read_text().replace('"target_accuracy": null', '"target_accuracy": 70'))
    with pytest.raises(StoreError, match=r"compare\.json is incomplete or wrong.*Run `sterna comp"):
        report([folder])


def test_sooner_and_later_are_said(tmp_path):
    runs = timed(tmp_path, slow=SLOW, fast=FAST)
    write_comparison(tmp_path, compare(runs, "digits.slow", target_accuracy=0.7))
    assert "2.00\u00d7 sooner" in Page(report([tmp_path])).words
    assert "2.00\u00d7 later" in Page(report([tmp_path], baseline="digits.fast")).words


def shown(what, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_terminal_and_markdown_have_the_time(tmp_path):
    runs = timed(tmp_path, slow=SLOW, fast=FAST, never=(0.1, 0.1, 0.1, 0.1))
    comparison = compare(runs, "digits.slow", target_accuracy=0.7)
    text = shown(ComparisonTable(comparison), 200)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if "digits." in line}
    assert rows["digits.fast"][-7:] == ["0.200", "±", "0", "(3", "of", "3)", "2.00x"]
    assert rows["digits.never"][-2:] == ["never", "\u2013"]
    assert "seconds to 70%" in markdown(comparison)
    assert "0.400 ± 0 (3 of 3)" in shown(ComparisonTable(comparison), 80), (
        "it stays where room is short"
    )
    for width in (50, 60, 80, 100, 120):
        lines = shown(ComparisonTable(comparison), width).splitlines()
        assert all(len(line) <= width for line in lines)
    one = compare([run for run in runs if run["seed"] == 0], "digits.slow", target_accuracy=0.7)
    assert "±" not in shown(ComparisonTable(one), 200), "one seed has no interval"
    assert "of 1" not in shown(ComparisonTable(one), 200)


def test_one_run_can_have_a_target(tmp_path):
    make_run(tmp_path / "r")
    assert (
        "time to 70 % accuracy s 0.400" in Page(report([tmp_path / "r"], target_accuracy=0.7)).words
    )
    _, comparison = side_by_side([tmp_path / "r"], target_accuracy=0.7)
    assert comparison.runs[0]["seconds_to_target"] == 0.4


def test_conclusion_tells_who_was_there_sooner(tmp_path):
    runs = timed(tmp_path, slow=SLOW, fast=FAST, never=NEVER, none=(0.1, 0.1, 0.1, 0.1))
    fast, never, none = conclusion(compare(runs, "digits.slow", target_accuracy=0.7))
    assert fast.endswith("It reached 70 % after 0.200 ± 0 s, 2.0 times sooner than digits.slow.")
    assert never.endswith("It reached 70 % with 2 of 3 seeds only.")
    assert none.endswith("It never reached 70 %.")
