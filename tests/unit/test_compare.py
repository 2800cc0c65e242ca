"""Statistics over seeds, against hand-computed numbers and scipy's own t-test."""

import json
import math

import pytest
from scipy import stats

from sterna.runs.compare import cautions, compare, read_comparison, statistics, write_comparison
from sterna.runs.conclusion import conclusion
from sterna.runs.estimate import estimate, paired
from sterna.runs.files import StoreError


def run(experiment, seed, accuracy=0.9, **figures):
    return {"experiment": experiment, "seed": seed, "accuracy": accuracy, **figures}


def pair(first, second, **figures):
    return [run("a", seed, value, **figures) for seed, value in enumerate(first)] + [
        run("b", seed, value, **figures) for seed, value in enumerate(second)
    ]


def test_mean_and_interval_of_three_seeds():
    # s = 0.01, t(2, 0.975) = 4.30265, so the half width is 4.30265 * 0.01 / sqrt(3)
    found = estimate([0.90, 0.91, 0.92])
    assert found.mean == pytest.approx(0.91)
    assert found.half_width == pytest.approx(4.302652729749464 * 0.01 / math.sqrt(3))
    assert found.num == 3


def walls(first, second):
    return [run("a", seed, wall_s=s, compute_s=1.0) for seed, s in enumerate(first)] + [
        run("b", seed, wall_s=s, compute_s=1.0) for seed, s in enumerate(second)
    ]


def test_seconds_have_the_interval_of_the_score():
    base, other = statistics(walls([2.0, 3.0, 4.0], [2.5, 3.5, 4.5]), "a")
    assert base.times["wall_s"] == estimate([2.0, 3.0, 4.0])
    assert (base.times["compute_s"].half_width, base.times["wait_s"]) == (0.0, None)
    assert base.longer is None
    assert other.longer == paired([0.5, 0.5, 0.5])


def test_seconds_without_a_mean_have_no_interval():
    runs = walls([2.0, math.nan], [2.0, 3.0])
    base, other = statistics(runs, "a")
    assert (base.means["wall_s"], base.times["wall_s"]) == (None, None)
    assert (other.longer.num, other.times["wall_s"].num) == (1, 2)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ([2.0, 3.0, 4.0], [2.6, 3.5, 4.4], "took 17 % more time."),
        ([2.0, 3.0, 4.0], [4.0, 3.5, 3.0], "took 17 % more time, which the seeds do not show."),
        ([2.0, 3.0, 2.0], [9.0, 3.5, 2.0], "took 2.1 times as long, which the seeds do not show."),
        ([2.0], [3.0], "took 50 % more time."),
    ],
)
def test_conclusion_says_whether_the_seeds_show_the_time(first, second, text):
    (sentence,) = conclusion(compare(walls(first, second), "a"))
    assert f"b {text} Its accuracy" in sentence


def test_conclusion_on_one_experiment_has_the_interval_of_its_time():
    half = estimate([2.0, 3.0]).half_width
    (sentence,) = conclusion(compare(walls([2.0, 3.0], []), "a"))
    assert f"Training took 2.50 ± {half:.2f} s" in sentence


def test_interval_narrows_with_less_confidence():
    wide, narrow = estimate([1.0, 2.0, 4.0], 0.99), estimate([1.0, 2.0, 4.0], 0.5)
    assert wide.half_width > 3 * narrow.half_width


def test_paired_difference_equals_scipy():
    first, second = [0.91, 0.93, 0.90, 0.95], [0.90, 0.935, 0.87, 0.93]
    found = statistics(pair(first, second), "a")[1].difference
    reference = stats.ttest_rel(second, first)
    interval = reference.confidence_interval(0.95)
    assert found.p_value == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.num == 4
    assert not found.shown


def test_pairing_cancels_what_a_seed_does_to_both():
    base, other = statistics(pair([0.5, 0.7, 0.9], [0.49, 0.691, 0.889]), "a")
    assert base.score.half_width > 0.4
    assert other.difference.half_width < 0.003
    assert other.difference.shown


def test_only_common_seeds_are_paired():
    runs = [run("a", 0, 0.5), run("a", 1, 0.6), run("b", 1, 0.7), run("b", 2, 0.1)]
    found = statistics(runs, "a")[1]
    assert found.difference.num == 1
    assert found.difference.mean == pytest.approx(0.1)
    assert found.score.mean == pytest.approx(0.4)
    assert "b ran on other seeds than a: paired over seed 1." in cautions(runs, "a")


def test_no_common_seed_no_difference():
    runs = [run("a", 0), run("b", 1)]
    assert statistics(runs, "a")[1].difference is None
    assert cautions(runs, "a") == ["b ran on other seeds than a: no seed in common, no pairs."]


def test_one_seed_gives_no_interval():
    base, other = statistics(pair([0.9], [0.8]), "a")
    assert (base.score.low, base.score.high, base.score.half_width) == (None, None, None)
    assert other.difference.mean == pytest.approx(-0.1)
    assert (other.difference.low, other.difference.p_value) == (None, None)
    assert not other.difference.shown


def test_equal_runs_differ_by_nothing():
    found = statistics(pair([0.9, 0.8], [0.9, 0.8]), "a")[1].difference
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.shown


def test_constant_difference_has_no_p_value():
    # 0.3 - 0.2 and 0.2 - 0.1 differ by rounding only
    found = paired([0.3 - 0.2, 0.2 - 0.1])
    assert found.low == found.high == found.mean == pytest.approx(0.1)
    assert found.p_value is None


def test_ratio_is_how_many_times_less():
    runs = [run("a", 0, bits_sent=1600, wall_s=2.0), run("b", 0, bits_sent=100, wall_s=4.0)]
    base, other = statistics(runs, "a")
    assert other.ratios["bits_sent"] == 16
    assert other.ratios["wall_s"] == 0.5
    assert base.ratios["bits_sent"] == 1


@pytest.mark.parametrize("bits", [0, None, math.nan])
def test_no_ratio_where_nothing_is_known_or_sent(bits):
    runs = [run("a", 0, bits_sent=1600), run("b", 0, bits_sent=bits)]
    assert statistics(runs, "a")[1].ratios["bits_sent"] is None


def test_a_mean_needs_every_seed():
    runs = [run("a", 0, wait_s=1.0), run("a", 1, wait_s=None), run("a", 2, wait_s=3.0)]
    found = statistics(runs, "a")[0]
    assert found.means["wait_s"] is None
    assert found.means["messages"] is None


def test_diverged_seed_is_left_out_and_told():
    runs = pair([0.9, 0.8], [0.7, math.nan])
    found = statistics(runs, "a")[1]
    assert (found.score.num, found.num_seeds, found.difference.num) == (1, 2, 1)
    assert cautions(runs, "a") == [
        "b: no finite accuracy for seed 1, left out of its mean: the mean looks better than the "
        "method is."
    ]


def test_diverged_loss_is_told():
    runs = [run("a", 0, loss=math.inf)]
    assert statistics(runs, "a")[0].means["loss"] is None
    assert cautions(runs, "a") == ["a: the loss of a run is not finite, it diverged."]


def test_perplexity_is_better_low_and_return_high():
    runs = [run("a", 0, None, perplexity=80.0), run("b", 0, None, perplexity=70.0)]
    base, other = statistics(runs, "a")
    assert (base.score_name, base.higher_is_better) == ("perplexity", False)
    assert other.difference.mean == -10
    assert statistics([run("a", 0, None, **{"return": 5})], "a")[0].higher_is_better


def test_scores_of_two_kinds_have_no_difference():
    runs = [run("a", 0, 0.9), run("b", 0, None, perplexity=70.0)]
    assert statistics(runs, "a")[1].difference is None
    assert "b reports perplexity, a accuracy: no difference." in cautions(runs, "a")


def test_baseline_comes_first():
    runs = [run("b", 0), run("a", 0), run("c", 0)]
    assert [s.experiment for s in statistics(runs, "a")] == ["a", "b", "c"]
    assert [s.is_baseline for s in statistics(runs, "a")] == [True, False, False]


def test_seeds_are_sorted():
    assert statistics([run("a", 2), run("a", 0)], "a")[0].seeds == (0, 2)


@pytest.mark.parametrize(
    ("key", "values"),
    [("data", ("digits", "mnist")), ("epochs", (1, 5)), ("workers", (2, 4)), ("engine", "xy")],
)
def test_unlike_runs_are_told(key, values):
    runs = [run("a", 0, **{key: values[0]}), run("b", 0, **{key: values[1]})]
    (said,) = cautions(runs, "a")
    assert said.startswith(f"The runs differ in {key} ({values[0]}, {values[1]})")


def test_alike_runs_need_no_caution():
    assert cautions(pair([0.9, 0.8], [0.7, 0.6], data="digits", epochs=5, workers=4), "a") == []


@pytest.mark.parametrize(
    ("runs", "baseline", "said"),
    [
        ([], "a", "there are no runs"),
        ([run("a", 0)], "b", "the baseline 'b' is not among the experiments; choose one of a"),
        ([run("a", 0), run("a", 0)], "a", "a has seed 0 twice"),
        ([{"seed": 0}], "a", "must name its experiment and its seed"),
        ([{"experiment": "a"}], "a", "got experiment 'a', seed None"),
        ([run("a", 0, bits_sent="12")], "a", "bits_sent must be a number or null, got '12'"),
    ],
)
def test_errors_say_what_is_wrong(runs, baseline, said):
    with pytest.raises(ValueError, match=said):
        statistics(runs, baseline)


def test_confidence_must_be_a_probability():
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        statistics([run("a", 0)], "a", confidence=95)


def test_comparison_survives_the_file(tmp_path):
    comparison = compare(pair([0.9, 0.8], [0.7, 0.75], bits_sent=5), "a", 0.9)
    path = write_comparison(tmp_path, comparison)
    assert read_comparison(tmp_path) == comparison
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert content["statistics"][1]["difference"]["mean"] == pytest.approx(-0.125)
    assert [p.name for p in tmp_path.iterdir()] == ["compare.json"]


def test_file_is_strict_json(tmp_path):
    path = write_comparison(tmp_path, compare([run("a", 0, math.nan, loss=math.inf)], "a"))
    runs = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))["runs"]
    assert (runs[0]["accuracy"], runs[0]["loss"]) == (None, None)


def test_other_format_is_refused(tmp_path):
    (tmp_path / "compare.json").write_text('{"format": 2, "runs": [], "baseline": "a"}')
    with pytest.raises(StoreError, match=r"compare\.json has format 2; .* reads format 1"):
        read_comparison(tmp_path)


@pytest.mark.parametrize("text", ['{"format": 1}', '{"format": 1, "baseline": "a", "runs": [3]}'])
def test_incomplete_comparison_is_refused(tmp_path, text):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(StoreError, match=r"compare\.json is incomplete or wrong"):
        read_comparison(tmp_path)


def said(first, second):
    runs = [run("a", s, v, bits_sent=1600, wall_s=2.0) for s, v in enumerate(first)]
    runs += [run("b", s, v, bits_sent=100, wall_s=3.0) for s, v in enumerate(second)]
    (sentence,) = conclusion(compare(runs, "a"))
    return sentence


def test_conclusion_with_one_seed_claims_nothing():
    assert said([0.9], [0.89]) == (
        "b sent 16.0 times fewer bits than a and took 50 % more time. Its accuracy was 1.00 points "
        "lower with the one seed that was run, which cannot tell a difference from chance."
    )


def test_conclusion_says_when_the_interval_holds_zero():
    text = said([0.90, 0.92, 0.91], [0.91, 0.90, 0.91])
    assert text.endswith("3 seeds): the seeds do not show a difference.")


def test_conclusion_says_a_shown_difference():
    text = said([0.90, 0.92, 0.91], [0.80, 0.819, 0.811])
    assert "Its accuracy was 10.00 points lower (95 % interval \u221210.25 to \u22129.75" in text
    assert "do not show" not in text


def test_conclusion_on_equal_differences():
    assert said([0.9, 0.8], [0.9, 0.8]).endswith(
        "Its accuracy was the same with each of the 2 seeds."
    )


def test_conclusion_on_one_experiment():
    runs = [run("a", 0, 0.9312, workers=4, epochs=1, bits_sent=5e7, messages=2400)]
    runs[0] |= {"wall_s": 4.0, "compute_s": 3.0, "wait_s": 1.0}
    assert conclusion(compare(runs, "a")) == [
        "a reached an accuracy of 93.12 % in 1 epoch. Its 4 workers sent 50.0 Mbit in 2,400 "
        "messages. Training took 4.00 s, 25 % of it waiting."
    ]
