"""What every codec promises: `sterna.seams.Codec` and DESIGN section 7."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laws.discovery import examples, fresh
from sterna.comm import wire
from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.exchange.averaging import mean as exchange_mean
from sterna.flat import Flat
from sterna.randomness import generator
from sterna.runs import tree
from sterna.seams import Averaging, Codec, Message, NotFinite, State

CODECS = examples("codecs")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = {"conv.weight": (4, 3, 2), "conv.bias": (4,), "scale": (), "fc.weight": (7, 5)}
EXACT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-6, torch.float64: 1e-6}

codecs = pytest.mark.parametrize("codec", CODECS)
shapes = st.lists(
    st.sampled_from([(), (0,), (1,), (3,), (2, 3), (0, 4), (5, 1, 2), (41,)]), max_size=6
)


def tensors(
    seed: object = 0,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Gradients with something zero in them."""
    rng = generator(0, "gradients", seed)
    return {
        name: (torch.randn(shape, generator=rng) * (torch.rand(shape, generator=rng) > 0.1)).to(
            dtype
        )
        for name, shape in shapes.items()
    }


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


def same_form(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a
    )


def stored(state: State) -> State:
    """The state as a checkpoint gives it back."""
    tensors, rest = tree.split({slot: dict(named) for slot, named in state.items()})
    return tree.join(tensors, json.loads(json.dumps(rest)))


def same_state(a: State, b: State) -> bool:
    return list(a) == list(b) and all(same_bits(dict(a[slot]), dict(b[slot])) for slot in a)


def sent(codec: Codec, named: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """What arrives of ``named`` from a sender without history."""
    message, _ = codec.encode(named, codec.init(named), Solo(), rng)
    return {k: v.clone() for k, v in codec.decode(message, named).items()}


def draws_coins(codec: Codec, steps: int = 1) -> bool:
    rng, state = generator(0), codec.init(tensors())
    before = rng.get_state()
    for _ in range(steps):
        _, state = codec.encode(tensors(), state, Solo(), rng)
    return not torch.equal(before, rng.get_state())


@codecs
def test_is_a_codec(codec: Codec) -> None:
    assert isinstance(codec, Codec)
    assert isinstance(codec.summable, bool) and isinstance(codec.unbiased, bool)


@codecs
@given(shapes=shapes, dtype=st.sampled_from(DTYPES), flat=st.booleans(), seed=st.integers(0, 99))
def test_keeps_names_shapes_and_dtypes(
    codec: Codec, shapes: list[tuple[int, ...]], dtype: torch.dtype, flat: bool, seed: int
) -> None:
    named: Any = tensors(seed, {f"p{k}.weight": s for k, s in enumerate(shapes)}, dtype)
    given_ = Flat.of(named) if flat else named
    kept = {name: x.clone() for name, x in named.items()}
    message, _ = codec.encode(given_, codec.init(given_), Solo(), generator(seed))
    assert same_bits(given_, kept), "encode must leave its input alone"
    assert wire.num_bytes(message) == len(wire.pack(message))
    arrived = wire.unpack(wire.pack(message), message, "rank 0")
    decoded = codec.decode(message, given_)
    if named:
        assert same_form(decoded, named)
    assert len(decoded) == len(named)
    assert all(bool(x.isfinite().all()) for x in decoded.values())
    assert same_bits(codec.decode(arrived, given_), decoded)


@codecs
def test_many_small_tensors(codec: Codec) -> None:
    named = tensors(0, {f"layer{k}.bias": (k % 4,) for k in range(300)})
    assert same_form(sent(codec, named, generator(1)), named)


@codecs
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_strides_make_no_difference(codec: Codec, dtype: torch.dtype) -> None:
    named = tensors(0, dtype=dtype)
    turned = {
        name: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x
        for name, x in named.items()
    }
    assert same_bits(sent(codec, turned, generator(1)), sent(codec, named, generator(1)))


@codecs
def test_same_coins_same_message(codec: Codec) -> None:
    named, like = tensors(), Flat.of(tensors())
    first, _ = codec.encode(named, codec.init(named), Solo(), generator(3))
    second, _ = fresh(codec).encode(like, codec.init(like), Solo(), generator(3))
    assert first.ragged == second.ragged
    assert same_bits(first.buffers, second.buffers)


@codecs
def test_other_coins_other_message_where_there_are_coins(codec: Codec) -> None:
    named = tensors(0, {"w": (500,)})
    messages = [codec.encode(named, codec.init(named), Solo(), generator(s))[0] for s in (1, 2)]
    assert same_bits(messages[0].buffers, messages[1].buffers) != draws_coins(codec)


@codecs
def test_any_peer_can_decode(codec: Codec) -> None:
    """With another codec object, from the bytes on the wire, after the sender has moved on."""
    named, state, rng = tensors(), codec.init(tensors()), generator(5)
    for step in range(3):
        named = tensors(step)
        message, state = codec.encode(named, state, Solo(), rng)
        data = wire.pack(message)
        arrived = wire.unpack(data, message, "rank 0")
        expected = {k: v.clone() for k, v in codec.decode(message, named).items()}
        like = {k: torch.zeros_like(v) for k, v in named.items()}
        assert same_bits(fresh(codec).decode(arrived, like), expected)


@codecs
def test_bits_are_the_bytes(codec: Codec) -> None:
    """What the ledger counts for a gather is the packed message, once to each other worker."""

    def worker(comm: Any) -> tuple[int, int]:
        message, _ = codec.encode(tensors(), codec.init(tensors()), comm, generator(comm.rank))
        before = comm.ledger.spent().bits_sent
        comm.gather(message)
        sizes = 8 * 8 * 2 if message.ragged else 0
        return comm.ledger.spent().bits_sent - before - sizes, 8 * len(wire.pack(message))

    for counted, bits in run_in_process(worker, 3):
        assert counted == 2 * bits


def biased_at(
    codec: Codec, named: Mapping[str, Tensor], expected: Mapping[str, Tensor], draws: int = 600
) -> list[str]:
    """Elements whose mean over many draws is five standard errors or more from ``expected``."""
    total = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in named.items()}
    square = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in named.items()}
    rng = generator(11)
    for _ in range(draws):
        for name, x in sent(codec, named, rng).items():
            total[name] += x.double()
            square[name] += x.double() ** 2
    found = []
    for name, x in expected.items():
        mean = total[name] / draws
        error = ((square[name] / draws - mean**2).clamp(min=0) / draws).sqrt()
        off = (mean - x.double()).abs() > 5 * error + 1e-6 * x.double().abs()
        found += [f"{name}[{k}]" for k in off.reshape(-1).nonzero().view(-1).tolist()]
    return found


def steady(seed: int = 0) -> dict[str, Tensor]:
    """Apart from a zero and the largest, no chance is so near 0 or 1 that 600 draws may hide it."""
    rng = generator(seed, "steady")
    found = {}
    for name, shape in {"w": (6, 10), "b": (5,), "one": (1,), "scalar": ()}.items():
        sign = torch.randint(2, shape, generator=rng) * 2 - 1
        found[name] = sign * (0.2 + 0.6 * torch.rand(shape, generator=rng))
        found[name].view(-1)[-1].sign_()
    found["w"][0, 0] = 0.0
    return found


@codecs
def test_declared_unbiased_is_unbiased(codec: Codec) -> None:
    if codec.unbiased:
        assert biased_at(codec, steady(), steady()) == []


@codecs
def test_clipping_is_the_only_bias_of_a_codec_that_clips(codec: Codec) -> None:
    """On data whose largest element is within ``clip`` standard deviations nothing is clipped."""
    clip = getattr(codec, "clip", None)
    named = {k: v for k, v in steady().items() if v.numel() >= 5}
    if clip is not None:
        assert all(v.abs().max() < clip * v.std(correction=0) for v in named.values())
        assert biased_at(codec, named, named) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shrinks:
    """Claims to be unbiased and is off by one part in twenty."""

    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    def init(self, like: Any) -> State:
        return {}

    def encode(self, named: Any, state: State, comm: Any, rng: Any) -> tuple[Message, State]:
        flat = Flat.of(named).buffer
        return Message({"x": 0.95 * flat * 2 * torch.randint(2, flat.shape, generator=rng)}), state

    def decode(self, message: Message, like: Any) -> Any:
        return Flat(Flat.of(like).layout, message.buffers["x"])


def test_the_law_of_unbiasedness_bites() -> None:
    named = {"w": torch.ones(400)}
    assert biased_at(_Shrinks(), named, {"w": torch.full((400,), 0.95)}) == []
    assert biased_at(_Shrinks(), named, {"w": torch.full((400,), 1.2)}) != []


@codecs
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_in_zero_out(codec: Codec, dtype: torch.dtype) -> None:
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    state, rng = codec.init(zeros), generator(0)
    for _ in range(2):
        message, state = codec.encode(zeros, state, Solo(), rng)
        for x in codec.decode(message, zeros).values():
            assert not x.any(), "a zero must stay one"


@codecs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_by_name(codec: Codec, bad: float, dtype: torch.dtype) -> None:
    for name, x in tensors().items():
        broken = tensors(dtype=dtype)
        broken[name].view(-1)[x.numel() // 2] = bad
        with pytest.raises(NotFinite) as caught:
            codec.encode(broken, codec.init(broken), Solo(), generator(0))
        assert repr(name) in str(caught.value)
        assert not any(repr(other) in str(caught.value) for other in SHAPES if other != name)


@codecs
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refusal_leaves_the_state_alone(codec: Codec, bad: float) -> None:
    """So a loop may skip the step, as the error advises, and go on."""
    state, rng = codec.init(tensors()), generator(1)
    for step in range(3):
        _, state = codec.encode(tensors(step), state, Solo(), rng)
    kept = stored(state)
    broken = tensors(3)
    broken["fc.weight"][2, 2] = bad
    with pytest.raises(NotFinite):
        codec.encode(broken, state, Solo(), generator(0))
    assert same_state(stored(state), kept)
    after, _ = codec.encode(tensors(4), state, Solo(), generator(2))
    expected, _ = codec.encode(tensors(4), kept, Solo(), generator(2))
    assert same_bits(after.buffers, expected.buffers)


@codecs
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_mean_is_the_mean_of_what_is_decoded(codec: Codec, size: int) -> None:
    def worker(comm: Any) -> tuple[Any, Any, Any]:
        named, rng = tensors(comm.rank), generator(0, comm.rank)
        message, _ = codec.encode(named, codec.init(named), comm, rng)
        single = [
            {k: v.clone() for k, v in codec.decode(m, named).items()} for m in comm.gather(message)
        ]
        quick = codec.decode_mean(comm.gather(message), named) if is_averaging else None
        whole, _ = exchange_mean(named, codec, codec.init(named), comm, generator(0, comm.rank))
        return single, quick and {k: v.clone() for k, v in quick.items()}, dict(whole)

    is_averaging = isinstance(codec, Averaging)
    ranks = run_in_process(worker, size)
    for name in SHAPES:
        expected = torch.stack([one[name] for one in ranks[0][0]]).double().mean(0)
        close = {"rtol": 1e-6, "atol": 1e-6 * float(expected.abs().max())}
        if is_averaging:
            assert torch.allclose(ranks[0][1][name].double(), expected, **close)
        if not codec.summable:
            assert torch.allclose(ranks[0][2][name].double(), expected, **close)
    for _, quick, whole in ranks:
        assert quick is None or same_bits(quick, ranks[0][1]), "ranks must hold the same bits"
        assert same_bits(whole, ranks[0][2]), "ranks must hold the same bits"


@codecs
def test_the_sum_of_summable_messages_decodes_to_the_sum(codec: Codec) -> None:
    if not codec.summable:
        return
    several = [tensors(seed) for seed in range(3)]
    messages = [
        codec.encode(named, codec.init(named), Solo(), generator(k))[0]
        for k, named in enumerate(several)
    ]
    decoded = [codec.decode(m, named) for m, named in zip(messages, several, strict=True)]
    expected = {k: torch.stack([d[k] for d in decoded]).sum(0) for k in SHAPES}
    summed = Message({name: sum(m.buffers[name] for m in messages) for name in messages[0].buffers})
    found = codec.decode(summed, several[0])
    eps = max(EXACT.get(x.dtype, 0.0) for x in summed.buffers.values())
    for name in SHAPES:
        assert torch.allclose(
            found[name], expected[name], rtol=eps, atol=4 * eps * float(expected[name].abs().max())
        )


@codecs
def test_state_is_slot_name_tensor(codec: Codec) -> None:
    state, rng = codec.init(tensors()), generator(0)
    for step in range(2):
        for slot, named in state.items():
            assert isinstance(slot, str) and isinstance(named, Mapping)
            assert set(named) <= set(SHAPES)
            assert all(isinstance(x, Tensor) for x in named.values())
        _, state = codec.encode(tensors(step), state, Solo(), rng)


@codecs
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_survives_save_and_load_in_mid_run(codec: Codec, dtype: torch.dtype) -> None:
    state, rng = codec.init(tensors(dtype=dtype)), generator(1)
    for step in range(3):
        _, state = codec.encode(tensors(step, dtype=dtype), state, Solo(), rng)
    loaded, coins = stored(state), generator(0).set_state(rng.get_state())
    assert same_state(loaded, stored(state))
    for step in range(3, 6):
        named = tensors(step, dtype=dtype)
        message, state = codec.encode(named, state, Solo(), rng)
        again, loaded = codec.encode(named, loaded, Solo(), coins)
        assert same_bits(again.buffers, message.buffers)
    assert same_state(loaded, stored(state))


@codecs
@given(part=st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), seed=st.integers(0, 99))
def test_any_part_of_the_parameters_may_travel(codec: Codec, part: set[str], seed: int) -> None:
    """DDP hands over buckets; the state is that of all parameters."""
    state, rng = codec.init(tensors()), generator(seed)
    _, state = codec.encode(tensors(seed), state, Solo(), rng)
    before = stored(state)
    named = {name: x for name, x in tensors(seed + 1).items() if name in part}
    message, state = codec.encode(named, state, Solo(), rng)
    assert same_form(codec.decode(message, named), named)
    assert list(state) == list(before)
    for slot, kept in before.items():
        assert set(state[slot]) == set(kept), "the state still speaks of all parameters"
        for name in set(kept) - part:
            assert torch.equal(state[slot][name], kept[name]), f"{name} did not travel"


@codecs
def test_buckets_add_up_to_the_whole_where_there_are_no_coins(codec: Codec) -> None:
    if draws_coins(codec, steps=3):
        return
    whole = codec.init(tensors())
    parts = stored(whole)
    for step in range(3):
        named = tensors(step)
        message, whole = codec.encode(named, whole, Solo(), generator(0))
        expected = {k: v.clone() for k, v in codec.decode(message, named).items()}
        for names in (["fc.weight", "scale"], ["conv.weight", "conv.bias"]):
            bucket = {name: named[name] for name in names}
            message, parts = codec.encode(bucket, parts, Solo(), generator(0))
            for name, x in codec.decode(message, bucket).items():
                assert torch.equal(x, expected[name])


@codecs
@given(dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_error_feedback_telescopes(codec: Codec, dtype: torch.dtype, seed: int) -> None:
    """What was decoded and what is left over make up what was put in."""
    if "residual" not in codec.init(tensors()):
        return
    if hasattr(codec, "decay"):
        codec = dataclasses.replace(codec, decay=1.0)
    state, rng = codec.init(tensors(dtype=dtype)), generator(seed)
    put_in = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    got_out = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(8):
        named = tensors((seed, step), dtype=dtype)
        message, state = codec.encode(named, state, Solo(), rng)
        decoded = codec.decode(message, named)
        for name in SHAPES:
            put_in[name] += named[name].double()
            got_out[name] += decoded[name].double()
    for name in SHAPES:
        residual = state["residual"][name]
        assert residual.shape == SHAPES[name]
        size = max(float(residual.abs().max()), float(got_out[name].abs().max()))
        assert torch.allclose(got_out[name] + residual, put_in[name], rtol=0, atol=1e-5 * size)


@codecs
def test_a_message_of_other_tensors_is_refused(codec: Codec) -> None:
    message, _ = codec.encode(tensors(), codec.init(tensors()), Solo(), generator(0))
    other = {"w": torch.zeros(1000)}
    with pytest.raises(ValueError, match=r"shape|buffer"):
        codec.decode(message, other)
