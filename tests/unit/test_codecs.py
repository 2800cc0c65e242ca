"""What holds for Identity, Fp16 and ErrorFeedback, and for every codec's errors."""

import math

import pytest
import torch

from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.fp16 import Fp16
from sterna.codecs.identity import Identity
from sterna.codecs.terngrad import TernGrad
from sterna.comm.solo import Solo
from sterna.flat import Flat
from sterna.randomness import generator
from sterna.seams import Averaging, Codec, Message, NotFinite

CODECS = [
    Identity(),
    Fp16(),
    TernGrad(),
    TernGrad(clip=None, dense=True),
    TernGrad(share_scalers=False, keep_float=("fc.*",)),
    ErrorFeedback(inner=TernGrad()),
    ErrorFeedback(inner=Identity(), decay=1.0),
    ErrorFeedback(inner=ErrorFeedback(inner=Fp16())),
]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def _named(seed=0, dtype=torch.float32):
    rng = generator(seed)
    shapes = {"conv": (4, 3, 3), "none": (0,), "one": (1,), "scalar": (), "fc.w": (10, 7)}
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}


@each_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_names_shapes_dtype_and_input_are_kept(codec, dtype):
    named = _named(dtype=dtype)
    before = {name: x.clone() for name, x in named.items()}
    assert isinstance(codec, Codec)
    message, _ = codec.encode(named, codec.init(named), Solo(), generator(0))
    decoded = codec.decode(message, named)
    assert list(decoded) == list(named)
    for name, x in named.items():
        assert (decoded[name].shape, decoded[name].dtype) == (x.shape, x.dtype)
        assert torch.equal(x, before[name])


@each_codec
def test_repr_evaluates_back(codec):
    assert eval(repr(codec)) == codec


@each_codec
def test_nothing_to_send(codec):
    message, _ = codec.encode({}, codec.init({}), Solo(), generator(0))
    assert len(codec.decode(message, {})) == 0
    named = {"fc.none": torch.zeros(0, 3)}
    message, _ = codec.encode(named, codec.init(named), Solo(), generator(0))
    assert codec.decode(message, named)["fc.none"].shape == (0, 3)


@each_codec
def test_zero_stays_zero(codec):
    named = {name: torch.zeros_like(x) for name, x in _named().items()}
    message, _ = codec.encode(named, codec.init(named), Solo(), generator(0))
    assert all(not x.any() for x in codec.decode(message, named).values())


@each_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv", "scalar", "fc.w"])
def test_not_finite_is_refused_by_name(codec, bad, name):
    named = Flat.of(_named())
    state = codec.init(named)
    named[name].view(-1)[-1] = bad
    with pytest.raises(NotFinite, match=rf"\w+: gradient of '{name}' holds NaN or infinity"):
        codec.encode(named, state, Solo(), generator(0))


@each_codec
def test_message_of_other_tensors_is_refused(codec):
    named = _named()
    message, _ = codec.encode(named, codec.init(named), Solo(), generator(0))
    with pytest.raises(ValueError, match=r"must be torch\.\w+ of shape"):
        codec.decode(message, {"conv": torch.zeros(500)})
    with pytest.raises(ValueError, match="has no buffer"):
        codec.decode(Message({"other": torch.zeros(3)}), named)


@each_codec
def test_mean_of_messages_is_the_mean_of_what_they_say(codec):
    if not isinstance(codec, Averaging):
        pytest.skip("decodes one by one")
    named = [_named(seed) for seed in range(3)]
    messages = [
        codec.encode(x, codec.init(x), Solo(), generator(seed))[0] for seed, x in enumerate(named)
    ]
    mean = codec.decode_mean(messages, named[0])
    decoded = [codec.decode(message, named[0]) for message in messages]
    for name in named[0]:
        expected = sum(x[name].double() for x in decoded) / 3
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_identity_copies_nothing():
    named = Flat.of(_named())
    message, _ = Identity().encode(named, {}, Solo(), generator(0))
    assert message.buffers["values"].data_ptr() == named.buffer.data_ptr()
    decoded = Identity().decode(message, named)
    assert decoded["conv"].data_ptr() == named["conv"].data_ptr()


def test_identity_takes_finite_values_whose_sum_overflows():
    named = {"w": torch.full((100,), 3e38)}
    message, _ = Identity().encode(named, {}, Solo(), generator(0))
    assert torch.equal(Identity().decode(message, named)["w"], named["w"])


def test_fp16_takes_all_that_fits_and_refuses_the_rest():
    fits = {"a": torch.tensor([65519.0]), "b": torch.tensor([1.0])}
    message, _ = Fp16().encode(fits, {}, Solo(), generator(0))
    assert Fp16().decode(message, fits)["a"].item() == 65504.0
    over = {"b": torch.tensor([1.0]), "a": torch.tensor([-65520.0])}
    with pytest.raises(NotFinite, match=r"Fp16: gradient of 'a' reaches 6\.552e\+04.*Identity"):
        Fp16().encode(over, {}, Solo(), generator(0))


def test_half_the_bytes():
    message, _ = Fp16().encode({"w": torch.zeros(10)}, {}, Solo(), generator(0))
    assert sum(x.nbytes for x in message.buffers.values()) == 20


def test_feedback_by_hand():
    # Fp16 keeps 11 bits: of 1 + 2^-12 it sends 1, and the fourth time the sum of what is left.
    codec, g = ErrorFeedback(inner=Fp16(), decay=1.0), {"w": torch.tensor([1 + 2.0**-12])}
    state, sent = codec.init(g), []
    for _ in range(4):
        message, state = codec.encode(g, state, Solo(), generator(0))
        sent.append(codec.decode(message, g)["w"].item())
    assert sent == [1.0, 1.0, 1 + 2.0**-10, 1.0]
    assert state["residual"]["w"].item() == 4 * 2.0**-12 - 2.0**-10


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_what_was_sent_and_what_is_left_add_up(decay):
    codec = ErrorFeedback(inner=TernGrad(), decay=decay)
    state, left = codec.init(_named()), torch.zeros(())
    for step in range(5):
        g = Flat.of(_named(step))
        message, state = codec.encode(g, state, Solo(), generator(step))
        sent = codec.decode(message, g).buffer
        expected = g.buffer + decay * left - sent
        left = Flat.of(state["residual"]).buffer.clone()
        torch.testing.assert_close(left, expected)


def test_feedback_by_subset_equals_feedback_at_once():
    # Fp16 treats entries alone, so buckets must not change anything; the order is another one too.
    codec = ErrorFeedback(inner=Fp16())
    whole, parts = codec.init(_named()), codec.init(_named())
    for step in range(4):
        named = _named(step)
        message, whole = codec.encode(named, whole, Solo(), generator(0))
        expected = codec.decode(message, named)
        for names in (["fc.w", "none"], ["one"], ["scalar", "conv"]):
            bucket = {name: named[name] for name in names}
            message, parts = codec.encode(bucket, parts, Solo(), generator(0))
            for name, x in codec.decode(message, bucket).items():
                assert torch.equal(x, expected[name])
        for name, x in whole["residual"].items():
            assert torch.equal(x, parts["residual"][name])


def test_parameters_that_are_not_sent_keep_their_residual():
    codec, named = ErrorFeedback(inner=TernGrad()), _named()
    _, state = codec.encode(named, codec.init(named), Solo(), generator(0))
    before = state["residual"]["conv"].clone()
    _, state = codec.encode({"fc.w": named["fc.w"]}, state, Solo(), generator(1))
    assert before.any() and torch.equal(state["residual"]["conv"], before)


def test_exact_tensors_leave_no_residual():
    codec, named = ErrorFeedback(inner=TernGrad(keep_float=("fc.*",))), _named()
    state = codec.init(named)
    for step in range(3):
        _, state = codec.encode(named, state, Solo(), generator(step))
    assert not state["residual"]["fc.w"].any()
    assert state["residual"]["conv"].any()


def test_message_does_not_change_with_the_residual():
    codec, named = ErrorFeedback(inner=Identity()), _named()
    message, state = codec.encode(named, codec.init(named), Solo(), generator(0))
    assert torch.equal(codec.decode(message, named)["conv"], named["conv"])
    assert not Flat.of(state["residual"]).buffer.any()


def test_residual_of_ternary_codes_needs_decay():
    def residual(decay):
        codec, rng = ErrorFeedback(inner=TernGrad(), decay=decay), generator(0)
        state = codec.init({"w": torch.zeros(20_000)})
        for _ in range(100):
            _, state = codec.encode({"w": torch.randn(20_000, generator=rng)}, state, Solo(), rng)
        return state["residual"]["w"].square().mean().sqrt().item()

    assert residual(0.9) < 4
    assert residual(1.0) > 10


def test_state_survives_a_refused_gradient():
    codec, named = ErrorFeedback(inner=TernGrad()), _named()
    _, state = codec.encode(named, codec.init(named), Solo(), generator(0))
    before = Flat.of(state["residual"]).buffer.clone()
    with pytest.raises(NotFinite):
        codec.encode({**named, "one": torch.tensor([math.nan])}, state, Solo(), generator(0))
    assert torch.equal(Flat.of(state["residual"]).buffer, before)


def test_slots_of_the_inner_codec_are_prefixed():
    codec = ErrorFeedback(inner=ErrorFeedback(inner=Fp16()))
    named = _named()
    _, state = codec.encode(named, codec.init(named), Solo(), generator(0))
    assert set(state) == {"residual", "inner.residual"}


def test_unknown_parameter_is_refused():
    codec = ErrorFeedback(inner=Fp16())
    with pytest.raises(ValueError, match="no residual for 'new'; call init with every parameter"):
        codec.encode({"new": torch.ones(1)}, codec.init({}), Solo(), generator(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TernGrad(clip=-1.0), r"TernGrad: clip must be positive or None; got -1\.0\."),
        (lambda: TernGrad(clip=0.0), r"TernGrad: clip must be positive or None; got 0\.0\."),
        (lambda: TernGrad(clip=math.nan), r"TernGrad: clip must be positive or None; got nan\."),
        (lambda: TernGrad(keep_float="fc.*"), r"TernGrad: keep_float must be a tuple .*\('fc|\"fc"),
        (lambda: ErrorFeedback(inner=Fp16(), decay=0.0), r"decay must lie in \(0, 1\]; got 0\.0\."),
        (lambda: ErrorFeedback(inner=Fp16), r"ErrorFeedback: inner must be a codec; got <class"),
        (lambda: ErrorFeedback(inner=None), r"ErrorFeedback: inner must be a codec; got None"),
    ],
)
def test_bad_hyperparameters(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
