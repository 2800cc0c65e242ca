"""Warm-up: what is sent when, what the messages say, who adds them up."""

from typing import Any

import pytest
import torch
from torch import Tensor

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
from sterna.exchange.state_by_name import StateByName
from sterna.randomness import generator
from sterna.seams import Codec, Comm, Message


def gradient(seed: object = 0, size: int = 600) -> dict[str, Tensor]:
    rng = generator(0, "warm up", seed)
    return {"w": torch.randn(size, generator=rng), "b": torch.randn(3, generator=rng)}


def kinds(codec: Codec, num: int) -> list[tuple[str, ...]]:
    """Buffers of so many messages, each decoded by a peer that has sent none."""
    found, rng, state = [], generator(1), codec.init(gradient())
    for step in range(num):
        message, state = codec.encode(gradient(step), state, Solo(), rng)
        found.append(tuple(message.buffers))
        decoded = codec.decode(Message(dict(message.buffers)), gradient(step))
        assert decoded["w"].shape == (600,)
    return found


def test_plain_first_and_the_codec_after_it() -> None:
    codec = WarmUp(inner=TernGrad(), steps=2)
    assert kinds(codec, 4) == [("first.values",)] * 2 + [("scale", "code")] * 2
    message, _ = codec.encode(gradient(), codec.init(gradient()), Solo(), generator(0))
    decoded = codec.decode(message, gradient())
    assert all(torch.equal(decoded[name], x) for name, x in gradient().items()), "to the bit"


def test_another_codec_first() -> None:
    codec = WarmUp(inner=Quantise(step=2.0), steps=1, first=Quantise(step=0.5, relative=False))
    first, then = kinds(codec, 2)
    assert first == ("first.code", "first.far")
    assert then == ("code", "far", "step")


def test_coarser_in_stages() -> None:
    """One warm-up in another: a peer tells all three kinds apart."""
    inner = WarmUp(inner=Quantise(step=2.0), steps=2, first=Quantise(step=0.5))
    codec = WarmUp(inner=inner, steps=1)
    quantised = ("code", "far", "step")
    assert kinds(codec, 5) == [
        ("first.values",),
        *[tuple(f"+first.{name}" for name in quantised)] * 2,
        *[quantised] * 2,
    ]
    state, errors = codec.init(gradient()), []
    for _ in range(4):
        message, state = codec.encode(gradient(), state, Solo(), generator(0))
        errors.append(float((codec.decode(message, gradient())["w"] - gradient()["w"]).norm()))
    assert errors[0] == 0.0 < errors[1] == errors[2] < errors[3]


def test_each_parameter_is_counted_for_itself() -> None:
    """DDP hands over buckets, and builds them anew: a bucket waits for the last of its parameters."""
    codec, state = WarmUp(inner=TernGrad(), steps=2), StateByName()
    state.merge(codec.init(gradient()))
    kinds = []
    for names in (("w",), ("w",), ("w",), ("b", "w"), ("b", "w"), ("b", "w"), ("b",)):
        named = {name: gradient()[name] for name in names}
        message, after = codec.encode(named, state.of(names), Solo(), generator(0))
        state.put(names, after)
        kinds.append("first.values" in message.buffers)
    assert kinds == [True, True, False, True, True, False, False]
    assert state.collected()["sent.b"].tolist() == 2
    with pytest.raises(ValueError, match="WarmUp: nothing is counted for 'other'; call init"):
        codec.encode({"other": torch.ones(2)}, codec.init(gradient()), Solo(), generator(0))


def test_error_feedback_owes_nothing_while_all_is_sent() -> None:
    for codec in (
        ErrorFeedback(inner=WarmUp(inner=TernGrad(), steps=2)),
        WarmUp(inner=ErrorFeedback(inner=TernGrad()), steps=2),
    ):
        state = codec.init(gradient())
        slot = next(slot for slot in state if slot.endswith("residual"))
        owed = []
        for step in range(3):
            _, state = codec.encode(gradient(step), state, Solo(), generator(step))
            owed.append(float(state[slot]["w"].abs().max()))
        assert owed[:2] == [0.0, 0.0] and owed[2] > 0


@pytest.mark.parametrize("size", [2, 4, 7])
def test_plain_messages_are_added_by_the_engine(size: int) -> None:
    """2 (N-1)/N messages a worker instead of N-1, whatever comes later, and the exact mean."""

    def worker(comm: Comm, codec: Codec) -> tuple[Tensor, list[int]]:
        means: list[Tensor] = []
        state, sent, rng = codec.init(gradient()), [], generator(comm.rank)
        for step in range(2):
            before = comm.ledger.spent().bits_sent
            named = gradient((step, comm.rank))
            mean, state = two_phase.mean(named, codec, state, comm, rng)
            sent.append(comm.ledger.spent().bits_sent - before)
            means.append(mean.buffer.clone())
        return means[0], sent

    for inner in (TernGrad(), Entropy(inner=TernGrad()), ErrorFeedback(inner=TernGrad())):
        codec = WarmUp(inner=inner, steps=1)
        found = run_in_process(lambda comm, c=codec: worker(comm, c), size)  # type: ignore[misc]
        expected = sum(torch.cat(list(gradient((0, rank)).values())) for rank in range(size)) / size
        for mean, sent in found:
            assert torch.allclose(mean, expected, atol=1e-6)
            assert torch.equal(mean, found[0][0])
            assert sent[0] == 8 * 2 * (size - 1) * 603 * 4 // size
            assert sent[1] < (size - 1) * 603 * 8
    assert WarmUp(inner=Fp16(), steps=3).summable and not codec.summable
    assert WarmUp(inner=Identity(), steps=1, first=TernGrad(clip=None)).unbiased
    assert not WarmUp(inner=TernGrad(), steps=1).unbiased


@pytest.mark.parametrize("first", [None, Fp16(), Quantise()], ids=repr)
def test_two_phases_after_the_warm_up(first: Codec | None) -> None:
    """Equal to the gather, message by message; the plan holds from the first one on."""
    codec = ErrorFeedback(inner=WarmUp(inner=TernGrad(), steps=2, first=first))
    forced, gather = (two_phase.Plan(way, None, None, "forced") for way in (True, False))

    def worker(comm: Comm) -> list[list[Tensor]]:
        found = []
        for plan in (forced, gather):
            state, rng = codec.init(gradient()), generator(3, comm.rank)
            found.append([])
            for step in range(4):
                named = gradient((step, comm.rank))
                mean, state = two_phase.mean(named, codec, state, comm, rng, plan)
                found[-1].append(mean.buffer.clone())
        return found

    for phases, gathered in run_in_process(worker, 3):
        assert all(torch.equal(a, b) for a, b in zip(phases, gathered, strict=True))
    assert two_phase.choose(codec, {"w": torch.zeros(10**6)}, 8).two_phase


def test_messages_of_both_kinds_are_refused() -> None:
    codec = WarmUp(inner=TernGrad(), steps=1)
    first, state = codec.encode(gradient(), codec.init(gradient()), Solo(), generator(0))
    then, _ = codec.encode(gradient(), state, Solo(), generator(0))
    with pytest.raises(ValueError, match="WarmUp: one buffer is of the warm-up and another is not"):
        codec.decode_mean([first, then], gradient())
    with pytest.raises(ValueError, match=r"WarmUp: buffer 'values' must be .* \(603,\)"):
        codec.decode(Message({"first.values": torch.zeros(4)}), gradient())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": TernGrad, "steps": 1}, "inner must be a codec"),
        ({"inner": None, "steps": 1}, "inner must be a codec; got None"),
        ({"inner": TernGrad(), "steps": 1, "first": "fp16"}, "first must be a codec; got 'fp16'"),
        ({"inner": TernGrad(), "steps": 0}, "steps must be a whole number of messages.*; got 0"),
        ({"inner": TernGrad(), "steps": 1.5}, "got 1.5. Without a warm-up use the inner codec"),
    ],
)
def test_bad_hyperparameters(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^WarmUp: .*{words}"):
        WarmUp(**options)
