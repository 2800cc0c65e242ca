"""Language models: evaluated word by word, judged by perplexity from the run to the page."""

import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from sterna.cli.commands import dispatch
from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.data import ACCURACY, PERPLEXITY, Dataset, Examples
from sterna.data.merit import MERITS
from sterna.evaluation import Evaluation, evaluate
from sterna.models import LSTMLanguageModel
from sterna.objectives import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.runs.compare import compare
from sterna.runs.conclusion import conclusion
from sterna.runs.files import StoreError
from sterna.runs.multiply_adds import multiply_adds
from sterna.runs.progress import Progress
from sterna.runs.report import report, side_by_side
from sterna.runs.request import Request
from sterna.runs.serve import serve
from sterna.runs.setting import Setting
from sterna.runs.table import ComparisonTable, markdown, run_figures
from sterna.runs.worker import work
from sterna.seams import Batch
from tiny_lm import POSITIONS, WORDS, train
from unit.test_report import Page, make_run

SOURCE = train.__code__.co_filename


def model():
    with isolated(0, "model"):
        return LSTMLanguageModel(WORDS, 8)


def embedding():
    with isolated(0, "model"):
        return nn.Embedding(3, 3)


class Counting(nn.Module):
    """Remembers how many predictions each batch asked for."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes = inner, []

    def forward(self, x):
        out = self.inner(x)
        self.sizes.append(out.shape[:-1].numel())
        return out


def test_evaluation_is_over_all_words():
    examples = train().data.test
    found = evaluate(model(), examples, Solo())
    with torch.no_grad():
        logits = model()(examples.inputs)
    expected = F.cross_entropy(logits.permute(0, 2, 1), examples.targets)
    assert found.loss == pytest.approx(float(expected), rel=1e-6)
    assert found.accuracy == float((logits.argmax(-1) == examples.targets).double().mean())
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.of(PERPLEXITY) == found.perplexity and found.of(ACCURACY) == found.accuracy
    loss, accuracy = found  # a pair
    assert (loss, accuracy) == (found.loss, found.accuracy)


def test_workers_share_an_evaluation_and_account_nothing():
    examples = train().data.train
    alone = evaluate(model(), examples, Solo())

    def worker(comm):
        return evaluate(model(), examples, comm), comm.ledger.spent().bits_sent

    for found, bits in run_in_process(worker, 3):
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
        assert (found.accuracy, bits) == (alone.accuracy, 0)


@pytest.mark.parametrize(("positions", "batch"), [(1, 1000), (35, 28), (4000, 1)])
def test_batches_hold_a_thousand_predictions_at_most(positions, batch):
    words = torch.zeros(2 * batch + 1, positions, dtype=torch.int64)
    counting = Counting(embedding())
    assert evaluate(counting, Examples(words, words), Solo()).accuracy in (0.0, 1.0)
    assert counting.sizes == [batch * positions, batch * positions, positions]


def test_logits_that_do_not_fit_are_refused():
    words = torch.zeros(4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must have shape .*; got \(4, 5, 3\) and"):
        evaluate(embedding(), Examples(words, words[:, :4]), Solo())


def test_a_hopeless_model_has_an_infinite_perplexity():
    assert Evaluation(800.0, 0.0).perplexity == math.inf
    assert Evaluation(0.0, 1.0).perplexity == 1.0


def test_cross_entropy_of_an_example_is_the_mean_over_its_words():
    rng = generator(0)
    logits, targets = torch.randn(3, 4, 7, generator=rng), torch.randint(7, (3, 4), generator=rng)
    loss = CrossEntropy()(nn.Identity(), Batch(logits, targets, torch.arange(3)), rng)
    each = [[F.cross_entropy(logits[i, t], targets[i, t]) for t in range(4)] for i in range(3)]
    torch.testing.assert_close(loss.per_example, torch.tensor(each).mean(1))


def test_multiply_adds_of_an_lstm_are_counted():
    """A word takes 4 h (e + h) in each layer, and h times the vocabulary in the decoder."""
    inputs = torch.zeros(1, POSITIONS, dtype=torch.int64)
    assert multiply_adds(model(), inputs) == POSITIONS * (2 * 4 * 8 * 16 + 8 * WORDS)
    with isolated(0, "model"):
        both = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    assert multiply_adds(both, torch.zeros(1, 3, 5)) == 3 * 2 * 28 * ((5 + 7) + (14 + 7))


def test_a_dataset_is_judged_by_accuracy_unless_it_says_otherwise():
    part = Examples(torch.zeros(10, 3), torch.arange(10) % 2)
    assert Dataset("toy", part, part, classes=2).merit is ACCURACY
    data = train().data
    assert data.merit is PERPLEXITY
    tuning = data.validation_split(0.25, seed=0)
    assert tuning.merit is PERPLEXITY and len(tuning.test) == round(len(data.train) / 4)
    assert not MERITS["perplexity"].higher_is_better


def request(folder, function="train", **arguments):
    return Request(
        experiment=f"tiny_lm.{function}", source=f"{SOURCE}:{function}", arguments=arguments,
        folder=folder, quiet=True, setting=Setting(workers=2) if function == "served" else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A synchronous run and one under a server, in folders side by side."""
    folder = tmp_path_factory.mktemp("runs")
    work(Solo(), request(folder / "train"))
    serve(request(folder / "served", "served"))
    return [folder / "train", folder / "served"]


def rows(folder, kind):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def test_a_run_reports_its_perplexity(finished):
    for folder in finished:
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["accuracy"] is None and summary["return"] is None
        assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
        evaluations = rows(folder, "eval")
        assert [row["epoch"] for row in evaluations] == [0, 1, 2]
        for row in evaluations:
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
            assert 0 <= row["accuracy"] <= 1
        assert evaluations[-1]["perplexity"] == summary["perplexity"]
        assert summary["perplexity"] < evaluations[0]["perplexity"]
    about = json.loads((finished[0] / "run.json").read_text())
    assert about["methods"]["clip_norm"] == "1.0"


def test_a_classifier_has_no_perplexity(tmp_path):
    asked = Request(
        experiment="digits.sync", arguments={"epochs": 1}, folder=tmp_path / "r", quiet=True
    )
    summary = work(Solo(), asked)
    assert summary["perplexity"] is None and 0 < summary["accuracy"] <= 1
    assert all("perplexity" not in row for row in rows(tmp_path / "r", "eval"))


def test_progress_shows_what_the_run_is_judged_by(capsys):
    for merit, score, expected in ((PERPLEXITY, 114.534, "114.53"), (ACCURACY, 0.98, "98.00%")):
        with Progress("x", 3, lambda: 0, merit) as progress:
            progress.evaluated(1, 4.7, score, 8_000_000)
        assert f"test loss 4.7000  {merit.name} {expected}  sent 1.0 MB" in capsys.readouterr().err


def judged(experiment, seed, **score):
    return {"experiment": experiment, "seed": seed, "bits_sent": 100, "wall_s": 1.0, **score}


def test_lower_is_better_in_words():
    runs = [
        judged(name, seed, perplexity=value + seed)
        for name, value in (("ptb.sync", 120.0), ("ptb.good", 118.0), ("ptb.bad", 121.0))
        for seed in range(3)
    ]
    good, bad = conclusion(compare(runs, "ptb.sync"))
    assert "Its perplexity was 2.00 lower, so better, with each of the 3 seeds." in good
    assert "Its perplexity was 1.00 higher, so worse, with" in bad
    assert "points" not in good and "%" not in good.replace("95 %", "")
    assert "reached a perplexity of 121.00 " in conclusion(compare(runs[:3], "ptb.sync"))[0]


def test_two_kinds_in_one_comparison_are_told_apart():
    runs = [judged("ptb.sync", 0, perplexity=120.0), judged("mnist.sync", 0, accuracy=0.99)]
    comparison = compare(runs, "ptb.sync")
    assert "mnist.sync reports accuracy, ptb.sync perplexity: no difference." in comparison.cautions
    table = markdown(comparison).splitlines()
    assert "perplexity | accuracy % | difference |" in table[0]
    assert "| ptb.sync | 1 | 120.00 | \u2013 | \u2013 |" in table[2]
    assert "| mnist.sync | 1 | \u2013 | 99.00 | \u2013 |" in table[3]
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(ComparisonTable(comparison))
    assert "perplexity" in capture.get() and "no difference" in capture.get()
    assert "cannot be compared" in conclusion(comparison)[0]


def test_the_table_of_one_run():
    figures = dict(run_figures({"experiment": "a", "perplexity": 120.5, "accuracy": None}))
    assert figures["perplexity"] == "120.50" and "accuracy, %" not in figures
    assert dict(run_figures({"experiment": "a", "accuracy": 0.5}))["accuracy, %"] == "50.00"


def test_the_page_draws_perplexity(finished):
    page = Page(report(finished))
    assert "Test perplexity" in page.words and "Test accuracy" not in page.words
    assert "judged" not in " ".join(side_by_side(finished)[1].cautions)
    rows_ = page.words
    assert "perplexity" in rows_ and "difference" in rows_


def test_the_page_draws_two_kinds_apart(finished, tmp_path):
    make_run(tmp_path / "digits")
    page = Page(report([finished[0], tmp_path / "digits"]))
    assert "Test perplexity" in page.words and "Test accuracy" in page.words
    charts = [a["data-measure"] for a in page.all("svg") if a.get("data-axis") == "step"]
    assert charts[:3] == ["accuracy", "perplexity", "loss"]  # the baseline is digits.sync


def test_a_target_accuracy_does_not_fit(finished, tmp_path, capsys):
    message = (
        r"target_accuracy is for runs that are judged by accuracy; tiny_lm.train is judged by per"
    )
    with pytest.raises(StoreError, match=message):
        side_by_side(finished, target_accuracy=0.9)
    with pytest.raises(ValueError, match=message):
        compare([{**judged("tiny_lm.train", 0, perplexity=2.0), "seconds_to_target": None}],
                "tiny_lm.train", target_accuracy=0.9)  # fmt: skip
    out = tmp_path / "out"
    names = [f"{SOURCE}:train", "digits.sync"]
    assert dispatch(["compare", *names, "--target-accuracy", "0.9", "--out", str(out)]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "is judged by perplexity. Leave the target out" in said and "Traceback" not in said
    assert not out.exists()  # before anything was trained


def test_a_stored_target_does_not_count_where_it_does_not_fit(finished, tmp_path):
    summary = make_run(tmp_path / "c" / "r")
    held = {"format": 1, "baseline": "digits.sync", "target_accuracy": 0.7,
            "runs": [{**summary, "run": "r", "seconds_to_target": 0.4}]}  # fmt: skip
    (tmp_path / "c" / "compare.json").write_text(json.dumps(held))
    assert side_by_side([tmp_path / "c"])[1].target_accuracy == 0.7
    assert side_by_side([tmp_path / "c", finished[0]])[1].target_accuracy is None
