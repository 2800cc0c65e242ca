"""The byte format of ternary codes: sizes to the byte, planes in their places, and back again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sterna.codecs import packing


@pytest.mark.parametrize(
    ("num", "two_bits", "base_3"),
    [(0, 0, 0), (1, 1, 1), (4, 1, 1), (5, 2, 1), (6, 2, 2), (4096, 1024, 820), (5121, 1281, 1025)],
)
def test_size_is_exact(num, two_bits, base_3):
    codes = torch.ones(num, dtype=torch.uint8)
    assert len(packing.pack(codes, dense=False)) == packing.num_bytes(num, False) == two_bits
    assert len(packing.pack(codes, dense=True)) == packing.num_bytes(num, True) == base_3


def test_two_bit_byte_by_hand():
    # Q = 2: byte 0 holds codes 0, 2, 4, 6 and byte 1 holds codes 1, 3, 5 and the filler 1.
    codes = torch.tensor([2, 0, 1, 2, 0, 1, 2], dtype=torch.uint8)
    expected = [2 + 4 * 1 + 16 * 0 + 64 * 2, 0 + 4 * 2 + 16 * 1 + 64 * 1]
    assert packing.pack(codes, dense=False).tolist() == expected


def test_base_3_byte_by_hand():
    codes = torch.tensor([2, 0, 1, 2, 0, 1, 2], dtype=torch.uint8)  # Q = 2, three fillers
    expected = [2 + 3 * 1 + 9 * 0 + 27 * 2 + 81 * 1, 0 + 3 * 2 + 9 * 1 + 27 * 1 + 81 * 1]
    assert packing.pack(codes, dense=True).tolist() == expected


def test_first_full_block_is_planar_and_a_new_block_begins_after_it():
    codes = torch.ones(4096 + 1, dtype=torch.uint8)
    codes[1024 + 7] = 2  # second plane, byte 7
    codes[4096] = 0  # alone in the last block
    packed = packing.pack(codes, dense=False)
    assert packed[7].item() == 0b01_01_10_01
    assert packed[8].item() == 0b01_01_01_01
    assert packed[1024].item() == 0b01_01_01_00


@given(st.integers(0, 11_000), st.booleans(), st.integers(0, 2**32))
def test_unpack_inverts_pack(num, dense, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (num,), generator=rng, dtype=torch.uint8)
    assert torch.equal(packing.unpack(packing.pack(codes, dense), num, dense), codes)


def test_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"10 codes take 3 bytes; got \(2,\)"):
        packing.unpack(torch.zeros(2, dtype=torch.uint8), 10, dense=False)
