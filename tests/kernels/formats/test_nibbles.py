"""Codes of a sign and a rank, two in a byte."""

import pytest
import torch

from dirotq.kernels.formats.nibbles import pack_ranked, unpack_ranked

MAGNITUDES = (0, 1, 3, 7, 20, 50, 90, 127)


def codes(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int8)


def test_the_rank_is_in_three_bits_and_the_sign_in_the_fourth():
    packed = pack_ranked(codes(1, -1, 127, -127, 0, 3), MAGNITUDES)
    assert packed.tolist() == [[0x91, 0xF7, 0x20]]  # the even column's nibble is the low one


def test_every_nibble_comes_back():
    each = codes(*MAGNITUDES, *(-m for m in MAGNITUDES))
    assert torch.equal(unpack_ranked(pack_ranked(each, MAGNITUDES), MAGNITUDES), each)
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(unpack_ranked(every, MAGNITUDES)[:, 0::2].unique(), each.unique())


@pytest.mark.parametrize("wrong", [2, -2, 126, -128])
def test_between_two_magnitudes_there_is_no_code(wrong):
    with pytest.raises(ValueError, match=f"^{wrong} is no code: those are"):
        pack_ranked(codes(1, wrong), MAGNITUDES)


@pytest.mark.parametrize("wrong", [codes(1, 1, 1), codes(1, 1).short()])
def test_pairs_of_int8(wrong):
    with pytest.raises(ValueError, match="codes must be int8 with an even last dim"):
        pack_ranked(wrong, MAGNITUDES)
