"""Gradients shortened to a norm before the optimizer's step."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sterna.comm.in_process import run_in_process
from sterna.comm.launch import launch
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.local import Local
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.flat import Flat, norm
from sterna.loop import fit
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.runs.replayed import replay_run
from sterna.runs.request import Request
from sterna.runs.serve import serve
from sterna.runs.setting import Setting
from sterna.runs.worker import work
from sterna.samplers.shuffle import Shuffle
from tiny_lm import train


def made(clip_norm=None, **options):
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(70, 130), nn.ReLU(), nn.Linear(130, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    return Replica(model, optimizer, clip_norm=clip_norm)


def gradients(replica, seed):
    rng = generator(seed, "gradients")
    return Flat.of({n: torch.randn(p.shape, generator=rng) for n, p in replica.parameters.items()})


def equal(a, b):
    return all(torch.equal(a.parameters[n], b.parameters[n]) for n in a.parameters)


@pytest.mark.parametrize("num", [0, 1, 4095, 4096, 4097, 100_000])
def test_norm_is_the_euclidean_one(num):
    x = torch.randn(num, generator=generator(num))
    assert float(norm(x)) == pytest.approx(float(x.double().square().sum().sqrt()), rel=1e-6)


def test_norm_does_not_depend_on_the_number_of_threads():
    x = torch.randn(3_000_001, generator=generator(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(float(norm(x)))
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


@pytest.mark.parametrize("longest", [0.5, 5.0, 1e6])
def test_as_torch_clips(longest):
    ours, theirs = made(longest, momentum=0.9), made(momentum=0.9)
    for seed in range(3):
        found = gradients(ours, seed)
        for replica in (ours, theirs):
            replica.gradients.buffer.copy_(found.buffer)
        nn.utils.clip_grad_norm_(theirs.parameters.values(), longest)
        ours.update()
        theirs.update()
    for name, p in ours.parameters.items():
        torch.testing.assert_close(p, theirs.parameters[name])
    assert ours.gradients.buffer.count_nonzero() == 0


def test_the_length_of_a_step_is_bounded():
    replica = made(0.25)
    before = replica.weights.clone()
    replica.gradients.buffer.copy_(gradients(replica, 0).buffer)
    replica.update()
    assert float((replica.weights.buffer - before.buffer).norm()) == pytest.approx(0.025, rel=1e-4)


def test_none_and_a_short_gradient_change_nothing():
    plain, none, far, zero = made(), made(None), made(1e9), made(1.0)
    for replica in (plain, none, far):
        replica.gradients.buffer.copy_(gradients(replica, 0).buffer)
        replica.update()
    assert equal(plain, none) and equal(plain, far)
    zero.update()
    assert equal(zero, made())


@pytest.mark.parametrize("form", ["flat", "loose", "own"])
def test_given_gradients_are_shortened_and_left_alone(form):
    """In one buffer (the fast step), tensor by tensor, or the replica's own: the same weights."""
    replica, expected = made(0.5, momentum=0.9), made(0.5, momentum=0.9)
    for seed in range(3):
        found = gradients(replica, seed)
        kept = found.clone()
        expected.gradients.buffer.copy_(found.buffer)
        expected.update()
        if form == "own":
            replica.gradients.buffer.copy_(found.buffer)
            replica.update()
            continue
        if form == "flat":
            assert replica.weights.buffer.numel() == found.buffer.numel()
        replica.update(found if form == "flat" else dict(reversed(list(found.items()))))
        assert torch.equal(found.buffer, kept.buffer)
    assert equal(replica, expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_out_of_range(bad):
    with pytest.raises(ValueError, match=r"Replica: clip_norm must be above 0 and finite, or None"):
        made(bad)
    with pytest.raises(ValueError, match=r"Run: clip_norm must be above 0 and finite, or None"):
        train(clip_norm=bad)


@pytest.mark.parametrize(
    "exchange",
    [AllReduce(), ModelAverage(every=3), SlimDP(core_ratio=0.3, explorer_ratio=0.7), Local()],
)
def test_every_exchange_steps_with_the_shortened_gradient(exchange):
    run = train(clip_norm=0.05)

    def worker(comm):
        with isolated(0, "model"):
            model = run.model()
        replica = Replica(model, run.optimizer(model.parameters()), clip_norm=run.clip_norm)
        sampler = Shuffle(len(run.data.train), 10, rank=comm.rank, size=comm.size)
        before, lengths = replica.weights.clone(), []
        for record in fit(
            replica, run.data.train, sampler, CrossEntropy(), exchange=exchange, comm=comm
        ):
            if record.step == 1:
                lengths.append(float((replica.weights.buffer - before.buffer).norm()))
        return lengths[0], replica.weights.buffer.clone()

    for length, _ in run_in_process(worker, 2):
        assert 0 < length <= 2.0 * 0.05 * (1 + 1e-4)  # lr times the norm


def test_replicas_stay_equal_to_the_bit_and_over_gloo(tmp_path):
    """Ternary messages are gathered, so two processes give the bits of two threads."""
    here, there = (
        Request(
            experiment="tiny_lm:train",
            source=f"{train.__code__.co_filename}:train",
            arguments={"ternary": True, "clip_norm": 0.1},
            folder=tmp_path / name,
            quiet=True,
        )
        for name in ("threads", "processes")
    )
    run_in_process(lambda comm: work(comm, here), 2)
    launch(work, (there,), workers=2)
    found = [(r.folder / "model.safetensors").read_bytes() for r in (here, there)]
    assert found[0] == found[1]


def test_run_says_its_norm_only_where_it_has_one():
    assert "clip_norm" not in train(clip_norm=None).methods()
    assert train(clip_norm=0.5).methods()["clip_norm"] == "0.5"


def test_beside_a_server_it_is_refused_and_on_a_virtual_clock_it_holds(tmp_path):
    """A synchronous run on the virtual clock shortens as it does elsewhere, and can be replayed."""
    source = train.__code__.co_filename
    request = Request(
        experiment="tiny_lm:served", source=f"{source}:served", arguments={"clip_norm": 1.0},
        folder=tmp_path / "a", quiet=True, setting=Setting(workers=2),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"clip_norm must be None beside a server; got 1\.0.*Server\(clip="
    ):
        serve(request)
    with isolated(0, "model"):
        start = {n: p.detach() for n, p in train().model().named_parameters()}
    moved = []
    for clip_norm in (0.001, 1.0):
        request = Request(
            experiment="tiny_lm:train", source=f"{source}:train",
            arguments={"clip_norm": clip_norm, "epochs": 1}, folder=tmp_path / str(clip_norm),
            quiet=True, setting=Setting(workers=2, engine="virtual"),
        )  # fmt: skip
        steps = serve(request)["steps"]
        weights = load_file(request.folder / "model.safetensors")
        moved.append(
            math.sqrt(sum(float((weights[n] - p).square().sum()) for n, p in start.items()))
        )
        assert replay_run(request.folder, request).equal
    assert (
        0 < moved[0] <= steps * 2.0 * 0.001 * (1 + 1e-4) < moved[1]
    )  # steps of at most lr times norm
