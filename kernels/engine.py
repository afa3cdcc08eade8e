"""Runs a packed linear by its plan.

Letters: M rows, D channels, N outputs, R protected directions, G groups.
"""

import torch
from torch import Tensor

from .lane import beside, fork
from .plan import Plan
from .spec import QuantSpec
from .transform_quantize import quantize_rows, transform
from .w4a4_linear import tiles as w4a4_tiles
from .w4a4_linear import w4a4_linear
from .w4a16_linear import tiles as w4a16_tiles
from .w4a16_linear import w4a16_linear


def run(
    plan: Plan,
    x_MD: Tensor,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    spec: QuantSpec,
) -> Tensor:
    """y [M, N] in x's dtype; buffers as ``kernels.linear.QuantLinear`` describes them."""
    if plan.engine == "reference":
        return reference(x_MD, qweight_NK2, wscale_NG, basis_DR, rotation_DK, wp_NR, bias_N, spec)
    x_MD = x_MD if x_MD.stride(-1) == 1 else x_MD.contiguous()
    with torch.cuda.device_of(x_MD):
        if plan.engine == "w4a16":
            return _w4a16(
                plan, x_MD, qweight_NK2, wscale_NG, basis_DR, rotation_DK, wp_NR, bias_N, spec
            )  # fmt: skip
        from .transform_quantize.kernel import launch as transform_quantize
        from .unpack_w4.kernel import allocate
        from .unpack_w4.kernel import launch as unpack_w4
        from .w4a4_linear.kernel import launch as gemm

        tail = plan.engine == "scaled_mm"
        unpacked = tail or plan.engine == "unpacked"
        given = (wscale_NG, wp_NR, bias_N) if tail else (None, None, None)
        scratch = allocate(qweight_NK2, plan.dtype, *given) if unpacked else None
        start = fork(x_MD.device) if unpacked else None
        codes, scale, c = transform_quantize(
            x_MD, basis_DR, rotation_DK, spec,
            container=plan.dtype, tail=tail, bias=tail and bias_N is not None,
        )  # fmt: skip
        if scratch is not None:
            # The transform mostly waits for memory to answer; unpacking fills some of its gaps.
            with beside(start):
                unpack_w4(qweight_NK2, plan.dtype, *given, out=scratch)
        if tail and scratch is not None:
            weights, scale_w = scratch
            assert scale_w is not None
            return torch._scaled_mm(
                codes, weights.t(), scale_a=scale, scale_b=scale_w, out_dtype=x_MD.dtype,
                use_fast_accum=True,
            )  # fmt: skip
        assert isinstance(plan.tile, w4a4_tiles.Tile)
        return gemm(
            codes, scale, c, qweight_NK2, wscale_NG, wp_NR, bias_N,
            width=spec.width, out_dtype=x_MD.dtype, tile=plan.tile,
            weights_NK=None if scratch is None else scratch[0],
        )  # fmt: skip


def reference(
    x_MD: Tensor,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    spec: QuantSpec,
) -> Tensor:
    """The specification, composed: any device, any floating dtype."""
    z, c = transform(x_MD, basis_DR, rotation_DK, spec)
    if spec.act_bits < 16:
        y = w4a4_linear(*quantize_rows(z, spec), c, qweight_NK2, wscale_NG, wp_NR, bias_N)
    else:
        y = w4a16_linear(z, qweight_NK2, wscale_NG, bias_N)
        if c is not None and wp_NR is not None:
            y = y + c.float() @ wp_NR.float().mT
    return y.to(x_MD.dtype)


def _w4a16(
    plan: Plan,
    x_MD: Tensor,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    spec: QuantSpec,
) -> Tensor:
    from .w4a16_linear.kernel import launch

    assert isinstance(plan.tile, w4a16_tiles.Tile)
    z, c = transform(x_MD, basis_DR, rotation_DK, spec)
    y = launch(z, qweight_NK2, wscale_NG, bias_N, tile=plan.tile)
    if c is not None and wp_NR is not None:
        y = torch.addmm(y, c, wp_NR.to(c.dtype).mT)
    return y
