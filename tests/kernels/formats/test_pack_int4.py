import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dirotq.kernels.formats.pack_int4 import pack_int4, unpack_int4


def test_layout_low_nibble_is_the_even_column():
    codes = torch.tensor([[1, -2, 7, -8]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [[0xE1, 0x87]]
    assert unpack_int4(torch.tensor([[0xE1, 0x87]], dtype=torch.uint8)).tolist() == codes.tolist()


def test_every_pair_of_codes_survives():
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    packed = pack_int4(pairs)
    assert packed.dtype == torch.uint8
    assert packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed), pairs)


@given(st.integers(0, 5), st.integers(0, 17), st.integers(0, 2**32 - 1))
def test_round_trip(rows, half, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 2 * half), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, half)
    assert torch.equal(unpack_int4(packed), codes)


def test_strided_codes_pack_like_contiguous_ones():
    codes = torch.randint(-8, 8, (6, 4), dtype=torch.int8)
    assert torch.equal(pack_int4(codes.T), pack_int4(codes.T.contiguous()))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), r"even last dim.*\(2, 3\)"),
        (torch.zeros(2, 4), "must be int8.*float32"),
        (torch.tensor([[0, 8]], dtype=torch.int8), r"\[-8, 7\], got \[0, 8\]"),
        (torch.tensor([[-9, 0]], dtype=torch.int8), r"\[-8, 7\], got \[-9, 0\]"),
    ],
    ids=["odd", "dtype", "above", "below"],
)
def test_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        pack_int4(codes)
