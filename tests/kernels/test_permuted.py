"""Layout R1: in every 64 columns the even ones first, then the odd ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.permuted import from_permuted, padded, permuted_columns, to_permuted

CPU = torch.device("cpu")


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 4))
def test_there_and_back(width, rows):
    codes = torch.randint(-7, 8, (rows, width), dtype=torch.int8)
    permuted = to_permuted(codes)
    assert permuted.shape == (rows, padded(width))
    assert permuted.dtype == torch.int8
    assert torch.equal(from_permuted(permuted, width), codes)
    assert torch.equal(from_permuted(torch.nn.functional.pad(permuted, (0, 9)), width), codes)


@settings(deadline=None)
@given(st.integers(1, 300))
def test_columns_name_what_stands_where(width):
    columns = permuted_columns(width, CPU)
    assert sorted(columns.tolist()) == list(range(padded(width)))
    codes = torch.arange(1, width + 1)[None]
    padding = torch.nn.functional.pad(codes, (0, padded(width) - width))
    assert torch.equal(to_permuted(codes), padding[:, columns])


@settings(deadline=None)
@given(st.integers(1, 150))
def test_products_do_not_see_the_order(pairs):
    x, w = torch.randn(3, 2 * pairs).double(), torch.randn(4, 2 * pairs).double()
    torch.testing.assert_close(to_permuted(x) @ to_permuted(w).T, x @ w.T)


def test_low_nibbles_of_32_bytes_are_32_neighbours():
    codes = torch.randint(-8, 8, (3, 192), dtype=torch.int8)
    packed, permuted = pack_int4(codes).view(torch.int8), to_permuted(codes)
    for block in range(3):
        bytes_ = packed[:, 32 * block : 32 * block + 32]
        both = torch.cat([(bytes_ << 4) >> 4, bytes_ >> 4], 1)
        assert torch.equal(permuted[:, 64 * block : 64 * block + 64], both)


@pytest.mark.parametrize(
    ("width", "columns"), [(1, 64), (64, 64), (65, 128), (5600, 5632), (2240, 2240)]
)
def test_whole_blocks(width, columns):
    assert padded(width) == columns


def test_a_ragged_block_has_its_even_columns_in_front():
    permuted = to_permuted(torch.arange(1, 97)[None])[0]
    assert permuted[64:80].tolist() == list(range(65, 97, 2))
    assert permuted[96:112].tolist() == list(range(66, 97, 2))
    assert not permuted[80:96].any()
    assert not permuted[112:].any()
