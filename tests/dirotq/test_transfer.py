"""Copies between devices; those of a GPU are in tests/gpu/test_transfer_cuda.py."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dirotq import transfer


def test_nothing_is_copied_on_a_cpu():
    tensor = torch.randn(1 << 15)
    assert transfer.upload(tensor, "cpu") is tensor
    assert transfer.download(tensor) is tensor


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), slab=st.integers(1, 64))
def test_pieces_are_all_bytes_in_order(rows, columns, slab):
    before, transfer.SLAB = transfer.SLAB, slab
    try:
        source, target = torch.randn(columns, rows).T, torch.empty(rows, columns)
        pieces = list(transfer._pieces(source, target))
        for one, other in pieces:
            assert len(one) <= slab
            other.copy_(one)
    finally:
        transfer.SLAB = before
    assert torch.equal(target, source)
