"""``sterna compress`` and ``sterna export``: from a trained model to files that can be used again."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sterna.cli.compress import compress_command, export_command
from sterna.cli.usage import UsageError
from sterna.comm.solo import Solo
from sterna.data import Examples, digits
from sterna.models import MLP, ResNet
from sterna.procedures.training import Training
from sterna.randomness import isolated
from sterna.runs import compressors
from sterna.runs.compress import Bench, compress
from sterna.runs.compressed_report import best_reached, conclusion
from sterna.runs.files import StoreError
from sterna.runs.kept import kept_by_layer
from sterna.runs.multiply_adds import multiply_adds
from sterna.runs.request import Request
from sterna.runs.subject import NotNamed, of_module, of_run
from sterna.runs.worker import work
from sterna.surgery import Description, couple, shrink
from sterna.surgery.description import load
from sterna.surgery.low_rank import low_rank
from sterna.surgery.ternary import load_packed

QUICK = Bench(engines=("eager",), rounds=3, batch=8)
MODULE = """
from torch import nn
from sterna.models import MLP


def build():
    return MLP((64, 128, 64, 10))


def text():
    return "not a module"


def images():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
"""


@pytest.fixture(autouse=True)
def same_start():
    with isolated(0, "compress tests"):
        yield


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    request = Request(experiment="digits.sync", arguments={"epochs": 4}, folder=folder, quiet=True)
    work(Solo(), request)
    return folder


@pytest.fixture(scope="module")
def subject(run_folder):
    return of_run(run_folder)


@pytest.fixture(scope="module")
def small_training(subject):
    """A subject and a training that are quick."""
    return replace(subject.training, data=subject.data.validation_split(0.2, seed=0))


@pytest.fixture(scope="module")
def compressed(run_folder, subject, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("out") / "deep" / "small", []
    way = compressors.Magnitude(shares=(0.5, 0.25), finetune_epochs=3)
    bench = Bench(engines=("onnxruntime", "eager"), rounds=3, batch=16)
    outcome = compress(subject, way, folder, keep_accuracy=4.0, bench=bench, say=said.append)
    return folder, outcome, said


def test_the_whole_way(compressed, subject):
    folder, outcome, said = compressed
    assert sorted(p.name for p in folder.iterdir()) == [
        "candidates.json",
        "compress.json",
        "model.onnx",
        "model.safetensors",
        "original.json",
        "report.html",
        "timing.json",
    ]
    summary = json.loads((folder / "compress.json").read_text())
    assert not any(isinstance(value, dict | list) for value in summary.values())
    assert summary["met"] and summary["parameters"] < 0.6 * summary["parameters_dense"]
    assert summary["validation_accuracy"] >= summary["validation_accuracy_dense"] - 0.04 - 1e-9
    assert summary["validation_examples"] + summary["test_examples"] == 360
    assert summary["onnx_bytes"] == (folder / "model.onnx").stat().st_size
    assert summary["model_bits"] == 32 * summary["parameters"]
    assert said[0].startswith("dense: ") and said[1].startswith("50% of units: ")
    timing = json.loads((folder / "timing.json").read_text())
    assert [row["model"] for row in timing["rows"]] == ["dense", "compressed"] * 2
    tried = json.loads((folder / "candidates.json").read_text())["candidates"]
    assert [t["label"] for t in tried] == [t.label for t in outcome.tried]


def test_it_loads_again_and_the_file_agrees(compressed, subject):
    folder, outcome, _ = compressed
    again = of_run(folder)
    assert sum(p.numel() for p in again.model.parameters()) == outcome.summary["parameters"]
    x = subject.data.test.inputs[:7]
    with torch.no_grad():
        expected = again.model(x)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    del session
    right = (again.model(subject.data.test.inputs).argmax(1) == subject.data.test.targets).double()
    s = outcome.summary
    parts = s["accuracy"] * s["test_examples"] + s["validation_accuracy"] * s["validation_examples"]
    assert float(right.sum()) == pytest.approx(parts)


def test_the_page_is_whole_and_alone(compressed):
    text = (compressed[0] / "report.html").read_text()
    assert "What was removed where" in text and "layers.1" in text and "chosen" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http:" not in text
    assert text.count("<svg") == text.count("</svg>") and "$" not in text.partition("<main>")[2]


def test_candidates_have_the_quartiles_of_their_timing(compressed):
    folder, outcome, _ = compressed
    first, kept = outcome.tried[0], ("low", "high", "ratio_low", "ratio_high")
    assert first.low <= first.seconds <= first.high and first.ratio_low <= first.ratio_high
    (tried, *_) = json.loads((folder / "candidates.json").read_text())["candidates"]
    assert [tried[name] for name in kept] == [getattr(first, name) for name in kept]
    assert (folder / "report.html").read_text().count('<th scope="col">quartiles</th>') == 4


def test_warnings_are_told_of_the_chosen_or_of_all(compressed):
    outcome = compressed[1]
    first, *rest = outcome.tried
    tried = (replace(first, notes=("first",)), *(replace(t, notes=("other",)) for t in rest))
    chosen = replace(outcome, tried=tried, summary={**outcome.summary, "candidate": first.label})
    assert chosen.told == (*outcome.cautions, f"{first.label}: first")
    none = replace(outcome, tried=tried, summary={**outcome.summary, "candidate": None})
    assert f"{first.label}: first" in none.told and f"{rest[0].label}: other" in none.told


def test_a_larger_loss_on_the_test_examples_is_said(compressed):
    outcome = compressed[1]
    figures = {"accuracy_dense": 0.98, "accuracy": 0.95, "keep_accuracy": 1.0}
    worse = replace(outcome, summary={**outcome.summary, **figures})
    assert "That is more than the 1 points that --keep-accuracy allows" in " ".join(
        conclusion(worse)
    )
    same = replace(outcome, summary={**outcome.summary, **figures, "accuracy": 0.98})
    assert "more than" not in " ".join(conclusion(same))


def test_a_folder_is_not_written_over(compressed, subject):
    with pytest.raises(StoreError, match="holds a run or a compressed model already"):
        compress(subject, compressors.Magnitude(), compressed[0], keep_accuracy=1.0)


def test_a_target_that_cannot_be_met_keeps_the_table(subject, tmp_path):
    way = compressors.Magnitude(shares=(0.05,), finetune_epochs=0, round_to=1)
    outcome = compress(subject, way, tmp_path / "x", keep_accuracy=0.1, bench=QUICK)
    assert not outcome.met
    names = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert names == ["candidates.json", "compress.json", "report.html"]
    sentence = best_reached(outcome)
    assert "The nearest, 5% of units, has" in sentence and "points less" in sentence
    assert sentence.split(". ")[1][:20] in (tmp_path / "x" / "report.html").read_text()
    assert json.loads((tmp_path / "x" / "compress.json").read_text())["candidate"] is None
    again = compress(
        subject,
        compressors.Magnitude(shares=(0.9,), finetune_epochs=1, round_to=1),
        tmp_path / "x",
        keep_accuracy=20.0,
        bench=QUICK,
    )
    assert again.met and (tmp_path / "x" / "model.safetensors").exists(), (
        "what failed is in nobody's way"
    )


def test_group_lasso_candidates(subject, small_training, tmp_path):
    way = compressors.Ssl(strengths=(0.1,), epochs=2, finetune_epochs=1)
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    (found,) = way.candidates(subject.model, small_training)
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert found.changed and found.label == "strength 0.1"
    found.write(tmp_path / "x.safetensors")
    again = load(MLP((64, 128, 64, 10)), tmp_path / "x.safetensors").eval()
    x = subject.example
    assert torch.equal(again(x), found.model(x))
    assert all(w % 8 == 0 for w in (again.layers[1].out_features, again.layers[3].out_features))


def test_group_lasso_meets_shares(subject, small_training):
    way = compressors.Ssl(shares=(0.3, 0.6), epochs=1, finetune_epochs=0, round_to=1)
    found = list(way.candidates(subject.model, small_training))
    assert [one.label for one in found] == ["60% of work", "30% of work"]
    whole = multiply_adds(subject.model, subject.example[:1])
    shares = [multiply_adds(one.model, subject.example[:1]) / whole for one in found]
    assert shares[0] <= 0.6 and shares[1] <= 0.3


def test_usual_strengths_end_where_an_idle_unit_vanishes(small_training):
    flat = replace(small_training, schedule=lambda done: 1.0)
    steps = 3 * (len(flat.data.train) // flat.batch_size)
    strengths = compressors.Ssl(epochs=3)._usual(flat)
    assert strengths[1] == pytest.approx(1.0 / (0.05 / (1 - 0.9) * steps))
    assert list(strengths) == sorted(strengths)


def test_low_rank_candidates_load_again(subject, small_training, tmp_path):
    way = compressors.LowRank(shares=(0.5, 0.3), epochs=1, finetune_epochs=1, force=0.01)
    first, second = way.candidates(subject.model, small_training)
    assert first.changed and second.bits < first.bits
    first.write(tmp_path / "x.safetensors")
    again = load(MLP((64, 128, 64, 10)), tmp_path / "x.safetensors").eval()
    assert torch.equal(again(subject.example), first.model(subject.example))


def test_low_rank_stops_at_what_can_be_met(subject, small_training):
    way = compressors.LowRank(shares=(0.5, 0.001), finetune_epochs=0)
    stops_at_what_can_be_met(way, subject.model, small_training)


def test_ssl_stops_at_what_can_be_met(subject, small_training):
    way = compressors.Ssl(shares=(0.5, 0.001), epochs=1, finetune_epochs=0)
    stops_at_what_can_be_met(way, subject.model, small_training)


def stops_at_what_can_be_met(way, model, training):
    """What was found before stays; that there is no more is said in words of the command line."""
    said: list[str] = []
    assert [c.label for c in way.candidates(model, training, said.append)] == ["50% of work"]
    (line,) = said
    assert line.startswith("0% of work and less is not tried: --shares 0.001 cannot be met: with")
    with pytest.raises(ValueError, match="cannot be met"):
        list(replace(way, shares=(0.001,)).candidates(model, training))


def test_a_mild_penalty_leaves_the_size_to_the_share(subject, small_training):
    way = compressors.Ssl(shares=(0.75, 0.5), epochs=2, finetune_epochs=0, round_to=1)
    dense = couple(subject.model, small_training.example).multiply_adds
    for share, candidate in zip(
        (0.75, 0.5), way.candidates(subject.model, small_training), strict=True
    ):
        left = couple(candidate.model, small_training.example).multiply_adds / dense
        assert share - 0.1 < left <= share


def test_the_same_widths_are_not_tried_again(subject, small_training):
    said: list[str] = []
    way = compressors.Magnitude(shares=(0.5, 0.48, 0.25), finetune_epochs=0, round_to=16)
    found = list(way.candidates(subject.model, small_training, said.append))
    assert [c.label for c in found] == ["50% of units", "25% of units"]
    assert said == ["48% of units: the same widths again, in multiples of 16; not tried"]


def test_ternary_candidates_are_packed(small_training, tmp_path):
    with isolated(0, "ternary test"):
        model = MLP((64, 16, 10))
    training = replace(small_training, batch_size=16)
    training.fit(model, 5)
    said: list[str] = []
    way = compressors.Ternary(passes=1)
    five, three, rounded = way.candidates(model.eval(), training, said.append)
    assert [line.partition(":")[0] for line in said] == [
        "five values, at most 1 passes over the weights",
        "five values, pass 1",
        "ternary, at most 1 passes over the weights",
        "ternary, pass 1",
    ]
    assert three.label == "ternary" and three.bits < five.bits and rounded.bits == three.bits
    assert three.accuracy >= rounded.accuracy - 0.05
    three.write(tmp_path / "x.safetensors")
    again, grids = load_packed(tmp_path / "x.safetensors", MLP((64, 16, 10)))
    x = training.data.test.inputs
    assert torch.equal(again.eval()(x), three.model(x)) and len(grids) == 2
    assert compressors.Ternary().by_size and not compressors.Magnitude().by_size


def test_ternary_leaves_convolutions_float_and_says_so(tmp_path):
    data = digits.load(shape="image")
    few = Examples(data.train.inputs[:64], data.train.targets[:64])
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    training = Training(data=replace(data, train=few), optimizer=partial(torch.optim.SGD, lr=0.1))
    found = list(compressors.Ternary(passes=1).candidates(model.eval(), training))
    for candidate in found:
        assert candidate.notes == (
            "Stays float, as it is of Conv2d, and only nn.Linear is searched: 0.weight, 3.weight.",
        )
        assert torch.equal(candidate.model[3].weight, model[3].weight)
        assert len(candidate.model[5].weight.unique()) <= 5
    found[2].write(tmp_path / "x.safetensors")
    assert set(load_packed(tmp_path / "x.safetensors", model)[1]) == {"5.weight"}


def test_depth_needs_residual_blocks(subject, small_training):
    way = compressors.Ssl(strengths=(0.1,), depth=1.0, epochs=1)
    with pytest.raises(ValueError, match="depth must be 0 for MLP: it has no residual block"):
        next(way.candidates(subject.model, small_training))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: compressors.Ssl(strengths=(0.0,)), "strengths must be above 0"),
        (lambda: compressors.Ssl(shares=(1.0,)), r"shares must lie in \(0, 1\)"),
        (lambda: compressors.Ssl(strengths=(0.1, 0.2), shares=(0.5,)), "one or none beside shares"),
        (lambda: compressors.Ssl(epochs=0), "epochs must be at least 1; got 0"),
        (lambda: compressors.Magnitude(shares=()), r"shares must lie in \(0, 1\)"),
        (lambda: compressors.LowRank(shares=(1.0,)), "shares must lie"),
        (lambda: compressors.LowRank(force=float("nan")), "force must be finite"),
        (lambda: compressors.Ternary(passes=0), "passes must be a whole number"),
    ],
)
def test_bad_hyperparameters(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_layers_add_up():
    model = MLP((64, 128, 64, 10))
    x = torch.ones(2, 64)
    small, report = shrink(model, x, {"layers.1": range(40)})
    layers = kept_by_layer(model, small, x[:1])
    assert sum(z.parameters_before for z in layers) == report.parameters_before
    assert sum(z.parameters_after for z in layers) == report.parameters_after
    assert sum(z.multiply_adds_after for z in layers) == report.multiply_adds_after // 2
    two, cut = low_rank(model, x, ranks={"layers.1": 8})
    layers = {z.name: z for z in kept_by_layer(model, two, x[:1])}
    assert sum(z.parameters_after for z in layers.values()) == cut.parameters_after
    assert layers["layers.1"].multiply_adds_after == 8 * (64 + 128)
    net = ResNet(depth=8, width=4).eval()
    image = torch.ones(1, 3, 32, 32)
    layers = kept_by_layer(net, net, image)
    assert all(z.parameters_before == z.parameters_after for z in layers)
    assert sum(z.parameters_before for z in layers) == sum(p.numel() for p in net.parameters())


def test_factored_last():
    first = Description(factored={"a": (2, "channel")})
    assert Description(shapes={"b": (1,)}).then(first).factored == first.factored
    with pytest.raises(ValueError, match="factored last"):
        first.then(Description(shapes={"a.0.weight": (1, 4)}))


def test_a_users_own_module(subject, tmp_path, capsys):
    file, weights = tmp_path / "mine.py", tmp_path / "w.safetensors"
    file.write_text(MODULE)
    save_file(subject.model.state_dict(), weights)
    mine = of_module(f"{file}:build", weights, "digits", lr=0.02, batch_size=32, seed=3)
    assert torch.equal(mine.model(mine.example), subject.model(mine.example))
    assert mine.training.batch_size == 32 and mine.original["source"] == f"{file}:build"
    for spec, where, data, said in (
        ("build", None, "digits", "needs --weights"),
        ("build", weights, None, "needs --data: digits, mnist"),
        ("build", tmp_path / "no", "digits", "does not exist"),
        ("build", file, "digits", "is not a safetensors file"),
        ("build", weights, "svhn", "--data must be one of digits"),
        ("text", weights, "digits", "must return a Module"),
        ("images", weights, "digits", "does not fit the model"),
    ):
        kind = NotNamed if data != "digits" or where in (None, tmp_path / "no") else StoreError
        with pytest.raises(kind, match=said), isolated(0, "mine"):
            of_module(f"{file}:{spec}", where, data)
    with isolated(0, "images"):
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    save_file(model.state_dict(), weights)
    assert of_module(f"{file}:images", weights, "digits").example.shape == (2, 1, 8, 8)


def test_ternary_the_whole_way(tmp_path):
    file, weights = tmp_path / "tiny.py", tmp_path / "w.safetensors"
    file.write_text(MODULE.replace("128, 64, 10", "16, 10"))
    save_file(MLP((64, 16, 10)).state_dict(), weights)
    mine = of_module(f"{file}:build", weights, "digits", lr=0.05, batch_size=16)
    mine.training.fit(mine.model, 4)
    way = compressors.Ternary(passes=1)
    outcome = compress(mine, way, tmp_path / "out", keep_accuracy=10.0, bench=QUICK)
    s = outcome.summary
    assert outcome.met and s["candidate"].startswith("ternary")
    assert s["model_bits"] < s["model_bits_dense"] / 10 and s["parameters"] == s["parameters_dense"]
    again = of_run(tmp_path / "out").model
    assert len(again.layers[1].weight.unique()) <= 3
    assert "Mbit" in (tmp_path / "out" / "report.html").read_text()


def test_export_command(run_folder, tmp_path, capsys):
    export_command([str(run_folder), str(tmp_path / "m.onnx")])
    shown = capsys.readouterr().out
    size = (tmp_path / "m.onnx").stat().st_size
    assert f"{size:,} bytes" in shown and "Largest difference from torch" in shown
    with pytest.raises(UsageError, match="is a folder; name the file"):
        export_command([str(run_folder), str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "--method", "magnitude", "--strength", "1"], "--strength is for --method ssl and"),
        (["RUN", "--method", "force", "--strength", "1", "2"], "takes one value"),
        (["RUN", "--keep-accuracy", "-1"], "--keep-accuracy"),
        (["RUN", "--epochs", "0"], "--epochs"),
        (["RUN", "--batch", "0"], "--batch"),
        (["RUN", "--validation", "1"], "--validation"),
        (["RUN", "--strength", "0"], "--strength must be above 0"),
        (["RUN", "--weights", "w"], "--weights is for your_module.py:build"),
        (["nowhere"], "There is no folder nowhere"),
    ],
)
def test_wrong_flags(arguments, said, run_folder):
    given = [str(run_folder) if a == "RUN" else a for a in arguments]
    with pytest.raises(UsageError, match=said):
        compress_command(given)


def test_an_unfinished_run_and_other_folders(run_folder, tmp_path):
    (tmp_path / "run.json").write_text((run_folder / "run.json").read_text())
    with pytest.raises(StoreError, match="is not finished"):
        of_run(tmp_path)
    with pytest.raises(StoreError, match=r"run\.json does not exist"):
        of_run(Path(tmp_path / "other"))
