"""Timing models side by side."""

import threading

import pytest
import torch
from torch import nn

from sterna.export import timing
from sterna.export.timing import Timing, Timings, time_models
from sterna.randomness import isolated


@pytest.fixture(autouse=True)
def same_start():
    with isolated(0, "timing tests"):
        yield


def wide_and_narrow():
    wide = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64))
    narrow = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
    return {"wide": wide, "narrow": narrow}


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_less_work_is_faster_and_threads_come_back():
    models, threads = wide_and_narrow(), threading.active_count()
    models["wide"].train()
    before = torch.get_num_threads()
    found = time_models(
        models, torch.ones(2, 64), batch=256, engines=("onnxruntime", "eager"), rounds=7, least=1e-3
    )
    assert [(r.engine, r.model) for r in found.rows] == [
        (engine, model) for engine in ("onnxruntime", "eager") for model in ("wide", "narrow")
    ]
    for row in found.rows:
        assert row.fastest <= row.low <= row.seconds <= row.high
        assert row.ratio_low <= row.ratio <= row.ratio_high
    assert found.of("wide", "eager").ratio == 1.0
    assert found.of("narrow", "eager").ratio > 2 and found.of("narrow", "onnxruntime").ratio > 2
    assert models["wide"].training and torch.get_num_threads() == before
    assert threading.active_count() == threads


def test_what_cannot_run_is_in_the_table_with_the_reason():
    models = {"good": nn.Linear(4, 4), "bad": Branch()}
    found = time_models(
        models, torch.ones(2, 4), batch=4, engines=["onnxruntime", "eager"], rounds=3, least=1e-4
    )
    bad = found.of("bad", "onnxruntime")
    assert bad.seconds is None and bad.ratio is None and "cannot be traced" in bad.unavailable
    assert found.of("bad", "eager").seconds is not None
    assert "| onnxruntime | bad | not available |" in found.markdown()
    assert "bad in onnxruntime: Branch cannot be traced" in found.markdown()
    with pytest.raises(KeyError, match="no 'bad' in 'compiled'"):
        found.of("bad", "compiled")


def test_a_control_that_does_not_run_leaves_no_ratios():
    models = {"bad": Branch(), "good": nn.Linear(4, 4)}
    found = time_models(
        models, torch.ones(2, 4), batch=4, engines=["onnxruntime"], rounds=3, least=1e-4
    )
    good = found.of("good", "onnxruntime")
    assert good.seconds is not None and good.ratio is None


def test_a_compiler_that_fails_is_told(monkeypatch):
    def broken(model, **_):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    found = time_models(
        {"a": nn.Linear(4, 4)}, torch.ones(2, 4), engines=["compiled"], rounds=3, least=1e-4
    )
    assert found.rows == (Timing(model="a", engine="compiled", unavailable="no C++ compiler"),)


def test_rounds_are_interleaved(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "_sample", lambda call, times: order.append(call()) or 1.0)
    calls = {("eager", name): lambda name=name: name for name in "abc"}
    samples = timing._rounds(calls, 4, 1e-9)
    rounds = [order[3 + 3 * k : 6 + 3 * k] for k in range(4)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 4
    assert all(len(values) == 4 for values in samples.values())


def test_batch_and_table():
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append(x.shape)
            return x

    found = time_models(
        {"a": Looks()}, torch.ones(3, 2), batch=5, engines=["eager"], rounds=3, least=1e-5
    )
    assert set(seen) == {(5, 2)}
    assert found.markdown().splitlines()[-1].startswith("Batch 5, one thread, medians of 3")
    assert Timings(**{**found.as_json(), "rows": found.rows}) == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch must be a whole number, at least 1; got 0"),
        ({"threads": True}, "threads must be a whole number"),
        ({"rounds": 2}, "rounds must be a whole number, at least 3"),
        ({"least": 0.0}, "least must be above 0"),
        ({"engines": ()}, "engines must be among onnxruntime, eager, compiled"),
        ({"engines": ("tpu",)}, "engines must be among"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        time_models({"a": nn.Linear(2, 2)}, torch.ones(1, 2), **options)
    with pytest.raises(ValueError, match="at least one, the control"):
        time_models({}, torch.ones(1, 2))


@pytest.mark.slow
def test_compiled():
    found = time_models(wide_and_narrow(), torch.ones(2, 64), engines=["compiled"], rounds=5)
    assert found.of("narrow", "compiled").ratio > 1 and not found.rows[0].unavailable
