"""Messages as bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sterna.comm import wire
from sterna.seams import Message

DTYPES = (torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 20)), min_size=1, max_size=4))
def test_unpack_gives_what_was_packed(parts: list[tuple[torch.dtype, int]]) -> None:
    message = Message({f"x{k}": torch.arange(n).to(dtype) for k, (dtype, n) in enumerate(parts)})
    data = wire.pack(message)
    assert data.dtype == torch.uint8 and len(data) == wire.num_bytes(message)
    back = wire.unpack(data, message, "rank 1")
    assert list(back.buffers) == list(message.buffers)
    for name, x in message.buffers.items():
        assert back.buffers[name].dtype == x.dtype
        assert torch.equal(back.buffers[name], x)


def test_size_is_header_and_padded_buffers() -> None:
    message = Message({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(4)})
    assert wire.num_bytes(message) == 8 + 2 * 8 + 8 + 16


def test_what_follows_the_message_is_ignored() -> None:
    message = Message({"a": torch.tensor([1.0, 2.0])}, ragged=True)
    data = torch.cat([wire.pack(message), torch.full((24,), 7, dtype=torch.uint8)])
    assert torch.equal(wire.unpack(data, message, "rank 1").buffers["a"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("kept", [0, 5, 12, 17, 23])
def test_truncated_message_names_the_peer(kept: int) -> None:
    message = Message({"a": torch.ones(2)})
    with pytest.raises(wire.WireError, match="rank 3"):
        wire.unpack(wire.pack(message)[:kept], message, "rank 3")


def test_corrupt_length_is_refused() -> None:
    message = Message({"a": torch.ones(2)})
    for length in (-8, 3, 1 << 40):
        data = wire.pack(message)
        data[8:16].copy_(torch.tensor([length]).view(torch.uint8))
        with pytest.raises(wire.WireError, match="'a'"):
            wire.unpack(data, message, "rank 0")


def test_message_of_another_method_is_refused() -> None:
    sent = wire.pack(Message({"a": torch.ones(2)}))
    for own in ({"b": torch.ones(2)}, {"a": torch.ones(2).half()}, {"a": sent, "b": sent}):
        with pytest.raises(wire.WireError, match="another method or version"):
            wire.unpack(sent, Message(own), "rank 1")
