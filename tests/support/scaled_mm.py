"""``torch._scaled_mm`` where no GPU has it: of the very tensors that it gets."""

import torch
from torch import Tensor


def emulated(a: Tensor, b: Tensor, *, scale_a, scale_b, out_dtype, use_fast_accum) -> Tensor:
    """``torch._scaled_mm`` with row and column scales, and what it demands of its arguments."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.is_contiguous() and b.T.is_contiguous()
    assert a.shape[1] % 16 == b.shape[1] % 16 == 0
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    return (a.double() @ b.double() * scale_a.double() * scale_b.double()).to(out_dtype)
