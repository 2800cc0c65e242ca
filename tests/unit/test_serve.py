"""Asynchronous runs from the command line: settings, flags that do not fit, statistics re-estimated."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sterna.cli.commands import dispatch
from sterna.data.examples import Examples
from sterna.evaluation import reestimate
from sterna.flat import Flat
from sterna.randomness import generator, isolated
from sterna.runs.setting import Setting
from sterna.seams import Push
from sterna.server import DelayCompensation
from sterna.server.delays import Constant, Gamma, LogNormal, PerWorker


@pytest.mark.parametrize(
    ("jitter", "law"), [(0.0, Constant), (0.1, Gamma), (0.01, LogNormal), (1.5, LogNormal)]
)
def test_virtual_machines(jitter: float, law: type) -> None:
    cluster = Setting(workers=3, jitter=jitter, example_s=0.01).virtual(batch=20)
    assert type(cluster.delay) is law and cluster.workers == 3
    draws = [cluster.delay(0, 0, generator(k)) for k in range(400)]
    assert sum(draws) / 400 == pytest.approx(0.2, rel=0.2 * max(jitter, 0.05))
    if 0 < jitter < 1:
        spread = torch.tensor(draws).std() / torch.tensor(draws).mean()
        assert float(spread) == pytest.approx(jitter, rel=0.2)


def test_stragglers_by_worker() -> None:
    law = Setting(workers=4, jitter=0.0, stragglers=((2, 3.0),)).virtual(1000).delay
    assert isinstance(law, PerWorker)
    assert [law(worker, 0, generator(0)) for worker in range(4)] == [1.0, 1.0, 3.0, 1.0]


def test_a_setting_survives_json() -> None:
    setting = Setting(workers=4, stragglers=((0, 2.0),), bandwidth=1e8, latency=1e-3)
    assert Setting.from_json(json.loads(json.dumps(setting.as_json()))) == setting


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["digits.asgd", "--engine", "processes"], "--engine processes is for synchronous"),
        (["digits.sync", "--engine", "local"], "--engine local is for asynchronous experiments"),
        (["digits.sync", "--straggler", "0:4.0"], "--straggler is for the engines virtual, local"),
        (["digits.asgd", "--straggler", "5:4.0"], "--straggler must be workers from 0 to 1; got 5"),
        (
            ["digits.asgd", "--straggler", "0:0.5"],
            "--straggler must be slower by a factor of at least 1 and at most 1,000,000; got 0.5",
        ),
        (["digits.asgd", "--straggler", "0:inf"], "at most 1,000,000; got inf for worker 0"),
        (["digits.asgd", "--straggler", "0"], "--straggler must be WORKER:FACTOR, such as 0:4.0"),
        (["digits.asgd", "--bandwidth", "7"], "--bandwidth: it must be a bandwidth above 0"),
        (["digits.asgd", "--bandwidth", "0Mbps"], "--bandwidth: it must be a bandwidth above 0"),
        (["digits.asgd", "--bandwidth", f"{'9' * 400}bps"], "--bandwidth: it must be a bandwidth"),
        (
            ["digits.asgd", "--latency", "5"],
            "--latency: it must be a time up to 10,000,000s, such as 50us",
        ),
        (
            ["digits.asgd", "--latency", "10000001s"],
            "--latency: it must be a time up to 10,000,000s",
        ),
        (
            ["digits.asgd", "--jitter", "-1"],
            "--jitter must be at least 0 and at most 1000; got -1.0",
        ),
        (["digits.asgd", "--jitter", "inf"], "at least 0 and at most 1000; got inf"),
        (["digits.asgd", "--jitter", "1e200"], "at least 0 and at most 1000; got 1e+200"),
        (
            ["digits.asgd", "--lease", "1"],
            "--lease must be above 1 and at most 10,000,000 seconds; got 1.0",
        ),
        (["digits.asgd", "--lease", "inf"], "at most 10,000,000 seconds; got inf"),
        (["digits.asgd", "--timeout", "inf"], "--timeout must be above 0 and at most 10,000,000"),
        (["digits.asgd", "--timeout", "nan"], "--timeout must be above 0 and at most 10,000,000"),
        (["digits.sync", "--timeout", "1e14"], "at most 10,000,000 seconds; got 100000000000000.0"),
        (["digits.asgd", "--example-seconds", "inf"], "--example-seconds must be above 0 and at"),
        (["digits.asgd", "--shards", "0"], "--shards must be at least 1; got 0"),
        (["digits.asgd", "--shards", "2"], "--shards is for --engine ray or torchrun"),
        (
            ["digits.asgd", "--bandwidth", "1Mbps"],
            "--bandwidth is for --engine virtual; digits.asgd",
        ),
        (["digits.asgd", "--jitter", "0.5"], "--jitter is for --engine virtual"),
        (["digits.asgd", "--vectorise"], "--vectorise is for --engine virtual"),
        (
            ["digits.asgd", "--engine", "virtual", "--cluster", "a:1"],
            "--cluster is for --engine ray",
        ),
        (["digits.asgd", "--example-seconds", "0"], "--example-seconds must be above 0"),
        (["digits.asgd", "--device", "cuda"], "--device cuda is for the other engines"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert dispatch(["run", *flags, "--workers", "2", "--out", str(folder)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "message", "status"),
    [
        (
            ["digits.ssp", "--slack", "-1"],
            "--slack must be a whole number of at least 0; got -1",
            2,
        ),
        (
            ["digits.backup", "--backups", "2"],
            "--backups must be less than the 2 workers; got 2",
            2,
        ),
        (["digits.asgd", "--engine", "virtual", "--lr", "1e9"], "gradients were refused", 1),
        (["digits.local_sgd", "--engine", "virtual"], "for asynchronous experiments and plain", 2),
        (
            ["digits.sync", "--engine", "virtual", "--batch-size", "65"],
            "--batch-size must be a multiple of the 2 workers; got 65",
            2,
        ),
    ],
)
def test_what_cannot_be_run_is_named(
    flags: list[str],
    message: str,
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(tmp_path / "run")
    assert dispatch(["run", *flags, "--workers", "2", "--out", folder]) == status
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_virtual_run_replays_and_says_when_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = ["--engine", "virtual", "--workers", "3", "--epochs", "1", "--out", str(folder)]
    assert dispatch(["run", "digits.dc_asgd", *flags]) == 0
    assert dispatch(["run", "--replay", str(folder)]) == 0
    assert (
        "89 gradients computed again, one by one: the weights are equal" in capsys.readouterr().out
    )
    rows = (folder / "updates.jsonl").read_text().splitlines()
    rows[10], rows[11] = rows[11], rows[10]
    (folder / "updates.jsonl").write_text("\n".join(rows) + "\n")
    assert dispatch(["run", "--replay", str(folder)]) == 1
    assert "the weights are others" in " ".join(capsys.readouterr().err.split())


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    flags = ["--engine", "virtual", "--workers", "3", "--epochs", "1", "--out", str(folder)]
    assert dispatch(["run", "digits.asgd", *flags]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert dispatch(["run", "--resume", str(folder)]) == 0
    assert "is finished already" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("change", "flag", "message"),
    [
        ({"shards": 2, "engine": "ray"}, "--replay", "is a run with 2 shards, each with its own"),
        ({"engine": "torchrun"}, "--resume", "resume it as it was started, with 4 processes"),
    ],
)
def test_what_cannot_be_gone_on_with_is_said(
    change: dict[str, object],
    flag: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    flags = ["--engine", "virtual", "--workers", "3", "--epochs", "1", "--out", str(folder)]
    assert dispatch(["run", "digits.asgd", *flags]) == 0
    about = json.loads((folder / "run.json").read_text())
    about["setting"].update(change)
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "summary.json").unlink()
    assert dispatch(["run", flag, str(folder)]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_statistics_are_those_of_the_weights_of_now() -> None:
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    inputs = 3 + 2 * torch.randn(500, 5, generator=generator(0, "inputs"))
    examples = Examples(inputs, torch.zeros(500).long())
    model.train()
    model[1].running_mean.fill_(torch.nan)  # type: ignore[union-attr,operator]
    reestimate(model, examples, count=512)
    hidden = model[0](inputs).detach()
    batches = [hidden[:250], hidden[250:]]  # of equal size
    mean = sum(part.mean(0) for part in batches) / 2
    variance = sum(part.var(0) for part in batches) / 2
    assert torch.allclose(model[1].running_mean, mean, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(model[1].running_var, variance, atol=1e-4)  # type: ignore[arg-type]
    assert model.training and model[1].momentum == 0.1


@pytest.mark.parametrize("decay", [None, 0.95])
@pytest.mark.parametrize("staleness", [0, 3])
def test_the_kernels_are_the_plain_rule(decay: float | None, staleness: int) -> None:
    """Float32 goes through compiled kernels, float64 through torch."""
    rule = DelayCompensation(strength=0.7, decay=decay)
    states = {dtype: {} for dtype in (torch.float32, torch.float64)}
    for step in range(4):
        rng = generator(step, "push")
        drawn = [torch.randn(37, generator=rng, dtype=torch.float64) for _ in range(3)]
        found = {}
        for dtype in states:
            g, w, b = (Flat.of({"w": x.to(dtype)}) for x in drawn)
            state = states[dtype] or rule.init(w)
            push = Push(0, g, w, b if staleness else w, version=step, staleness=staleness)
            update, states[dtype] = rule.correct(push, state)
            found[dtype] = update["w"].double()
        assert torch.allclose(found[torch.float32], found[torch.float64], rtol=1e-4, atol=1e-5)
