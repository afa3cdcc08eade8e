"""Runs a packed linear by its plan.

Letters: M rows, D channels, N outputs, R protected directions, G groups.
"""

import torch
from torch import Tensor

from .formats.protected import dequantize_protected, rounded_coefficients
from .formats.spec import QuantSpec
from .lane import beside, fork
from .plan import Plan
from .source import Source
from .transform_quantize import quantize_rows, transform
from .w4a4_linear import tiles as w4a4_tiles
from .w4a4_linear import w4a4_linear
from .w4a16_linear import tiles as w4a16_tiles
from .w4a16_linear import w4a16_linear

Codes = tuple[Tensor, Tensor, Tensor | None]
"""Codes, their scales, and c where it is not among the codes' columns."""
Scratch = tuple[Tensor | None, Tensor | None]
"""Unpacked weights and their scales in float32; None where the product reads the packed ones."""


def run(
    plan: Plan,
    x_MD: Tensor,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wglobal_1: Tensor | None,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    spec: QuantSpec,
    smooth_D: Tensor | None = None,
    wpscale_N1: Tensor | None = None,
) -> Tensor:
    """y [M, N] in x's dtype; buffers as ``kernels.linear.QuantLinear`` describes them.

    The last two have no kernel: a plan for them is the reference.
    """
    if plan.engine == "reference":
        return reference(
            x_MD, qweight_NK2, wscale_NG, wglobal_1, basis_DR, rotation_DK, wp_NR, bias_N, spec,
            smooth_D, wpscale_N1,
        )  # fmt: skip
    x_MD = x_MD if x_MD.stride(-1) == 1 else x_MD.contiguous()
    if plan.engine == "w4a16":
        from .w4a16_linear.kernel import launch

        assert isinstance(plan.tile, w4a16_tiles.Tile)
        with torch.cuda.device_of(x_MD):
            z, c = transform(x_MD, basis_DR, rotation_DK, spec)
            y = launch(z, qweight_NK2, wscale_NG, bias_N, tile=plan.tile)
            return y if c is None or wp_NR is None else torch.addmm(y, c, wp_NR.to(c.dtype).mT)
    return read(
        plan, x_MD, qweight_NK2, wscale_NG, basis_DR, rotation_DK, wp_NR, bias_N, spec
    )  # fmt: skip


def read(
    plan: Plan,
    source: Tensor | Source,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    spec: QuantSpec,
) -> Tensor:
    """y [M, N] of 4- or 8-bit activations, from rows [M, D] or a source of so many rows."""
    x = source.x_BTD if isinstance(source, Source) else source
    with torch.cuda.device_of(x):
        scratch = allocated(plan, qweight_NK2, wscale_NG, wp_NR, bias_N)
        start = fork(x.device) if scratch[0] is not None else None
        codes = quantized(plan, source, basis_DR, rotation_DK, bias_N is not None, spec)
        if scratch[0] is not None:
            # The transform mostly waits for memory to answer; unpacking fills some of its gaps.
            with beside(start):
                unpack(plan, qweight_NK2, wscale_NG, wp_NR, bias_N, scratch)
        return multiplied(
            plan, codes, scratch, qweight_NK2, wscale_NG, wp_NR, bias_N, spec.width, x.dtype
        )


def quantized(
    plan: Plan,
    x_MD: Tensor | Source,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    bias: bool,
    spec: QuantSpec,
) -> Codes:
    """Codes, scales and, but for ``scaled_mm``, c of x, as the plan's product wants them."""
    from .transform_quantize.kernel import launch

    tail = plan.engine == "scaled_mm"
    return launch(
        x_MD, basis_DR, rotation_DK, spec, container=plan.dtype, tail=tail, bias=tail and bias
    )


def allocated(
    plan: Plan,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
) -> Scratch:
    """Memory for the unpacked weights of a plan, if it takes them so."""
    from .unpack_w4.kernel import allocate

    if plan.engine == "packed":
        return None, None
    tail = (wscale_NG, wp_NR, bias_N) if plan.engine == "scaled_mm" else ()
    return allocate(qweight_NK2, plan.dtype, *tail)


def unpack(
    plan: Plan,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    scratch: Scratch,
) -> None:
    """Fill what :func:`allocated` gave."""
    from .unpack_w4.kernel import launch

    weights_NK, scale_1N = scratch
    assert weights_NK is not None
    tail = (wscale_NG, wp_NR, bias_N) if plan.engine == "scaled_mm" else ()
    launch(qweight_NK2, plan.dtype, *tail, out=(weights_NK, scale_1N))


def multiplied(
    plan: Plan,
    codes: Codes,
    scratch: Scratch,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] in ``dtype`` of what :func:`quantized` and :func:`unpack` made."""
    codes_MK, scale_MG, c_MR = codes
    weights_NK, scale_1N = scratch
    if plan.engine == "scaled_mm":
        assert weights_NK is not None and scale_1N is not None
        return torch._scaled_mm(
            codes_MK, weights_NK.t(), scale_a=scale_MG, scale_b=scale_1N, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip
    from .w4a4_linear.kernel import launch

    assert isinstance(plan.tile, w4a4_tiles.Tile)
    return launch(
        codes_MK, scale_MG, c_MR, qweight_NK2, wscale_NG, wp_NR, bias_N,
        width=width, out_dtype=dtype, tile=plan.tile, weights_NK=weights_NK,
    )  # fmt: skip


def reference(
    x_MD: Tensor,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wglobal_1: Tensor | None,
    basis_DR: Tensor | None,
    rotation_DK: Tensor | None,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    spec: QuantSpec,
    smooth_D: Tensor | None = None,
    wpscale_N1: Tensor | None = None,
) -> Tensor:
    """The specification, composed: any device, any floating dtype."""
    z, c = transform(x_MD, basis_DR, rotation_DK, spec, smooth_D)
    if c is not None and wp_NR is not None and wpscale_N1 is not None:
        c, wp_NR = rounded_coefficients(c), dequantize_protected(wp_NR, wpscale_N1)
    if spec.activations.bits < 16:
        codes = quantize_rows(z, spec)
        y = w4a4_linear(*codes, c, qweight_NK2, wscale_NG, wp_NR, bias_N, wglobal_1)
    else:
        y = w4a16_linear(z, qweight_NK2, wscale_NG, bias_N, wglobal_1)
        if c is not None and wp_NR is not None:
            y = y + c.float() @ wp_NR.float().mT
    return y.to(x_MD.dtype)
