"""Weight entropy through training: noted at each evaluation, drawn on the page."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sterna.analysis import weight_entropy
from sterna.analysis.weight_entropy import entropy
from sterna.comm.solo import Solo
from sterna.evaluation import Evaluation
from sterna.randomness import generator, isolated
from sterna.runs.entropy_sections import entropy_curves
from sterna.runs.reading import read_run
from sterna.runs.recorder import Recorder
from sterna.runs.report import report
from sterna.runs.request import Request, build
from sterna.runs.serve import serve
from sterna.runs.setting import Setting
from sterna.runs.worker import work
from unit.test_report import Page, make_run


class Holding(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)


@pytest.mark.parametrize("num", [1, 7, 5000, 2**18, 2**19 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_give_what_the_whole_gives(num, dtype):
    w = (torch.randn(num, generator=generator(num)) * 0.1).to(dtype)
    (layer,) = weight_entropy(Holding(w)).layers
    exact = w.double()
    rms = float(exact.square().mean().sqrt())
    assert layer.rms == pytest.approx(rms, rel=1e-5)
    assert layer.fixed_bits == pytest.approx(entropy(torch.round(exact / 0.02)), abs=1e-3)
    assert layer.relative_bits == pytest.approx(entropy(torch.round(exact / (0.2 * rms))), abs=1e-3)


def test_a_wide_range_is_sorted_not_counted():
    w = torch.tensor([0.0, 1e30, -1e30, 1e30])
    (layer,) = weight_entropy(Holding(w)).layers
    assert layer.fixed_bits == 1.5 and math.isfinite(layer.relative_bits)


def test_ten_million_weights_take_a_fraction_of_a_second():
    """Of this thread's own time; a busy machine does not count."""
    model = Holding(torch.randn(10_000_000, generator=generator(0)) * 0.05)
    weight_entropy(model)
    start = time.thread_time()
    weight_entropy(model)
    assert time.thread_time() - start < 0.6  # 0.2 on a quiet machine


def noted(folder):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["entropy"] for row in found if row["kind"] == "eval"]


@pytest.mark.parametrize("server", [False, True])
def test_every_evaluation_notes_it(tmp_path, server):
    name = "digits.asgd" if server else "digits.sync"
    request = Request(
        experiment=name, arguments={"epochs": 2}, folder=tmp_path / "r", quiet=True,
        setting=Setting(workers=2) if server else None,
    )  # fmt: skip
    serve(request) if server else work(Solo(), request)
    found = noted(request.folder)
    assert len(found) == 3
    for row in found:
        assert (row["step"], row["relative_step"]) == (0.02, 0.2)
        assert 0 < row["fixed_bits"] < 12 and 0 < row["relative_bits"] < 12
    assert len({row["fixed_bits"] for row in found}) == 3  # the weights of then, not of the end
    saved = load_file(request.folder / "model.safetensors")
    assert set(found[-1]["layers"]) == set(saved)
    for layer, (fixed, relative) in found[-1]["layers"].items():
        (exact,) = weight_entropy(Holding(saved[layer])).layers
        assert fixed == pytest.approx(exact.fixed_bits, rel=1e-4)
        assert relative == pytest.approx(exact.relative_bits, rel=1e-4)


def test_diverged_weights_are_null(tmp_path):
    request = Request(
        experiment="digits.sync", arguments={"epochs": 1}, folder=tmp_path / "r", quiet=True
    )
    run = build(request)
    with isolated(0, "model"):
        model = run.model()
    recorder = Recorder(request, run, model, 1, "solo", leads=True)
    recorder.look_at_weights()
    nn.init.constant_(next(model.parameters()), math.nan)
    recorder.look_at_weights()
    request.folder.mkdir()
    recorder.evaluated(0, 0, Evaluation(1.0, 0.1), [], 0.0, 0)
    recorder.close()
    assert noted(request.folder) == [None]


def with_entropy(folder, name="digits.sync", seed=0, fall=0.5):
    make_run(folder, name, seed)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "eval":
            bits = 4.0 - fall * row["epoch"] + seed
            row["entropy"] = {
                "step": 0.02, "relative_step": 0.2, "fixed_bits": bits, "relative_bits": 5.125,
                "layers": {"1.weight": [bits, 5.25], "<b>": [1.5, 2.5]},
            }  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_draws_the_curve_and_folds_the_layers(tmp_path):
    folders = [with_entropy(tmp_path / f"s{seed}", seed=seed) for seed in range(2)]
    folders.append(with_entropy(tmp_path / "other", "digits.other", fall=-0.25))
    text = report(folders)
    page = Page(text)
    drawn = [a["data-measure"] for a in page.all("svg") if "data-measure" in a]
    assert drawn.count("entropy-fixed") == drawn.count("entropy-relative") == 1
    assert "Weight entropy" in page.words and "steps of 0.02" in page.words
    assert "digits.sync ends at 3 bits; digits.other ends at 4.75 bits." in page.words
    assert "Layer by layer 4 parameter tensors" in page.words
    assert "1.weight 4.50 3.00 5.25 5.25" in page.words  # the mean of two seeds, at first and last
    assert "<b>" not in text.replace("<br>", "") and "&lt;b&gt;" in text
    data = json.loads(text.partition('id="curves">')[2].partition("</script>")[0])
    assert data["entropy-fixed"]["series"][0]["y"] == [4.5, 4, 3.5, 3]
    (chart,) = [a for a in page.all("svg") if a.get("data-measure") == "entropy-fixed"]
    low, high = map(float, chart["data-y"].split())
    assert low <= 2.5 and high >= 5.0  # the start belongs to the picture


def test_runs_without_it_have_no_section(tmp_path):
    make_run(tmp_path / "old")
    assert "Weight entropy" not in report([tmp_path / "old"])
    assert entropy_curves([read_run(tmp_path / "old")]) == []
    mixed = report([tmp_path / "old", with_entropy(tmp_path / "new", "digits.new")])
    assert "Weight entropy" in mixed
