"""Facts of TernGrad: its statistics, its bits, its edge cases."""

import math

import pytest
import torch

from sterna.codecs import portable, terngrad
from sterna.codecs.terngrad import TernGrad
from sterna.comm.solo import Solo
from sterna.flat import Flat
from sterna.randomness import generator
from sterna.seams import Message, NotFinite

DRAWS = 10_000


def _encode(codec, named, seed=0, comm=None):
    return codec.encode(named, codec.init(named), comm or Solo(), generator(seed))[0]


def _clipped(x, c=2.5):
    limit = c * x.double().std(correction=0)
    return x.double().clamp(-limit, limit)


@pytest.mark.parametrize("clip", [2.5, None])
@pytest.mark.parametrize("dense", [True, False])
def test_unbiased_towards_the_clipped_gradient_with_the_noise_of_the_formula(clip, dense):
    g = torch.randn(300, generator=generator(1)) ** 3
    target = g.double() if clip is None else _clipped(g, clip)
    # Each copy is a tensor of its own, so one message holds a thousand draws.
    codec, rng = TernGrad(clip=clip, dense=dense), generator(2)
    named = Flat.of({f"copy {k}": g for k in range(1000)})
    total, square = torch.zeros(300).double(), torch.zeros(300).double()
    for _ in range(DRAWS // 1000):
        message, _ = codec.encode(named, {}, Solo(), rng)
        values = codec.decode(message, named).buffer.view(1000, 300).double()
        total += values.sum(0)
        square += (values - target).square().sum(0)
    s = target.abs().max()
    variance = s * target.abs() - target**2
    error = (total / DRAWS - target).abs()
    within = error <= 4 * (variance / DRAWS).sqrt() + 1e-6
    assert within.double().mean().item() >= 0.99
    assert (error <= 5 * (variance / DRAWS).sqrt() + 1e-6).all()
    ratio = (square.sum() / DRAWS / variance.sum()).item()
    assert abs(ratio - 1) < 0.02
    # The sum of all errors: no drift that hides below each entry's noise.
    drift = (total / DRAWS - target).sum() / (variance.sum() / DRAWS).sqrt()
    assert abs(drift.item()) < 4


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_a_gaussian_gradient(seed):
    # 2.5 sigma: noise over signal 1.03 and 68 % zeros, from the integrals of the normal density.
    x = torch.randn(1_000_000, generator=generator(seed))
    named = {"w": x}
    decoded = TernGrad().decode(_encode(TernGrad(), named, seed), named)["w"]
    clipped = _clipped(x)
    ratio = ((decoded.double() - clipped).square().sum() / clipped.square().sum()).item()
    assert abs(ratio - 1.03) < 0.02
    assert abs((decoded == 0).double().mean().item() - 0.68) < 0.01


def test_scaler_is_the_largest_after_clipping():
    g = torch.tensor([1.0] * 50 + [-1.0] * 49 + [100.0])
    clipped = _clipped(g)
    message = _encode(TernGrad(), {"w": g})
    assert message.buffers["scale"].item() == pytest.approx(clipped.max().item(), rel=1e-6)
    assert _encode(TernGrad(clip=None), {"w": g}).buffers["scale"].item() == 100.0
    small = torch.tensor([1.0, -1.0])  # nothing reaches 2.5 sigma
    assert _encode(TernGrad(), {"w": small}).buffers["scale"].item() == 1.0


@pytest.mark.parametrize(
    ("num", "two_bits", "base_3"), [(1, 1, 1), (4096, 1024, 820), (10_001, 2501, 2001)]
)
def test_bytes_on_the_wire(num, two_bits, base_3):
    named = {"w": torch.randn(num, generator=generator(0))}
    for dense, expected in ((False, two_bits), (True, base_3)):
        buffers = _encode(TernGrad(dense=dense), named).buffers
        assert {name: x.nbytes for name, x in buffers.items()} == {"scale": 4, "code": expected}
        assert buffers["scale"].dtype == torch.float32 and buffers["code"].dtype == torch.uint8


def test_constant_and_single_tensors_are_not_clipped_to_nothing():
    named = {"one": torch.tensor([-3.0]), "flat": torch.full((7,), 0.1), "zero": torch.zeros(3)}
    decoded = TernGrad().decode(_encode(TernGrad(), named), named)
    for name, x in named.items():
        assert torch.equal(decoded[name], x)


def test_smallest_gradients_are_sent_without_bias():
    g = torch.full((100_000,), 2.0**-149 * 3)
    g[0] = 2.0**-149 * 12
    decoded = TernGrad(clip=None).decode(_encode(TernGrad(clip=None), {"w": g}), {"w": g})["w"]
    share = (decoded != 0).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(g))


def test_kept_tensors_travel_exactly_and_are_counted():
    named = {name: torch.randn(5, 3, generator=generator(0)) for name in ("conv", "fc.w", "tail")}
    codec = TernGrad(keep_float=("fc.*",))
    message = _encode(codec, named)
    assert {name: tuple(x.shape) for name, x in message.buffers.items()} == {
        "scale": (2,), "code": (8,), "float": (15,),
    }  # fmt: skip
    decoded = codec.decode(message, named)
    assert torch.equal(decoded["fc.w"], named["fc.w"])
    assert len(decoded["conv"].abs().unique()) <= 2
    assert len(decoded["tail"].abs().unique()) <= 2


def test_everything_kept():
    named = {"w": torch.randn(5, generator=generator(0))}
    codec = TernGrad(keep_float=("*",))
    assert torch.equal(codec.decode(_encode(codec, named), named)["w"], named["w"])


def test_pattern_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match=r"'head\.\*' matches none of \['w'\]"):
        TernGrad(keep_float=("head.*",)).init({"w": torch.zeros(1)})


def test_same_generator_same_message_and_another_key_another_message():
    named = {"w": torch.randn(1000, generator=generator(0))}
    first, again, other = (_encode(TernGrad(), named, seed).buffers["code"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_plain_torch_path_gives_the_same_message(monkeypatch):
    named = {f"w{k}": torch.randn(3000, generator=generator(k)) * 10.0**-k for k in range(5)}
    codec = TernGrad(keep_float=("w3",), dense=True)
    expected = _encode(codec, named)
    mean = codec.decode_mean([expected, _encode(codec, named, 1)], named)
    monkeypatch.setattr(terngrad, "kernels", portable)
    found = _encode(codec, named)
    for name, x in expected.buffers.items():
        assert torch.equal(found.buffers[name], x), name
    plain = codec.decode_mean([found, _encode(codec, named, 1)], named)
    assert torch.equal(plain.buffer, mean.buffer)


def test_buffer_that_does_not_lie_contiguously():
    buffer = torch.randn(200, generator=generator(0))
    apart = Flat(Flat.of({"w": buffer[::2]}).layout, buffer[::2])
    packed = {"w": buffer[::2].clone()}
    assert torch.equal(
        _encode(TernGrad(), apart).buffers["code"], _encode(TernGrad(), packed).buffers["code"]
    )


def test_shared_scalers_clip_at_the_workers_own():
    class Other(Solo):
        def max_(self, x):
            return x.fill_(1000.0)

    g = torch.tensor([1.0] * 50 + [-1.0] * 49 + [100.0]).repeat(1000)
    shared = _encode(TernGrad(), {"w": g}, comm=Other())
    assert shared.buffers["scale"].tolist() == [1000.0]
    decoded = TernGrad().decode(shared, {"w": g})["w"]
    share = (decoded[99::100] != 0).double().mean().item()
    expected = _clipped(g).max().item() / 1000
    assert abs(share - expected) < 5 * math.sqrt(expected / 1000)
    alone = _encode(TernGrad(share_scalers=False), {"w": g}, comm=Other())
    assert alone.buffers["scale"].item() < 30


def test_another_workers_infinity_is_told_to_all():
    class Broken(Solo):
        def max_(self, x):
            x[1] = math.inf
            return x

    named = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(NotFinite, match="gradient of 'b' holds NaN or infinity on another worker"):
        _encode(TernGrad(), named, comm=Broken())


def test_own_infinity_takes_part_in_the_maximum_first():
    seen = []

    class Listening(Solo):
        def max_(self, x):
            seen.append(x.clone())
            return x

    with pytest.raises(NotFinite, match=r"gradient of 'a' holds NaN or infinity\."):
        _encode(TernGrad(), {"a": torch.tensor([math.nan, 1.0])}, comm=Listening())
    assert seen[0].isinf().all()


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_corrupt_scaler_is_refused(scale):
    named = {"w": torch.ones(4)}
    code = _encode(TernGrad(), named).buffers["code"]
    with pytest.raises(ValueError, match="scaler is negative or not finite"):
        TernGrad().decode(Message({"scale": torch.tensor([scale]), "code": code}), named)


def test_more_messages_than_a_byte_can_add():
    named = {"w": torch.ones(10)}
    message = _encode(TernGrad(), named)
    for num in (127, 128, 200):
        mean = TernGrad().decode_mean([message] * num, named)["w"]
        torch.testing.assert_close(mean, named["w"])


def test_large_messages_of_many_small_tensors():
    named = {f"w{k}": torch.randn(k % 37, generator=generator(k)) for k in range(900)}
    for dense in (True, False):
        codec = TernGrad(clip=None, dense=dense)
        decoded = codec.decode(_encode(codec, named), named)
        for name, x in named.items():
            if x.numel():
                peak = x.abs().argmax()  # the largest always fires, with its own sign and scaler
                assert decoded[name][peak] == x[peak]
