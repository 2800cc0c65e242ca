"""Tensors and messages that are out of the ordinary, through every way of exchanging them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sterna.codecs.entropy import Entropy
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.fp16 import Fp16
from sterna.codecs.identity import Identity
from sterna.codecs.quantise import Quantise
from sterna.codecs.terngrad import TernGrad
from sterna.codecs.warm_up import WarmUp
from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.exchange import two_phase
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.randomness import generator
from sterna.replica import Replica
from sterna.seams import Codec, Comm, Exchange, Message

CODECS: list[Codec] = [
    Identity(),
    Fp16(),
    TernGrad(),
    Quantise(),
    Entropy(inner=TernGrad()),
    ErrorFeedback(inner=Entropy(inner=Quantise(step=2.0)), decay=1.0),
    ErrorFeedback(inner=Entropy(inner=TernGrad())),
    WarmUp(inner=Entropy(inner=TernGrad()), steps=1),
]
ODD = {
    "none": [torch.zeros(0), torch.zeros(3, 0, 2)],
    "one": [torch.tensor(2.0), torch.tensor([-3.0])],
    "repeated": [torch.full((5000,), 0.25), torch.full((7, 9), -1e-3)],
    "zero": [torch.zeros(5000), torch.zeros(())],
    "mixed": [torch.zeros(0), torch.tensor(2.0), torch.full((4097,), -0.5), torch.zeros(33)],
}
EXCHANGES: list[Exchange] = [
    *(AllReduce(codec=codec) for codec in CODECS[2:]),
    *(ModelAverage(every=2, codec=codec) for codec in CODECS[3:]),
    SlimDP(core_ratio=0.15, explorer_ratio=0.15, refresh_every=1),
    SlimDP(core_ratio=1.0, explorer_ratio=0.0),
    SlimDP(core_ratio=0.0, explorer_ratio=0.01),
]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_arrive(codec: Codec, kind: str) -> None:
    """Two messages each, on three workers; what does not vary arrives as it was."""
    named = {f"p{k}": x for k, x in enumerate(ODD[kind])}

    def worker(comm: Comm) -> list[Tensor]:
        state, rng = codec.init(named), generator(0, comm.rank)
        for _ in range(2):
            given = {name: x.clone() for name, x in named.items()}
            mean, state = two_phase.mean(given, codec, state, comm, rng)
        return [x.clone() for x in mean.values()]

    for found in run_in_process(worker, 3):
        for x, original in zip(found, named.values(), strict=True):
            assert x.shape == original.shape
            assert torch.allclose(x, original, rtol=1e-3), "a constant is its own scale"


@pytest.mark.parametrize("step", [2.0, 3.0, 8.0])
@pytest.mark.parametrize("x", [torch.tensor([0.5]), torch.tensor([1.0, -1.0]), torch.ones(70)])
def test_a_wide_relative_step_leaves_nothing_behind_for_ever(step: float, x: Tensor) -> None:
    """All entries are alike, half a step or less: their sum arrives nevertheless."""
    codec = ErrorFeedback(inner=Quantise(step=step), decay=1.0)
    state, total, rng = codec.init({"w": x}), torch.zeros_like(x), generator(0)
    for _ in range(10):
        message, state = codec.encode({"w": x}, state, Solo(), rng)
        total += codec.decode(message, {"w": x})["w"]
    assert torch.allclose(total, 10 * x, rtol=0.2)


class Odd(nn.Module):
    """Parameters of no, one, equal and many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.one = nn.Parameter(torch.tensor(1.0))
        self.same = nn.Parameter(torch.full((6,), 0.5))
        self.many = nn.Parameter(torch.linspace(-1, 1, 50))

    def forward(self, x: Tensor) -> Tensor:
        return self.one * (self.same.sum() + (self.many * x).sum()) + self.none.sum()


@pytest.mark.parametrize("exchange", EXCHANGES, ids=repr)
def test_odd_parameters_train(exchange: Exchange) -> None:
    def worker(comm: Comm) -> tuple[bool, Tensor]:
        model = Odd()
        replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.01))
        state, rng = exchange.init(replica), generator(0, comm.rank)
        for _ in range(6):
            model(torch.full((50,), float(comm.rank + 1))).backward()
            state = exchange(replica, state, comm, rng)
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        agreed = state.get("anchor", dict(model.named_parameters()))
        return finite, torch.cat([x.detach().reshape(-1) for x in agreed.values()])

    found = run_in_process(worker, 3)
    assert all(finite for finite, _ in found)
    assert all(torch.equal(weights, found[0][1]) for _, weights in found)


@pytest.mark.parametrize("num", [1, 2, 3, 10])
@pytest.mark.parametrize("core", [0.0, 0.001, 0.15, 0.5, 1.0])
def test_a_core_never_has_more_weights_than_there_are(num: int, core: float) -> None:
    for explorer in (0.001, 0.15, 1.0 - core):
        if 0 < core + explorer <= 1:
            sizes = SlimDP(core_ratio=core, explorer_ratio=explorer).counts(num)
            assert min(sizes) >= 0 and 1 <= sum(sizes) <= num


@pytest.mark.parametrize("bad", [-0.1, 1.0001, math.inf, math.nan])
@pytest.mark.parametrize("name", ["core_ratio", "explorer_ratio"])
def test_ratios_out_of_range_are_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"SlimDP: {name} must lie in \[0, 1\]; got {bad}"):
        SlimDP(**{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SlimDP(core_ratio=0.0, explorer_ratio=0.0), "add up to more than 0"),
        (lambda: SlimDP(core_ratio=0.7, explorer_ratio=0.7), "at most 1"),
        (lambda: ErrorFeedback(inner=TernGrad(), decay=0.0), r"decay must lie in \(0, 1\]; got 0"),
        (lambda: ErrorFeedback(inner=TernGrad(), decay=math.nan), "decay must lie in"),
        (lambda: TernGrad(clip=math.nan), "clip must be positive or None; got nan"),
    ],
)
def test_other_ratios_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def coded() -> tuple[Codec, dict[str, Tensor], Message]:
    named = {f"layer{k}": torch.randn(9000, generator=generator(k)) for k in range(3)}
    codec = ErrorFeedback(inner=WarmUp(inner=Entropy(inner=TernGrad()), steps=1))
    state = codec.init(named)
    for _ in range(2):
        message, state = codec.encode(named, state, Solo(), generator(3))
    return codec, named, message


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_is_refused_wherever_it_is(bit: int) -> None:
    """Of the payload, tables, part list and head; in all the wrappers' messages; by a tensor's name."""
    codec, named, message = coded()
    for name, x in message.buffers.items():
        for place in range(bit, len(x), 97 if name == "code" else 5):
            broken = x.clone()
            broken[place] ^= 1 << bit
            with pytest.raises(ValueError, match=rf"Entropy: buffer '{name}' of 'layer\d"):
                codec.decode(Message({**message.buffers, name: broken}, ragged=True), named)


def test_two_bits_and_swapped_bytes_are_refused() -> None:
    codec, named, message = coded()
    x = message.buffers["code"]
    rng = generator(8)
    for _ in range(200):
        first, second = torch.randint(len(x), (2,), generator=rng).tolist()
        broken = x.clone()
        broken[first], broken[second] = x[second].clone(), x[first].clone()
        if torch.equal(broken, x):
            broken[first] ^= 3
        with pytest.raises(ValueError, match="Entropy: buffer 'code'"):
            codec.decode(Message({**message.buffers, "code": broken}, ragged=True), named)


def test_a_damaged_message_of_a_peer_ends_the_exchange_by_name() -> None:
    """On the way from rank 1: no worker decodes it to something else."""
    codec = Entropy(inner=TernGrad())

    class Damaging:
        """A transport on which one message arrives damaged."""

        def __init__(self, comm: Comm) -> None:
            self._comm = comm

        def __getattr__(self, name: str) -> Any:
            return getattr(self._comm, name)

        def gather(self, message: Message) -> list[Message]:
            found = list(self._comm.gather(message))
            buffers = {name: x.clone() for name, x in found[1].buffers.items()}
            buffers["code"][-1] ^= 4
            return [found[0], Message(buffers, ragged=True), *found[2:]]

    def worker(comm: Comm) -> None:
        named = {"w": torch.randn(9000, generator=generator(comm.rank))}
        two_phase.mean(named, codec, {}, Damaging(comm), generator(comm.rank))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="Entropy: buffer 'code' of 'w' is truncated or corrupt"):
        run_in_process(worker, 3)


@pytest.mark.parametrize("size", [3, 127, 128, 300])
def test_sums_of_many_workers_do_not_overflow(size: int) -> None:
    """All say 1 everywhere: in bytes 128 of them would be negative."""
    named = {"w": torch.ones(4100)}
    codec = TernGrad(clip=None)
    message, _ = codec.encode(named, {}, Solo(), generator(0))
    mean = codec.decode_mean([message] * size, named)["w"]
    assert torch.allclose(mean, named["w"], rtol=1e-6)
    coder = Entropy(inner=codec)
    message, _ = coder.encode(named, {}, Solo(), generator(0))
    assert torch.allclose(coder.decode_mean([message] * size, named)["w"], named["w"], rtol=1e-6)
    halves, _ = Fp16().encode({"w": torch.full((5,), 60000.0)}, {}, Solo(), generator(0))
    assert halves.buffers["values"].div_(size).mul_(size).isfinite().all(), "divided before the sum"
