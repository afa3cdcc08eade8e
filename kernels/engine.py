"""Runs a packed linear by its plan. Letters: M rows, D channels, N outputs, R protected, G groups."""

import functools

import torch
from torch import Tensor

from .plan import Plan
from .spec import QuantSpec
from .transform_quantize import quantize_rows, transform
from .w4a4_linear import w4a4_linear
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
            return _w4a16(plan, x_MD, qweight_NK2, wscale_NG, basis_DR, rotation_DK, wp_NR, bias_N, spec)  # fmt: skip
        from .transform_quantize.kernel import launch as transform_quantize

        if plan.engine == "scaled_mm":
            weights, scale_w = _unpacked_beside(qweight_NK2, plan.dtype, wscale_NG, wp_NR, bias_N)
            codes, scale, _ = transform_quantize(
                x_MD, basis_DR, rotation_DK, spec,
                container=plan.dtype, tail=True, bias=bias_N is not None,
            )  # fmt: skip
            _join(x_MD)
            return torch._scaled_mm(
                codes, weights.t(), scale_a=scale, scale_b=scale_w, out_dtype=x_MD.dtype,
                use_fast_accum=True,
            )  # fmt: skip
        from .w4a4_linear.kernel import launch as gemm

        scratch = None
        if plan.engine == "unpacked":
            scratch, _ = _unpacked_beside(qweight_NK2, plan.dtype)
        codes, scale, c = transform_quantize(
            x_MD, basis_DR, rotation_DK, spec, container=plan.dtype
        )
        if scratch is not None:
            _join(x_MD)
        return gemm(
            codes, scale, c, qweight_NK2, wscale_NG, wp_NR, bias_N,
            width=spec.width, out_dtype=x_MD.dtype, tile=plan.tile, weights_NK=scratch,
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

    z, c = transform(x_MD, basis_DR, rotation_DK, spec)
    y = launch(z, qweight_NK2, wscale_NG, bias_N, tile=plan.tile)
    if c is not None and wp_NR is not None:
        y = torch.addmm(y, c, wp_NR.to(c.dtype).mT)
    return y


@functools.lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _unpacked_beside(
    qweight_NK2: Tensor,
    container: torch.dtype,
    wscale_N1: Tensor | None = None,
    wp_NR: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Unpack on a second stream while the activations are transformed; :func:`_join` before use.

    The scratch belongs to the calling stream, where the caching allocator hands the same memory to
    one linear after the other: a workspace that is as large as the largest linear needs, and no
    larger.
    """
    from .unpack_w4.kernel import allocate, launch

    scratch = allocate(qweight_NK2, container, wscale_N1, wp_NR, bias_N)
    if not qweight_NK2.is_cuda:
        return launch(qweight_NK2, container, wscale_N1, wp_NR, bias_N, out=scratch)
    side = _side_stream(qweight_NK2.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        return launch(qweight_NK2, container, wscale_N1, wp_NR, bias_N, out=scratch)


def _join(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.current_stream().wait_stream(_side_stream(x.device))
