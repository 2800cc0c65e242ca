"""The page: what it says, that it is whole and asks for nothing; what bad folders do to it."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sterna.runs.charts import Measure, line_chart, scales
from sterna.runs.compare import compare, write_comparison
from sterna.runs.curves import POINTS, loss_curves, score_curves, smooth, thin
from sterna.runs.files import StoreError
from sterna.runs.reading import collect, read_run
from sterna.runs.report import report, write_report
from sterna.runs.scales import Scale, around, decades

ACCURACY = Measure(key="accuracy", title="Test accuracy", factor=100, unit=" %")
VOID = {"meta", "link", "br", "input", "wbr"}


def make_run(folder, experiment="digits.sync", seed=0, bits=1_000_000, steps=20, **changes):
    """A run of 4 evaluations; its accuracies are 0.1, 0.5, 0.7, 0.8 plus a hundredth per seed."""
    folder.mkdir(parents=True)
    workers, rows, ledger = 2, [], []
    for k, accuracy in enumerate((0.1, 0.5, 0.7, 0.8)):
        step = k * steps
        rows.append(
            {"kind": "eval", "step": step, "epoch": k, "loss": 2.0 - k / 2, "seconds": step / 100,
             "accuracy": accuracy + seed / 100, "bits_sent": bits * step}
        )  # fmt: skip
        ledger += [
            {"step": step, "epoch": k, "worker": w, "steps": step, "bits_sent": bits * step // 2,
             "messages": 7_000 + w, "compute_s": 1.5, "wait_s": 0.5}
            for w in range(workers)
        ]  # fmt: skip
    rows += [
        {"kind": "step", "step": s, "epoch": 0, "loss": 2.0 / s, "seconds": s / 100}
        for s in range(1, 3 * steps + 1)
    ]
    rows.sort(key=lambda row: row["step"])
    summary = {
        "experiment": experiment, "seed": seed, "method": "AllReduce()", "data": "digits",
        "engine": "gloo", "workers": workers, "epochs": 3, "steps": 3 * steps,
        "accuracy": 0.8 + seed / 100, "perplexity": None, "return": None, "loss": 0.5,
        "bits_sent": bits * 3 * steps, "messages": 14_001, "compute_s": 1.5, "wait_s": 0.5,
        "wall_s": 2.0, **changes,
    }  # fmt: skip
    made = {
        "format": 1, "experiment": experiment, "seed": seed,
        "method": "AllReduce(codec=Identity())",
        "arguments": {"epochs": 3, "seed": seed}, "started": f"2026-01-0{seed + 1}",
        "versions": {"torch": "2.13.0"}, "hardware": {"processor": "Abacus"}, "commit": "abc123",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps(made))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    return summary


def make_comparison(folder, seeds=3, **experiments):
    runs = []
    for name, bits in (experiments or {"sync": 1_000_000, "terngrad": 62_500}).items():
        for seed in range(seeds):
            place = f"digits.{name}/seed-{seed}"
            summary = make_run(folder / place, f"digits.{name}", seed, bits)
            runs.append({**summary, "run": place})
    write_comparison(folder, compare(runs, runs[0]["experiment"]))
    return folder


class Page(HTMLParser):
    """Text, tags and attributes; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_well_formed_and_self_contained(tmp_path):
    text = report([make_comparison(tmp_path / "c")])
    page = Page(text)
    assert not re.search(r"(https?:)?//[a-z]", text.replace("// The read-out", ""))
    assert "@import" not in text
    assert "url(#" in text
    assert re.findall(r"url\((?!#)", text) == []
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for _, attributes in page.tags:
        for name in attributes.get("aria-labelledby", "").split():
            assert name in identifiers


def test_policy_lets_only_our_script_run(tmp_path):
    text = report([make_comparison(tmp_path / "c")])
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(m["content"] for m in Page(text).all("meta") if "http-equiv" in m)
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_page_is_made_for_phone_dark_and_paper(tmp_path):
    text = report([make_comparison(tmp_path / "c")])
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(text).all(
        "meta"
    )
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media print" in text


def test_page_tells_the_comparison(tmp_path):
    words = Page(report([make_comparison(tmp_path / "c")])).words
    assert "digits.terngrad against digits.sync" in words
    assert (
        "digits.terngrad sent 16.0 times fewer bits than digits.sync and took about as long. "
        "Its accuracy was the same with each of the 3 seeds." in words
    )
    assert "16.0\u00d7 fewer" in words
    assert "81.00 ± 2.48" in words  # 0.80, 0.81, 0.82: 4.30265 * 1 / sqrt(3)
    assert "The same in all: steps 60." in words


def test_seconds_have_an_interval_where_there_are_seeds(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        make_run(folder, seed=seed, wall_s=2.0 + seed, compute_s=1.5, wait_s=None)
    words = Page(report(folders)).words
    assert "wall, slowest worker s 2.50 ± 6.35 " in words  # 12.7062 * 0.7071 / sqrt(2)
    assert "computing s 1.50 ± 0 " in words and "waiting s" not in words
    assert "messages 14,001 Time" in words, "what is counted has none"
    assert "Behind ±: 95 % intervals over seeds." in words
    assert "±" not in Page(report(folders[:1])).words


def test_page_is_the_same_for_the_same_runs(tmp_path):
    folder = make_comparison(tmp_path / "c")
    assert report([folder]) == report([folder])


def test_charts_for_each_axis(tmp_path):
    page = Page(report([make_comparison(tmp_path / "c")]))
    charts = [(a["data-measure"], a["data-axis"]) for a in page.all("svg") if "data-axis" in a]
    axes = ("step", "seconds", "bits")
    assert charts == [(m, axis) for m in ("accuracy", "loss") for axis in axes]
    assert [a["id"] for a in page.all("input")] == ["axis-step", "axis-seconds", "axis-bits"]
    assert ["checked" in a for a in page.all("input")] == [True, False, False]
    words = page.words
    assert "digits.sync ends at 81 %; digits.terngrad ends at 81 %." in words


def test_readout_has_the_figures(tmp_path):
    text = report([make_comparison(tmp_path / "c")])
    data = json.loads(re.search(r'id="curves">(.*?)</script>', text, re.S)[1])
    first = data["accuracy"]["series"][0]
    assert first["name"] == "digits.sync"
    assert first["step"] == [0, 20, 40, 60]
    assert first["y"] == [11, 51, 71, 81]
    assert first["low"] == [10, 50, 70, 80]
    assert first["bits"] == [0, 2e7, 4e7, 6e7]


def test_single_run_has_no_differences(tmp_path):
    make_run(tmp_path / "r", bits=500_000)
    page = Page(report([tmp_path / "r"]))
    assert "digits.sync, seed 0" in page.words
    assert "digits.sync reached an accuracy of 80.00 % in 3 epochs." in page.words
    assert "difference" not in page.words
    assert "baseline" not in page.words


def test_single_worker_has_no_bits_axis(tmp_path):
    make_run(tmp_path / "r", bits=0, workers=1)
    page = Page(report([tmp_path / "r"]))
    assert [a["id"] for a in page.all("input")] == ["axis-step", "axis-seconds"]
    assert "Bits sent" not in page.words


def test_run_without_curves_still_has_a_ledger(tmp_path):
    make_run(tmp_path / "r")
    for name in ("metrics.jsonl", "ledger.jsonl", "run.json"):
        (tmp_path / "r" / name).unlink()
    words = Page(report([tmp_path / "r"])).words
    assert "60.0" in words
    assert "Training loss" not in words
    assert "Worker by worker" not in words


def test_several_folders_and_a_mixture(tmp_path):
    make_comparison(tmp_path / "c", seeds=1)
    make_run(tmp_path / "r", "digits.slim_dp", bits=100_000)
    runs, baseline = collect([tmp_path / "r", tmp_path / "c", tmp_path / "c"])
    assert [run.experiment for run in runs] == ["digits.slim_dp", "digits.sync", "digits.terngrad"]
    assert baseline == "digits.sync"
    words = Page(report([tmp_path / "r", tmp_path / "c"])).words
    assert "2 ways of training against digits.sync" in words
    assert "with the one seed that was run, which cannot tell a difference from chance" in words


def test_two_runs_of_one_experiment_are_told_apart(tmp_path):
    make_run(tmp_path / "slow")
    make_run(tmp_path / "fast", bits=10)
    words = Page(report([tmp_path / "slow", tmp_path / "fast"])).words
    assert "digits.sync (fast) against digits.sync (slow)" in words


def test_chosen_baseline(tmp_path):
    folder = make_comparison(tmp_path / "c")
    words = Page(report([folder], baseline="digits.terngrad")).words
    assert "digits.sync sent 16.0 times as many bits as digits.terngrad" in words
    with pytest.raises(StoreError, match="the baseline 'x' is not among the experiments"):
        report([folder], baseline="x")


def test_text_from_folders_is_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><b>&"
    make_run(tmp_path / "r", experiment=evil)
    made = json.loads((tmp_path / "r" / "run.json").read_text())
    made["method"] = evil
    made["arguments"] = {evil: [evil]}
    (tmp_path / "r" / "run.json").write_text(json.dumps(made))
    text = report([tmp_path / "r"])
    assert "alert(1)</script>" not in text
    assert "<b>" not in text
    page = Page(text)
    assert len(page.all("script")) == 2
    data = json.loads(re.search(r'id="curves">(.*?)</script>', text, re.S)[1])
    assert data["accuracy"]["series"][0]["name"] == evil


def test_seeds_made_alike_are_described_once(tmp_path):
    folder = make_comparison(tmp_path / "c", seeds=2)
    page = Page(report([folder]))
    assert page.words.count("AllReduce(codec=Identity())") == 2
    assert page.words.count("seeds 0, 1") == 2
    changed = folder / "digits.sync" / "seed-1" / "run.json"
    changed.write_text(changed.read_text().replace("abc123", "fff000"))
    assert Page(report([folder])).words.count("AllReduce(codec=Identity())") == 3


def test_every_worker_is_listed(tmp_path):
    words = Page(report([make_comparison(tmp_path / "c", seeds=2)])).words
    assert "8 ledgers" in words
    assert words.count("7,001") == 4


def test_cut_last_line_is_tolerated(tmp_path):
    make_run(tmp_path / "r")
    metrics = tmp_path / "r" / "metrics.jsonl"
    before = len(read_run(tmp_path / "r").steps)
    metrics.write_text(metrics.read_text() + '{"kind": "step", "st')
    assert len(read_run(tmp_path / "r").steps) == before


def test_folder_without_a_run(tmp_path):
    with pytest.raises(StoreError, match=r"holds neither summary\.json nor compare\.json"):
        report([tmp_path])
    with pytest.raises(StoreError, match="nowhere does not exist"):
        report([tmp_path / "nowhere"])
    with pytest.raises(StoreError, match="nothing to report"):
        report([])


def test_unfinished_run_says_how_to_go_on(tmp_path):
    make_run(tmp_path / "r")
    (tmp_path / "r" / "summary.json").unlink()
    with pytest.raises(StoreError, match=r"not finished. Go on with `sterna run --resume .*/r`"):
        report([tmp_path / "r"])


def test_unfinished_comparison_says_what_can_be_named(tmp_path):
    folder = make_comparison(tmp_path / "c", seeds=1)
    (folder / "compare.json").unlink()
    with pytest.raises(StoreError, match=r"comparison is not finished.*digits\.sync/seed-0\."):
        report([folder])


def test_other_format_is_refused(tmp_path):
    make_run(tmp_path / "r")
    (tmp_path / "r" / "run.json").write_text('{"format": 7}')
    with pytest.raises(StoreError, match=r"run\.json has format 7; .*`sterna run` again"):
        report([tmp_path / "r"])


def test_comparison_that_lost_a_run(tmp_path):
    folder = make_comparison(tmp_path / "c", seeds=1)
    (folder / "digits.sync").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"digits\.sync/seed-0 does not exist"):
        report([folder])


def test_file_is_written_whole(tmp_path):
    make_run(tmp_path / "r")
    path = write_report([tmp_path / "r"], tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == report([tmp_path / "r"])
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert write_report([tmp_path / "r"], tmp_path).name == "report.html"


def test_long_runs_stay_small(tmp_path):
    for place in range(12):
        make_run(tmp_path / str(place), f"digits.method_{place}", steps=1000)
    text = report([tmp_path / str(place) for place in range(12)])
    assert len(text) < 500_000
    curve = loss_curves(collect([tmp_path / "0"])[0])[0]
    assert len(curve.mean) == POINTS
    assert curve.window == 75


def test_curve_is_the_mean_over_seeds_with_their_range(tmp_path):
    runs, _ = collect([make_comparison(tmp_path / "c", sync=100)])
    (curve,) = score_curves(runs, "accuracy")
    assert curve.mean == pytest.approx([0.11, 0.51, 0.71, 0.81])
    assert curve.low == pytest.approx([0.10, 0.50, 0.70, 0.80])
    assert curve.high == pytest.approx([0.12, 0.52, 0.72, 0.82])
    assert curve.x["bits"].tolist() == [0, 2000, 4000, 6000]


def test_bits_of_steps_are_interpolated(tmp_path):
    make_run(tmp_path / "r", bits=100)
    (curve,) = loss_curves([read_run(tmp_path / "r")])
    assert curve.x["bits"] == pytest.approx(curve.x["step"] * 100)


def test_value_that_is_not_finite_breaks_the_line(tmp_path):
    make_run(tmp_path / "r")
    path = tmp_path / "r" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.5', '"accuracy": NaN'))
    curves = score_curves([read_run(tmp_path / "r")], "accuracy")
    assert math.isnan(curves[0].mean[1])
    line = re.search(r'class="line" d="([^"]*)"', line_chart(curves, ACCURACY, "step"))[1]
    assert (line.count("M"), line.count("L")) == (2, 1)
    assert "nan" not in report([tmp_path / "r"]).lower().replace("nan(", "")


def test_bits_axis_is_logarithmic_when_far_apart(tmp_path):
    near = make_comparison(tmp_path / "near", seeds=1, a=1000, b=900)
    far = make_comparison(tmp_path / "far", seeds=1, a=1000, b=10)
    for folder, log in ((near, False), (far, True)):
        curves = score_curves(collect([folder])[0], "accuracy")
        assert scales(curves, ACCURACY, "bits")[0].log is log
        assert ("logarithmic" in line_chart(curves, ACCURACY, "bits")) is log


def test_smoothing_and_thinning():
    assert smooth(np.array([3.0, 3.0, 9.0, 3.0, 3.0]), 3).tolist() == [3, 5, 5, 5, 3]
    spoilt = smooth(np.array([1.0, 1.0, np.nan, 1.0, 1.0]), 3)
    assert np.isnan(spoilt).tolist() == [False, True, True, True, False]
    assert thin(5).tolist() == [0, 1, 2, 3, 4]
    assert (len(thin(1000)), thin(1000)[0], thin(1000)[-1]) == (POINTS, 0, 999)


def test_ticks_are_round_and_inside():
    assert Scale(low=0, high=115, start=0, end=1).ticks() == [0, 20, 40, 60, 80, 100]
    assert Scale(low=91.6, high=96.3, start=0, end=1).ticks() == [92, 93, 94, 95, 96]
    assert Scale(low=2, high=3e4, start=0, end=1, log=True).ticks() == [10, 100, 1000, 10000]
    assert Scale(low=3, high=30, start=0, end=1, log=True).ticks() == [5, 10, 20]


def test_scale_places_values():
    log = Scale(low=1, high=100, start=0, end=10, log=True)
    assert log(10) == pytest.approx(5)
    assert not log.shows(0)
    assert not log.shows(math.nan)
    assert around([], log=True) == (0.1, 1.0)
    assert around([5.0, 5.0])[0] < 5 < around([5.0, 5.0])[1]
    assert decades([1, 1000, 0, math.nan]) == pytest.approx(3)
